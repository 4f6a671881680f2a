"""The README's Python examples run, and its length stays readable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mmtok_cli").symlink_to(ROOT / "mmtok_cli")
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in BLOCKS if "mmtok.load_model" in block)
    exec(compile(block, "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["red", "16 of 576"]
    assert [line.split()[0] for line in said[-3:]] == ["full", "mmtok", "random"]


def test_links_and_length() -> None:
    assert len(README.splitlines()) < 700
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
