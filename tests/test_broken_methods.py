"""Methods of other packages that do not do what a method must: each is named as the method's fault, in every run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cli_helpers import refused, run, run_json
from test_third_party import installed
from tiny_models import FAMILIES

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MethodFaultError, MMTokError
from mmtok_cli.methods.base import Method, highest, known
from mmtok_cli.methods.declaration import declaration_fault
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import answer
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import Cut, LayerTokens, Selection, TextTokens, VisionTokens

Select = Callable[[VisionTokens, int], Any]


def best(vision: VisionTokens, budget: int) -> Selection:
    return highest(vision.projected.norm(dim=-1), vision.eligible, budget)


def with_indices(change: Callable[[torch.Tensor], Any]) -> Select:
    return lambda vision, budget: Selection(change(best(vision, budget).indices))


def with_rows(change: Callable[[torch.Tensor], Any]) -> Select:
    def select(vision: VisionTokens, budget: int) -> Selection:
        indices = best(vision, budget).indices
        return Selection(indices, tokens=change(vision.projected[indices]))

    return select


def raising(error: BaseException) -> Select:
    def select(vision: VisionTokens, budget: int) -> Selection:
        raise error

    return select


def in_place(vision: VisionTokens, budget: int) -> Selection:
    vision.projected.mul_(0.5)
    return best(vision, budget)


def more(indices: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(indices) + 4)


SELECTIONS: dict[str, tuple[Select, str]] = {
    "nothing": (lambda v, b: None, "must return a Selection, not NoneType"),
    "indices": (lambda v, b: best(v, b).indices, "must return a Selection, not Tensor"),
    "tuple": (lambda v, b: (best(v, b).indices,), "must return a Selection, not tuple"),
    "list of indices": (with_indices(torch.Tensor.tolist), "int64 tensor"),
    "numpy indices": (with_indices(torch.Tensor.numpy), "int64 tensor"),
    "float indices": (with_indices(torch.Tensor.float), "int64 tensor.*float32"),
    "int32 indices": (with_indices(torch.Tensor.int), "int64 tensor.*int32"),
    "mask": (lambda v, b: Selection(torch.ones(v.total, dtype=torch.bool)), "int64 tensor.*bool"),
    "two axes": (with_indices(lambda i: i[None]), "int64 tensor"),
    "one number": (with_indices(lambda i: i[0]), "int64 tensor"),
    "too few": (with_indices(lambda i: i[1:]), "kept 7 tokens of picture-0 at a budget of 8"),
    "none": (with_indices(lambda i: i[:0]), "kept 0 tokens of picture-0 at a budget of 8"),
    "too many": (with_indices(more), "kept 12 tokens of picture-0 at a budget of 8"),
    "everything": (lambda v, b: Selection.everything(v), "kept 36 tokens of picture-0 at a budget of 8"),
    "twice": (with_indices(lambda i: i[:1].expand(8)), "a token twice"),
    "one twice": (with_indices(lambda i: torch.cat([i[:1], i[:-1]])), "a token twice"),
    "negative": (with_indices(lambda i: i - 36), "outside of the image's 36 tokens"),
    "minus one": (with_indices(lambda i: torch.cat([i.new_tensor([-1]), i[1:]])), "outside of the image's 36 tokens"),
    "beyond": (with_indices(lambda i: i + 30), "outside of the image's 36 tokens"),
    "just beyond": (
        with_indices(lambda i: torch.cat([i[:-1], i.new_tensor([36])])),
        "outside of the image's 36 tokens",
    ),
    "huge": (with_indices(lambda i: i + 2**40), "outside of the image's 36 tokens"),
    "descending": (with_indices(lambda i: i.flip(0)), "do not ascend"),
    "as picked": (lambda v, b: Selection(highest(v.projected.norm(dim=-1), v.eligible, b).order), "do not ascend"),
    "other device": (with_indices(lambda i: i.to("meta")), "on meta"),
    "rows of NaN": (with_rows(lambda rows: rows * torch.nan), "not finite"),
    "one infinite value": (with_rows(lambda rows: rows.index_fill(0, torch.tensor([0]), torch.inf)), "not finite"),
    "rows of whole numbers": (with_rows(torch.Tensor.long), "floating-point"),
    "rows too narrow": (with_rows(lambda rows: rows[:, :-1]), "tokens of shape"),
    "too few rows": (with_rows(lambda rows: rows[1:]), "tokens of shape"),
    "rows on another device": (with_rows(lambda rows: rows.to("meta")), "on meta"),
    "rows as a list": (with_rows(torch.Tensor.tolist), "tokens of shape"),
    "other order": (lambda v, b: replace(best(v, b), order=torch.arange(b) + 20), "order of other tokens"),
    "short order": (lambda v, b: replace(best(v, b), order=best(v, b).order[1:]), "order of shape"),
    "order of numbers": (lambda v, b: replace(best(v, b), order=torch.rand(b)), "order as int64"),
    "short gains": (lambda v, b: replace(best(v, b), gains=torch.rand(b - 1)), "gains of shape"),
    "merged as numbers": (lambda v, b: replace(best(v, b), merged=torch.rand(b)), "merged as booleans"),
    "short merged": (lambda v, b: replace(best(v, b), merged=torch.ones(1, dtype=torch.bool)), "merged of shape"),
    "in place": (in_place, "changed its input in place"),
    "index error": (raising(IndexError("index 99 is out of bounds")), "failed: IndexError: index 99"),
    "several lines": (
        raising(RuntimeError("one\ntwo")),
        r"failed: RuntimeError: one \(test_broken_methods.py, line \d+",
    ),
    "without words": (raising(ValueError()), "failed: ValueError: ValueError"),
    "ends the program": (raising(SystemExit(0)), "failed: SystemExit: 0"),
    "own kind of error": (raising(type("Odd", (BaseException,), {})("odd")), "failed: Odd: odd"),
    "recursion": (raising(RecursionError("too deep")), "failed: RecursionError"),
    "assertion": (raising(AssertionError()), "failed: AssertionError"),
}


@dataclass(frozen=True)
class Defective(Method):
    """A method with one defect in `select`."""

    summary: ClassVar[str] = "defective"

    defect: str = ""

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        return SELECTIONS[self.defect][0](vision, budget)


@pytest.mark.parametrize("defect", SELECTIONS)
def test_selections(defect: str, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    with pytest.raises(MethodFaultError, match=SELECTIONS[defect][1]) as error:
        answer(tiny_sdpa, Defective(defect), samples[:1], Budget(count=8), max_new_tokens=1)
    assert "Defective.select" in error.value.message and "\n" not in error.value.message
    assert "test_broken_methods" in error.value.hint and "pydoc" in error.value.hint


def test_eligible_is_not_changed(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    class Hides(Defective):
        def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
            vision.eligible[:] = True
            return Selection(torch.arange(budget))

    with pytest.raises(MethodFaultError, match="changed its input in place"):
        answer(tiny_sdpa, Hides(), samples[1:2], Budget(count=8), max_new_tokens=1)


def test_padding_is_not_kept(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    class First(Defective):
        def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
            return Selection(torch.arange(budget))

    with pytest.raises(MethodFaultError, match="kept padding"):
        answer(tiny_sdpa, First(), samples[1:2], Budget(count=8), max_new_tokens=1)


def test_every_batch_is_checked(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    """The second image of a batch, and a later batch."""

    class Late(Defective):
        def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
            found = best(vision, budget)
            return found if vision.image_id == "picture-0" else Selection(found.indices[1:])

    answer(tiny_sdpa, Late(), samples[:1], Budget(count=8), max_new_tokens=1)
    with pytest.raises(MethodFaultError, match="kept 7 tokens of picture-1"):
        answer(tiny_sdpa, Late(), samples[:2], Budget(count=8), max_new_tokens=1)


def overriding(**hooks: Any) -> Method:
    """A method with other hooks than `select`."""
    attributes = {"__doc__": "Hooks.", "summary": "hooks", "__module__": __name__, **hooks}
    return dataclass(frozen=True)(type("Hooks", (Method,), attributes))()


def one_cut(*numbers: Any) -> Callable[..., Any]:
    return lambda self, total, budget, layers: (Cut(*numbers),) if total > budget else ()


def first(self: Method, tokens: LayerTokens, cut: Cut) -> Selection:
    return Selection(torch.arange(cut.keep))


def choosing(choose: Callable[[LayerTokens, Cut], Any]) -> dict[str, Any]:
    return {"cuts": one_cut(2, 8), "choose": lambda self, tokens, cut: choose(tokens, cut)}


def hidden_in_place(tokens: LayerTokens, cut: Cut) -> Selection:
    tokens.hidden.zero_()
    return Selection(torch.arange(cut.keep))


def earlier_in_place(self: Method, tokens: LayerTokens, cut: Cut) -> Selection:
    tokens.earlier[1].zero_()
    return Selection(torch.arange(cut.keep))


HOOKS: dict[str, tuple[dict[str, Any], str]] = {
    "resize to nothing": ({"resize": lambda self, total, budget: 0}, "resize must return None or a number from 1 to"),
    "resize to more": ({"resize": lambda self, total, budget: total + 1}, "resize must return None or"),
    "resize to half a token": ({"resize": lambda self, total, budget: 8.5}, "resize must return None or"),
    "resize to a grid": ({"resize": lambda self, total, budget: (2, 4)}, "resize must return None or"),
    "resize to fewer": ({"resize": lambda self, total, budget: 4}, "kept 4 tokens of picture-0 at a budget of 8"),
    "list from select_batch": ({"select_batch": lambda self, v, t, b: []}, "a list of 1 selections"),
    "generator": ({"select_batch": lambda self, v, t, b: iter([])}, "a list of 1 selections"),
    "cuts of nothing": ({"cuts": lambda self, *_: None, "choose": first}, "must return a tuple of Cut"),
    "cuts of numbers": ({"cuts": lambda self, *_: (2,), "choose": first}, "must return a tuple of Cut"),
    "one cut without a tuple": ({"cuts": lambda self, *_: Cut(2, 8), "choose": first}, "must return a tuple of Cut"),
    "cut of half a token": ({"cuts": one_cut(2, 8.5), "choose": first}, "must return a tuple of Cut"),
    "cut before no layer": ({"cuts": one_cut(9, 8), "choose": first}, "an impossible cut"),
    "cut before the first layer": ({"cuts": one_cut(0, 8), "choose": first}, "an impossible cut"),
    "negative layer": ({"cuts": one_cut(-1, 8), "choose": first}, "an impossible cut"),
    "cut to nothing": ({"cuts": one_cut(2, 0), "choose": first}, "an impossible cut"),
    "cut to more": ({"cuts": one_cut(2, 99), "choose": first}, "an impossible cut"),
    "cut to another number": ({"cuts": one_cut(2, 9), "choose": first}, "cuts kept 9 tokens of picture-0 at a budget"),
    "no cut": ({"cuts": lambda self, *_: (), "choose": first}, "cuts kept 36 tokens of picture-0 at a budget of 8"),
    "reads another layer": ({"cuts": one_cut(2, 8, 0), "choose": first}, "an impossible cut"),
    "reads the future": ({"cuts": one_cut(2, 8, 1, "none", (2,)), "choose": first}, "an impossible cut.*0 to 1"),
    "rows of nobody": ({"cuts": one_cut(2, 8, 1, "last"), "choose": first}, "must return a tuple of Cut"),
    "enters more": (
        {"cuts": one_cut(2, 8), "choose": first, "entering": lambda self, total, budget: total + 1},
        "entering must return a number from 8 to 36, not 37",
    ),
    "cuts fails": ({"cuts": lambda self, *_: 1 / 0, "choose": first}, "cuts failed: ZeroDivisionError"),
    "choose nothing": (choosing(lambda tokens, cut: None), "choose must return a Selection"),
    "choose too few": (choosing(lambda t, c: Selection(torch.arange(c.keep - 1))), "choose kept 7 .*announced 8"),
    "choose too many": (choosing(lambda t, c: Selection(torch.arange(c.keep + 1))), "choose kept 9 .*announced 8"),
    "choose twice": (choosing(lambda t, c: Selection(torch.zeros(c.keep, dtype=torch.int64))), "a token twice"),
    "choose beyond": (choosing(lambda t, c: Selection(torch.arange(c.keep) + 30)), "outside of the image's"),
    "choose negative": (choosing(lambda t, c: Selection(torch.arange(c.keep) - 1)), "outside of the image's"),
    "choose numbers": (choosing(lambda t, c: Selection(torch.rand(c.keep))), "choose must return indices"),
    "choose NaN": (
        choosing(lambda t, c: Selection(torch.arange(c.keep), tokens=t.hidden[: c.keep] * torch.nan)),
        "tokens that are not finite",
    ),
    "hidden in place": (choosing(hidden_in_place), "changed its input in place"),
    "earlier in place": (
        {"cuts": one_cut(2, 8, None, "none", (1,)), "choose": earlier_in_place},
        "changed its input in place",
    ),
    "reads no keys": (choosing(lambda t, c: known(t.keys, "keys")()), "keys, which is None without Cut.reads"),
    "reads no attention": (choosing(lambda t, c: Selection(t.attention.mean(0))), "choose failed: AttributeError"),
    "queries beyond": (
        {"cuts": one_cut(2, 8, 1), "choose": first, "queries": lambda self, v, t: torch.tensor([len(t)])},
        "queries returned an index beyond",
    ),
    "queries of nothing": (
        {"cuts": one_cut(2, 8, 1), "choose": first, "queries": lambda self, v, t: torch.tensor([])},
        "queries must return the indices",
    ),
    "queries as an empty mask": (
        {"cuts": one_cut(2, 8, 1), "choose": first, "queries": lambda self, v, t: torch.zeros(len(t)).bool()},
        "queries chose no text token",
    ),
    "queries as a number": (
        {"cuts": one_cut(2, 8, 1), "choose": first, "queries": lambda self, v, t: 0},
        "queries must return the indices",
    ),
}


@pytest.mark.parametrize("defect", HOOKS)
def test_hooks(defect: str, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    hooks, words = HOOKS[defect]
    with pytest.raises(MethodFaultError, match=words):
        answer(tiny_sdpa, overriding(**hooks), samples[:1], Budget(count=8), max_new_tokens=1)


@pytest.mark.parametrize("kept", [-1, 37, 1.5, None, True, "8"])
def test_count(kept: Any, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    method = overriding(count=lambda self, share, total, signals=(): kept)
    with pytest.raises(MethodFaultError, match="count must return a number from 0 to 36"):
        answer(tiny_sdpa, method, samples[:1], Budget(percent=20), max_new_tokens=1)


@pytest.mark.parametrize("crops", [lambda crops: crops[1:], lambda crops: None, lambda crops: [1] * len(crops)])
def test_across_crops(crops: Callable[..., Any], samples: list[Sample]) -> None:
    hooks = {"across_crops": lambda self, each: crops(each), "select": lambda self, v, t, b: best(v, b)}
    with pytest.raises(MethodFaultError, match="across_crops"):
        answer(FAMILIES["llava_next"]("sdpa"), overriding(per_crop=True, **hooks), samples[:1], Budget(count=20))


@pytest.mark.parametrize(
    ("selected", "words"),
    [
        (lambda crops: [best(crop, 4) for crop in crops[1:]], "must return a list"),
        (lambda crops: [crop.projected for crop in crops], "must return a Selection"),
        (lambda crops: [best(crop, 4) for crop in crops], "kept 12 tokens"),
        (
            lambda crops: [Selection(torch.tensor([0, 0, 1, 36, 37])), *[best(crop, 0) for crop in crops[1:]]],
            "returned",
        ),
    ],
)
def test_select_crops(selected: Callable[..., Any], words: str, samples: list[Sample]) -> None:
    method = overriding(
        per_crop=True, select=lambda self, v, t, b: best(v, b), select_crops=lambda self, crops, t, b: selected(crops)
    )
    with pytest.raises(MethodFaultError, match=words):
        answer(FAMILIES["llava_next"]("sdpa"), method, samples[:1], Budget(count=8), rules=Rules("harmonised"))


DECLARATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "summary": ({"summary": ""}, "no summary"),
    "summary of several lines": ({"summary": "a\nb"}, "no summary"),
    "summary of bytes": ({"summary": b"a"}, "no summary"),
    "source": ({"source": 3}, "source must be text"),
    "takes_budget": ({"takes_budget": "no"}, "takes_budget must be True or False"),
    "per_crop": ({"per_crop": None}, "per_crop must be True or False"),
    "positions": ({"positions": "shuffle"}, "positions must be one of"),
    "signals": ({"signals": "class_attention"}, "signals must be a tuple"),
    "list of signals": ({"signals": ["class_attention"]}, "signals must be a tuple"),
    "alternative signals": ({"alternative_signals": ("mean_keys",)}, "alternative_signals a tuple of such tuples"),
    "matrices": ({"matrices": "many"}, "matrices must be a number"),
    "no annotation": ({"pivots": 4}, "pivots has no annotation: write pivots: int"),
    "summary as a parameter": ({"__annotations__": {"summary": str}}, "summary describes the class"),
    "flag as a parameter": ({"__annotations__": {"per_crop": bool}, "per_crop": True}, "per_crop describes the class"),
    "generated docstring": ({"__doc__": None}, "no docstring"),
    "no hook": ({"select": Method.select}, "overrides none of the hooks"),
    "cuts alone": ({"cuts": one_cut(2, 8)}, "override both or neither"),
    "list parameter": ({"__annotations__": {"p": list}, "p": field(default_factory=list)}, "p has an unsupported type"),
    "dict parameter": ({"__annotations__": {"p": dict[str, int]}, "p": None}, "p has an unsupported type"),
    "tensor parameter": ({"__annotations__": {"p": torch.Tensor}, "p": None}, "p has an unsupported type"),
    "default of another type": ({"__annotations__": {"p": int}, "p": "two"}, "the default of p cannot be 'two'"),
    "default that is not finite": (
        {"__annotations__": {"p": float}, "p": float("nan")},
        "the default of p cannot be nan",
    ),
}


@pytest.mark.parametrize("defect", DECLARATIONS)
def test_declarations(defect: str) -> None:
    attributes, words = DECLARATIONS[defect]
    hooks = {"select": lambda self, v, t, b: best(v, b)}
    assert words in (declaration_fault(type(overriding(**hooks | attributes))) or "nothing")
    assert declaration_fault(type(overriding(**hooks))) is None


GOOD = """
from dataclasses import dataclass
from typing import ClassVar
from mmtok_cli.methods.base import Method, highest
from mmtok_cli.tokens import Selection
{before}
@dataclass(frozen=True)
class Broken(Method):
    "A method."
    summary: ClassVar[str] = "a method"
    power: int = 2
    def __post_init__(self):
        {init}
    def select(self, vision, text, budget):
        {select}
        return highest(vision.projected.norm(dim=-1), vision.eligible, budget)
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str = "broken", **parts: str) -> None:
    code = GOOD.format(**{"before": "", "init": "pass", "select": "pass"} | parts)
    installed(directory, "broken_method", code, f"{name} = broken_method:Broken")
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.delitem(sys.modules, "broken_method", raising=False)


IMPORTS = {
    "raise ImportError('no such library')": "no such library",
    "import sys; sys.exit(0)": "cannot be imported: 0",
    "1 / 0": "division by zero",
    "def": "invalid syntax",
    "raise BaseException('odd')": "odd",
    "del Method": "not defined",
}


@pytest.mark.parametrize("code", IMPORTS)
def test_package_that_cannot_be_imported(
    code: str, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by name, and hides no other method."""
    install(tmp_path, monkeypatch, before=code)
    listed = run("methods")
    assert listed.exit_code == 0 and "cannot be used" in listed.stdout and "pyramiddrop" in listed.stdout
    methods = {method["name"]: method for method in run_json("methods")["methods"]}
    assert IMPORTS[code] in methods["broken"]["fault"] and methods["mmtok"]["summary"]
    refused(run("methods", "broken"), "broken_method", IMPORTS[code])
    refused(run("compare", "--methods", "broken,random"), "broken_method")
    assert run("infer", photo, "What is it?", "-b", 4, "--max-new-tokens", 1).exit_code == 0


@pytest.mark.parametrize(
    "name", ["../../evil", "a/b", "a.b", "a,b", "a b", "\x1b[31mred", "[bold]", "x" * 65, "-x", "mötok"]
)
def test_names_that_no_method_may_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, name)
    listed = run("methods")
    assert listed.exit_code == 0 and "cannot be used" in listed.stdout and "\x1b[31m" not in listed.stdout
    refused(run("methods", "--", name), "letters, digits")


@pytest.mark.parametrize("init", ["raise TypeError('odd')", "1 / 0", "self.power = 3", "raise KeyError('x')"])
def test_constructor_that_fails(init: str, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, init=init)
    refused(run("infer", photo, "What is it?", "-b", 4, "--method", "broken"), "broken cannot be made", "broken_method")


def test_what_a_method_prints_is_not_part_of_the_results(
    tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, before="print('importing')", select="print('selecting')")
    said = run_json("infer", photo, "What is it?", "-b", 4, "--method", "broken", "--max-new-tokens", 1)
    assert said["tokens"]["kept"] == 4


@pytest.mark.parametrize("select", ["return None", "import sys; sys.exit(0)", "raise IndexError('odd')"])
def test_infer_is_refused(select: str, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, select=select)
    refused(run("infer", photo, "What is it?", "-b", 4, "--method", "broken"), "Broken.select", "broken_method")


def test_python_interface_checks_types() -> None:
    import mmtok_cli as mmtok

    for name, parameters in {
        "fastv": {"layer": "x"},
        "mmtok": {"alpha": float("nan")},
        "sparsevlm": {"layers": 3},
        "visionzip": {"merge": "max"},
        "random": {"seed": 2.5},
    }.items():
        with pytest.raises(MMTokError, match="cannot be"):
            mmtok.make_method(name, **parameters)
    with pytest.raises(MMTokError, match="no parameter 'layr'") as error:
        mmtok.make_method("fastv", layr=3)
    assert "did you mean layer" in error.value.hint
    assert mmtok.make_method("pyramiddrop", layers=[8, 16]).layers == (8, 16)


STATES = {
    "import torch; torch.set_default_dtype(torch.float64)": "changed the default data type",
    "import torch; torch.set_num_threads(torch.get_num_threads() + 1)": "changed the number of threads",
    "import torch; torch.set_default_device('meta')": "changed the default device",
    "import os; os.chdir('/')": "changed the working directory",
    "import sys; sys.setrecursionlimit(sys.getrecursionlimit() + 1)": "changed the recursion limit",
}


@pytest.mark.parametrize("code", STATES)
def test_global_state_is_restored(
    code: str, tmp_path: Path, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, select=code)
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.get_default_device(), Path.cwd()
    options = ("-m", tiny_directory, "-b", 4, "--limit", 2, "--rounds", 1, "--max-new-tokens", 1)
    shown = run("compare", "--methods", "broken,random", *options, "--json")
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.get_default_device(), Path.cwd())
    found = json.loads(shown.stdout)
    assert [case["case"]["method"] for case in found["results"]] == ["full", "random"]
    assert STATES[code] in found["failures"][0]["message"]


def test_long_and_broken_messages_are_cut(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, select="raise RuntimeError('x' * 5_000_000)")
    result = run("infer", photo, "What is it?", "-b", 4, "--method", "broken")
    refused(result, "Broken.select failed: RuntimeError: xxx")
    assert len(result.stderr) < 1000


def test_status_of_a_comparison_whose_cases_failed(
    tmp_path: Path, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One case that fails is a row; if none is left, the command has failed."""
    install(tmp_path, monkeypatch, select="return None")
    options = ("-m", tiny_directory, "-b", 4, "--limit", 2, "--rounds", 1, "--max-new-tokens", 1)
    alone = run("compare", "--methods", "broken", *options)
    said = " ".join(alone.stderr.split())
    assert alone.exit_code == 1 and "must return a Selection" in said and "failures" in said
    assert run("compare", "--methods", "broken,random", *options).exit_code == 0
