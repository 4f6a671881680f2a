"""The note about selections in a data type below float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import refused, run
from tiny_models import FAMILIES

from mmtok_cli.data.samples import Sample
from mmtok_cli.methods.base import Method
from mmtok_cli.precision import FILE, measure_overlaps
from mmtok_cli.settings import CompareSettings


def cases_of(*methods: str, **more: object) -> list:
    from mmtok_cli.configuration import cases_of as made

    return made(CompareSettings.of(methods=list(methods), budget=[12], **more))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_overlaps_count_tokens_that_both_keep(family: str, samples: list[Sample]) -> None:
    model = FAMILIES[family]("sdpa")
    cases = cases_of("mmtok", "divprune", "random", "fastv", "resize")
    assert measure_overlaps(model, cases, samples) is None  # float32 already
    model.model.to(torch.bfloat16)
    found = measure_overlaps(model, cases, samples)
    assert found is not None and found.dtype == "bfloat16" and found.samples == min(4, len(samples))
    by_name = {cases[one.case].name: one for one in found.cases}
    assert set(by_name) == {"mmtok", "divprune", "random"}  # those that select before the language model
    assert by_name["random"].same == by_name["random"].kept > 0
    assert all(0 < one.same <= one.kept for one in found.cases)
    assert measure_overlaps(model, cases_of("mmtok", track="harmonised"), samples) is None


def test_a_method_that_rounds_differently_shows(samples: list[Sample]) -> None:
    """A method whose picks depend on the last bits keeps other tokens in float32."""
    from dataclasses import dataclass, replace

    from mmtok_cli.methods.base import highest

    @dataclass(frozen=True)
    class LastBits(Method):
        """Keeps the tokens with the largest rounding errors."""

        summary = "last bits"

        def select(self, vision, text, budget):  # type: ignore[no-untyped-def]
            third = vision.projected / 3
            return highest((third * 3 - vision.projected).float().abs().sum(-1), vision.eligible, budget)

    model = FAMILIES["llava"]("sdpa")
    model.model.to(torch.bfloat16)
    case = replace(cases_of("divprune")[1], name="last", method=LastBits())
    found = measure_overlaps(model, [case], samples)
    assert found is not None and found.cases[0].same < found.cases[0].kept


def test_compare_says_it_and_keeps_it(tiny_directory: Path, tmp_path: Path) -> None:
    command = ("compare", "--model", tiny_directory, "--methods", "mmtok,random", "--budget", 8, "--limit", 2)
    command += ("--rounds", 1, "--warmup", 0, "--max-new-tokens", 1, "--run-dir", tmp_path / "run")
    shown = run(*command, "--dtype", "bfloat16", "--export", tmp_path / "found.json")
    assert "selections score in bfloat16" in " ".join(shown.stderr.split())
    remarks = json.loads((tmp_path / "found.json").read_text())["remarks"]
    assert any("with the same features in float32 (first 2 samples)" in remark for remark in remarks)
    assert "selections score" in " ".join(run("report", tmp_path / "run").stderr.split())
    (tmp_path / "run" / FILE).write_text("{}")
    refused(run("report", tmp_path / "run"), FILE)
    plain = run(*command[:-1], tmp_path / "plain", "--dtype", "float32")
    assert "selections score" not in " ".join(plain.stderr.split()) and not (tmp_path / "plain" / FILE).exists()
