"""The catalogue, and methods that come from other packages."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from mmtok_cli import hooks
from mmtok_cli.cli.main import app
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import accepted, make_method, method_class, method_names
from mmtok_cli.methods.base import DESCRIPTION_ONLY, RECORDED_OUTPUTS, Method
from mmtok_cli.methods.catalogue import BUILT_IN
from mmtok_cli.methods.divprune import DivPrune
from mmtok_cli.methods.full import Full
from mmtok_cli.methods.mmtok import MMTok
from mmtok_cli.methods.parameters import parameter_defaults, parameter_types, setting_text
from mmtok_cli.methods.settings import profile_parameters, read_settings
from mmtok_cli.methods.testing import check_method
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import reduce
from mmtok_cli.profiles import known_profiles
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

README = Path(__file__).parents[1] / "README.md"
# The complete method that the README shows is the one that these tests install.
PACKAGE, ENTRY_POINT = re.search(
    r"```python\n# largest_norm\.py\n(.*?)```.*?```toml\n.*?(largest-norm = .*?)\n```", README.read_text(), re.DOTALL
).groups()


@pytest.fixture()
def installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package, as pip would have installed it."""
    (tmp_path / "largest_norm.py").write_text(PACKAGE)
    info = tmp_path / "largest_norm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: largest-norm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmtok.methods]\n" + ENTRY_POINT.replace('"', "") + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("largest_norm", None)


def vision(rows: int = 4, columns: int = 6, eligible: list[int] | None = None) -> VisionTokens:
    n = rows * columns
    mask = torch.ones(n, dtype=torch.bool)
    if eligible is not None:
        mask = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(eligible), True)
    generator = torch.Generator().manual_seed(0)
    projected, features = torch.randn(n, 8, generator=generator), torch.randn(n, 5, generator=generator)
    return VisionTokens(projected, features, (rows, columns), mask, "image", lambda rows: rows)


TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))


def with_signals(seed: int) -> VisionTokens:
    """An image of 35 tokens, of which two are padding, with every signal."""
    g = torch.Generator().manual_seed(seed)
    attention, eligible = torch.rand(2, 35, generator=g), torch.ones(35, dtype=torch.bool)
    eligible[[seed, 30]] = False
    signals = {
        "class_attention": attention,
        "class_feature": torch.randn(17, generator=g),
        "received_attention": attention[0],
        "middle_attention": attention[1],
        "mean_keys": torch.randn(35, 3, generator=g),
        "clip_image_embeds": torch.randn(35, 6, generator=g),
        "clip_text_embeds": torch.randn(1, 6, generator=g),
    }
    projected, features = torch.randn(35, 17, generator=g), torch.randn(35, 17, generator=g)
    return VisionTokens(projected, features, (5, 7), eligible, "image", lambda rows: 2 * rows, signals)


@pytest.mark.parametrize(
    "name", ["cdpruner", "divprune", "gots", "hiprune", "otprune", "scope", "visionzip", "vispruner"]
)
def test_images_of_one_grid_are_selected_at_once_and_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, groups = make_method(name), []
    images = [*map(with_signals, range(3)), vision()]
    select_group = type(method).select_group

    def watched(self: Method, vision: list[VisionTokens], text: Any, budget: int) -> Any:
        groups.append(len(vision))
        return select_group(self, vision, text, budget)

    monkeypatch.setattr(type(method), "select_group", watched)
    kept = method.select_batch(images, [TEXT] * 4, [26, 26, 26, 24])
    assert groups == [3]
    for image, found in zip(images[:3], kept, strict=False):
        alone = vars(method.select(image, TEXT, 26))
        assert all(torch.equal(value, alone[name]) for name, value in vars(found).items() if value is not None)
    assert kept[3].kept == 24


@pytest.mark.parametrize("kind", [DivPrune, MMTok])
def test_a_subclass_that_overrides_select_alone_is_asked_image_by_image(kind: type[Method]) -> None:
    @dataclass(frozen=True)
    class Backwards(kind):
        """A method, and then the opposite."""

        def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
            chosen = super().select(vision, text, vision.total - budget)
            rest = [i for i in range(vision.total) if i not in chosen.indices]
            return Selection(torch.tensor(rest))

    (kept,) = Backwards().select_batch([vision()], [TEXT], [20])
    assert not set(kept.indices.tolist()) & set(kind().select(vision(), TEXT, 4).indices.tolist())


@pytest.mark.parametrize("found", [None, [], Selection(torch.arange(2))])
def test_a_group_of_which_not_every_image_is_selected(found: Any) -> None:
    @dataclass(frozen=True)
    class Few(Method):
        """Returns something else."""

        summary: ClassVar[str] = "something else"

        def select_group(self, vision: Any, text: Any, budget: int) -> Any:
            return found

    with pytest.raises(MMTokError, match="select_group must return a list of 1 selections, one for each image"):
        hooks.select(Few(), [vision()], [TEXT], [2])


def test_a_group_of_a_method_without_a_budget_is_selected() -> None:
    @dataclass(frozen=True)
    class Every(Method):
        """Every second token, whatever the budget."""

        summary: ClassVar[str] = "every second token"
        takes_budget: ClassVar[bool] = False

        def select_group(
            self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
        ) -> list[Selection]:
            return [Selection(torch.arange(0, image.total, 2)) for image in vision]

    seen = vision()
    assert Every().select(seen, TEXT, seen.total).kept == seen.total // 2
    assert [each.kept for each in Every().select_batch([seen] * 2, [TEXT] * 2, [seen.total] * 2)] == [12, 12]


@pytest.mark.usefixtures("installed_package")
def test_method_of_another_package() -> None:
    assert "largest-norm" in method_names()
    method = make_method("largest-norm", power=1.0)
    image = vision()
    kept = method.select(image, TEXT, 3).indices
    assert set(kept.tolist()) == set(image.projected.abs().sum(1).topk(3).indices.tolist())


@pytest.mark.usefixtures("installed_package")
def test_method_of_the_readme_passes_the_checks() -> None:
    assert check_method(make_method("largest-norm")) == []
    with pytest.raises(MMTokError, match="largest-norm: power must be above 0"):
        make_method("largest-norm", power=0.0)


def run_json(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.usefixtures("installed_package")
def test_method_of_another_package_on_the_command_line(tiny_directory: Path, photo: Path) -> None:
    (described,) = run_json("methods", "largest-norm")["methods"]
    assert described["parameters"] == {"power": 2.0} and described["acts"] == "between encoder and language model"
    assert described["settings"] == {"power": "largest-norm.power=2.0"}
    assert "largest-norm" in CliRunner().invoke(app, ["methods"]).stdout

    options = ("-m", tiny_directory, "-b", 4, "--max-new-tokens", 2, "--set", "largest-norm.power=1")
    said = run_json("infer", photo, "Is there a star?", "--method", "largest-norm", *options)
    assert (said["method"], said["tokens"]["kept"]) == ("largest-norm", 4)
    results = run_json("compare", "--methods", "largest-norm,random", *options, "--limit", 2)["results"]
    assert [r["case"]["method"] for r in results] == ["full", "largest-norm", "random"]
    assert results[1]["case"]["parameters"] == {"power": 1.0} and results[1]["tokens"]["kept"] == 4


def test_signal_that_nobody_offers_is_refused(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    @dataclass(frozen=True)
    class Curious(Full):
        signals: ClassVar[tuple[str, ...]] = ("heartbeat",)

    with pytest.raises(MMTokError, match="does not offer heartbeat"):
        reduce(tiny_sdpa, Curious(), samples, None)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(MMTokError, match="no method 'unifrom'") as error:
        method_class("unifrom")
    assert "did you mean uniform" in error.value.hint


def test_only_known_parameters_are_passed_on() -> None:
    assert accepted("random", {"seed": 3, "alpha": 1}) == {"seed": 3}
    assert accepted("mmtok", {"seed": 3, "alpha": 1}) == {"alpha": 1}


ACTS = ("before the encoder", "between encoder and language model", "inside the language model")


def test_every_method_explains_itself() -> None:
    for name in method_names():
        method = method_class(name)
        assert method.summary and method.__doc__ and (method.acts() in ACTS or name == "full")


def test_every_default_can_be_written_as_a_setting() -> None:
    for name in method_names():
        for parameter, value in parameter_defaults(method_class(name)).items():
            assert read_settings([setting_text(name, parameter, value)], [name]) == {name: {parameter: value}}


def test_settings() -> None:
    texts = ("fastv.layer=3", "sparsevlm.layers=2, 6,15", "visionzip.contextual=none", "visionzip.merge=mean")
    assert read_settings([*texts, "fastv.layer = 1"], ["fastv", "sparsevlm", "visionzip", "full"]) == {
        "fastv": {"layer": 1},
        "sparsevlm": {"layers": (2, 6, 15)},
        "visionzip": {"contextual": None, "merge": "mean"},
    }
    assert read_settings(["sparsevlm:v2.layers=0"], ["sparsevlm:v2"]) == {"sparsevlm:v2": {"layers": (0,)}}
    assert read_settings(["mmtok.alpha=1e-1"], ["mmtok"]) == {"mmtok": {"alpha": 0.1}}
    assert read_settings([], ["mmtok"]) == {}


@pytest.mark.parametrize("text", ["fastv", "fastv.layer", "fastv.layer=", ".layer=2", "fastv.=2", "layer=2", "=", ""])
def test_settings_that_cannot_be_read(text: str) -> None:
    with pytest.raises(MMTokError, match="cannot be read") as error:
        read_settings([text], ["fastv"])
    assert "METHOD.PARAMETER=VALUE" in error.value.hint


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("fastvv.layer=2", "no method 'fastvv'", "did you mean fastv"),
        ("random.seed=2", "random is not among the methods", "methods of this run: full, fastv, mmtok, visionzip"),
        ("mmtok.alfa=2", "mmtok has no parameter 'alfa', only alpha, text_temp", "did you mean alpha"),
        ("full.seed=2", "full has no parameter 'seed'", "leave it out"),
        ("fastv.layer=two", "fastv.layer cannot be 'two'", "it takes a whole number"),
        ("fastv.layer=2.5", "fastv.layer cannot be '2.5'", "it takes a whole number"),
        ("mmtok.alpha=nan", "mmtok.alpha cannot be 'nan'", "it takes a number"),
        ("visionzip.merge=max", "visionzip.merge cannot be 'max'", "it takes sum or mean"),
        ("visionzip.contextual=few", "visionzip.contextual cannot be 'few'", "it takes a whole number or none"),
        ("fastv.summary=x", "fastv has no parameter 'summary'", "`mmtok methods fastv`"),
    ],
)
def test_settings_that_cannot_be_followed(text: str, message: str, hint: str) -> None:
    with pytest.raises(MMTokError, match=message) as error:
        read_settings([text], ["full", "fastv", "mmtok", "visionzip"])
    assert hint in error.value.hint


def test_tables_of_shipped_profiles_are_valid() -> None:
    for profile in known_profiles().values():
        assert set(profile.methods) <= set(method_names())
        for name in method_names():
            values = profile_parameters(name, profile.methods, profile.name)
            hash(make_method(name, **values))


def test_profile_tables_go_for_variants_as_far_as_these_have_the_parameters() -> None:
    tables = {"random": {"seed": 7, "layer": 1}, "sparsevlm": {"layers": [1, 2, 3]}}
    assert profile_parameters("random", tables, "x") == {"seed": 7}
    assert profile_parameters("random:inside", tables, "x") == {"seed": 7, "layer": 1}
    assert profile_parameters("sparsevlm:v2", tables, "x") == {"layers": (1, 2, 3)}
    assert profile_parameters("mmtok", tables, "x") == {}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"alfa": 0.5}, "the profile mine sets methods.mmtok.alfa, but mmtok has no such parameter"),
        ({"alpha": "0.5"}, "methods.mmtok.alpha of the profile mine cannot be '0.5'"),
        ({"alpha": True}, "methods.mmtok.alpha of the profile mine cannot be True"),
        ({"alpha": [0.5]}, r"methods.mmtok.alpha of the profile mine cannot be \[0.5\]"),
    ],
)
def test_wrong_profile_tables_are_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(MMTokError, match=words):
        profile_parameters("mmtok:vision", {"mmtok": table}, "mine")


def test_types_that_only_type_checkers_see_are_those_of_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Hidden(Full):
        wide: "Nowhere" = 3  # type: ignore[name-defined] # noqa: F821, UP037

    monkeypatch.setattr("mmtok_cli.methods.settings.method_class", lambda name: Hidden)
    assert parameter_types(Hidden) == {"wide": int}
    assert read_settings(["hidden.wide=4"], ["hidden"]) == {"hidden": {"wide": 4}}


@pytest.mark.parametrize("budget", range(1, 24))
def test_uniform_is_exact_for_every_budget(budget: int) -> None:
    kept = make_method("uniform").select(vision(), TEXT, budget).indices
    assert len(kept) == len(set(kept.tolist())) == budget and kept.equal(kept.sort().values)


def test_uniform_spreads_over_rows_and_columns() -> None:
    kept = make_method("uniform").select(vision(6, 6), TEXT, 9).indices
    assert kept.tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]


def test_pool_averages_what_each_cell_holds() -> None:
    image = vision()
    pooled: Selection = make_method("resize:pool").select(image, TEXT, 6)
    assert pooled.tokens is not None and pooled.tokens.shape == (6, 8)
    first_cell = image.projected.view(4, 6, 8)[:2, :2].reshape(-1, 8).mean(0)
    torch.testing.assert_close(pooled.tokens[0], first_cell)
    assert pooled.indices.tolist() == [7, 9, 11, 19, 21, 23]


def test_pool_leaves_padding_out() -> None:
    inside = [r * 6 + c for r in (1, 2) for c in range(6)]
    image = vision(eligible=inside)
    pooled: Selection = make_method("resize:pool").select(image, TEXT, 3)
    assert pooled.tokens is not None
    torch.testing.assert_close(pooled.tokens.mean(0), image.projected[inside].mean(0))
    assert set(pooled.indices.tolist()) <= set(inside)


def test_ablations_of_mmtok_differ_as_they_should() -> None:
    image = vision()
    both, text, sight = (make_method(name).select(image, TEXT, 5) for name in ("mmtok", "mmtok:text", "mmtok:vision"))
    other = TextTokens("Is there a dog?", lambda words: -torch.ones(len(words), 8))
    assert make_method("mmtok:vision").select(image, other, 5).indices.equal(sight.indices)
    assert not make_method("mmtok:text").select(image, other, 5).indices.equal(text.indices)
    assert both.order is not None and text.order is not None
    assert both.order[0] == text.order[0]  # the text term is far sharper


@pytest.mark.parametrize("name", [name for name in BUILT_IN if method_class(name).source])
def test_published_methods_say_where_and_what_they_were_checked_against(name: str) -> None:
    kind = method_class(name)
    assert kind.venue and kind.licence and kind.checked in (RECORDED_OUTPUTS, DESCRIPTION_ONLY)
    files = {parent.__module__.rpartition(".")[2] for parent in kind.__mro__}  # a variant's are those of its base too
    recorded = [folder.name for folder in (Path(__file__).parent / "golden").iterdir() if folder.name in files]
    assert bool(recorded) == (kind.checked == RECORDED_OUTPUTS)
