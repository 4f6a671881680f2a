"""Bad inputs by kind, as tables: a further one is a line. And the files that they are about.

Each table names an input and says how it is made. `bad_inputs` turns the tables into commands, `make_files` writes the
files into a directory, in which the commands then run.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import random
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import numpy as np
import typer.main
from conftest import picture
from PIL import Image

import mmtok_cli
from mmtok_cli.cli.main import app
from mmtok_cli.methods.catalogue import BUILT_IN, method_class
from mmtok_cli.methods.parameters import expected, parameter_types

Value = TypeVar("Value")
DEMO = Path(mmtok_cli.__file__).parent / "demo" / "weights"
HUGE = "1" + "0" * 25
LONG = "x" * 300
ASKED = "Is there a red circle?"

# Arguments with which each command runs to its end; a case adds one thing that is bad.
WORKING: dict[str, tuple[str, ...]] = {
    "infer": ("infer", "photo.png", ASKED, "-b", "16", "--max-new-tokens", "1"),
    "prune": ("prune", "photo.png", ASKED, "-b", "16"),
    "profile": (
        *("profile", "photo.png", ASKED, "-b", "16", "--rounds", "1", "--warmup", "0"),
        *("--max-new-tokens", "1", "--methods", "random"),
    ),
    "compare": (
        *("compare", "--data", "good.jsonl", "-b", "16", "--methods", "random", "--limit", "2", "--rounds", "1"),
        *("--max-new-tokens", "1"),
    ),
    "report": ("report", "saved/good"),
    "models": ("models",),
    "methods": ("methods",),
}


@dataclass(frozen=True)
class BadInput:
    """A command to be refused. says: words that its message must contain."""

    kind: str
    name: str
    arguments: tuple[str, ...]
    says: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    packages: str = ""

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.arguments[0] if self.arguments else 'mmtok'}-{self.name}"


# --- Options -------------------------------------------------------------------------------------------------------

NO_INTEGERS = ("", "abc", "1.5", "-1", "0x10", "nan", "9" * 5000)
NO_NUMBERS = ("", "abc", "nan", "-inf", "inf", "1e400", "-1", "1,5", "9" * 5000)
TOO_LARGE = {
    "--rounds": ("1000000000", HUGE),
    "--runs": ("1000000000", HUGE),
    "--warmup": ("1000000000", HUGE),
    "--limit": ("1000000000000", HUGE),
    "--max-new-tokens": ("1000000000", "100000", HUGE),
    "--new-tokens": ("1000000000", HUGE),
    "--prompt-tokens": ("1000000000", "100000", HUGE),
    "--batch-size": ("1000000000", "999999", HUGE),
    "--layers": ("1000", HUGE),
    "--seed": (HUGE,),
    "--mark": ("100", HUGE),
    "--min-time": ("1e30", "1e9"),
    "--draft-tokens": ("1000000000", HUGE),
    "--max-time": ("1e30", "1e9", "0"),
}
AT_LEAST_ONE = (
    *("--rounds", "--runs", "--limit", "--max-new-tokens", "--layers", "--batch-size", "--top"),
    *("--new-tokens", "--prompt-tokens", "--draft-tokens"),
)
NO_CHOICES = ("", "nosuch", "\x1b[31m[red]", "a\nb")
CHOICES = {
    "--device": ("tpu", "cuda:99", "cpu:x", "CPU", "cuda:-1", "meta"),
    "--dtype": ("int8", "Float32", "float8"),
    "--weights": ("trained", "Random"),
    "--attention": ("flash", "flash_attention_2", "SDPA"),
    "--encoder-attention": ("flash", "flash_attention_2", "SDPA"),
    "--device-map": ("balanced", "auto", "cpu"),
    "--quantization": ("INT8", "int4", "bnb", "fp8"),
    "--track": ("Released", "harmonized"),
    "--turns": ("Reuse", "reselect,keep", ","),
    "--positions": ("drop",),
    "--budget-means": ("average",),
    "--fail-below-stage": ("prefil", "select "),
    "--draft": ("text:", "text: ", " ", "nobody"),
    "--image-size": ("640", "640x", "0x20", "20x0", "99999x20", "axb", "-5x5", "5x5x5", "1e3x5"),
    "--scaling-tokens": ("5", "0", "-4", "576,", "1" * 30, "a,b", "577"),
    "--columns": ("x", "=", "image=", "=x", "nosuch=a", "question=nosuch", "question=a,question=b"),
}
NEEDED_BESIDE = {"--fail-below-stage": ("--fail-below", "1"), "--scaling-tokens": ("--scaling",)}


def options() -> Iterator[BadInput]:
    """Every option that takes a number or one of a few words, with values that are neither."""
    for command, option, kind in _options_of_commands():
        values: tuple[str, ...] = ()
        if option in CHOICES:
            values = NO_CHOICES + CHOICES[option]
        elif kind is int or option == "--batch-size":
            values = NO_INTEGERS + TOO_LARGE.get(option, ()) + (("0",) if option in AT_LEAST_ONE else ())
        elif kind is float:
            values = NO_NUMBERS + TOO_LARGE.get(option, ())
        for value in values:
            arguments = (*WORKING[command], *NEEDED_BESIDE.get(option, ()), f"{option}={value}")
            yield BadInput("option", f"{option[2:]}={_short(value)}", arguments, says=SAYS.get(option, option))


def _options_of_commands() -> Iterator[tuple[str, str, type]]:
    """Command, longest name of an option, type of its value."""
    built = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in app.registered_commands:
        assert command.callback
        name, signature = command.callback.__name__, inspect.signature(command.callback, eval_str=True)
        for parameter in built[name].params:
            longest = max(parameter.opts, key=len)
            if longest.startswith("--") and parameter.name in signature.parameters:
                kind = get_args(signature.parameters[parameter.name].annotation)[0]
                yield name, longest, next((part for part in get_args(kind) if part is not NoneType), kind)


# What a message calls the thing, where that is not the option.
SAYS = {
    "--device": "device",
    "--dtype": "data type",
    "--weights": "weights",
    "--attention": "attention",
    "--encoder-attention": "attention",
    "--device-map": "device",
    "--quantization": "quantization",
    "--draft": "",
    "--track": "track",
    "--positions": "position",
    "--budget-means": "budget",
    "--fail-below-stage": "stage",
    "--scaling-tokens": "vision tokens",
    "--turns": "policy",
    "--columns": "",
    "--batch-size": "batch size",
    "--layers": "layers",
    "--max-new-tokens": "",
}

USAGE: dict[str, tuple[str, ...]] = {
    "no such command": ("nosuch",),
    "no such option": ("--nosuch",),
    "infer without arguments": ("infer",),
    "infer without a question": ("infer", "photo.png"),
    "infer with a third argument": ("infer", "photo.png", ASKED, "more"),
    "prune without arguments": ("prune",),
    "prune without a question": ("prune", "photo.png"),
    "profile with a third argument": ("profile", "photo.png", ASKED, "more"),
    "compare with an argument": ("compare", "photo.png"),
    "report without arguments": ("report",),
    "models with an argument": ("models", "demo"),
    "methods with two arguments": ("methods", "mmtok", "fastv"),
    "an option without its value": ("infer", "photo.png", ASKED, "--budget"),
    "a flag with a value": ("infer", "photo.png", ASKED, "--json=yes"),
    "a short option that is unknown": ("infer", "photo.png", ASKED, "-z"),
    "an option of another command": ("infer", "photo.png", ASKED, "--rounds", "3"),
    "a plot of what is not measured": (*WORKING["compare"], "--plot", "p.png", "--no-quality"),
    "predictions that are not made": (*WORKING["compare"], "--export", "p.jsonl", "--no-quality"),
    "predictions of a profile": (*WORKING["profile"], "--export", "p.jsonl"),
    "a plot of scaling without it": (*WORKING["profile"], "--plot", "p.png"),
    "sizes of scaling without it": (*WORKING["profile"], "--scaling-tokens", "576"),
    "a stage to check without a bound": (*WORKING["compare"], "--fail-below-stage", "prefill"),
    "resume without a run": ("compare", "--resume"),
    "turns of data without conversations": (*WORKING["compare"], "--turns", "reuse"),
    "turns of the demo's single questions": (*WORKING["compare"], "--data", "demo", "--turns", "reuse"),
    "turns without quality": (*WORKING["compare"], "--data", "demo:conversations", "--turns", "reuse", "--no-quality"),
    "turns with exact prompts": (*WORKING["compare"], "--turns", "reuse", "--prompt-tokens", "50"),
    "turns with a search": (*WORKING["compare"], "--turns", "reuse", "--retain", "98%"),
    "turns with a part of the model": (*WORKING["compare"], "--turns", "reuse", "--layers", "1"),
    "encoding again without turns": (*WORKING["compare"], "--encode-again"),
    "encoding again with one selection": (*WORKING["compare"], "--turns", "reuse", "--encode-again"),
    "the length of no draft": (*WORKING["compare"], "--draft-tokens", "3"),
    "the length of no draft, infer": (*WORKING["infer"], "--draft-tokens", "3"),
    "a union inside the language model": (
        *(*WORKING["compare"], "--data", "demo:conversations", "--turns", "reuse,union", "--methods", "fastv"),
    ),
    "a union inside the language model, infer": (
        *(*WORKING["infer"], "--turn", ASKED, "--turns", "union", "--method", "fastv"),
    ),
    "a policy without turns": (*WORKING["infer"], "--turns", "union"),
    "encoding again without turns, infer": (*WORKING["infer"], "--encode-again"),
    "encoding again with one selection, infer": (*WORKING["infer"], "--turn", "And now?", "--encode-again"),
    "an empty turn": (*WORKING["infer"], "--turn", ""),
    "an undecodable turn": (*WORKING["infer"], "--turn", "a\udcffb"),
    "a marker in a turn": (*WORKING["infer"], "--turn", "<image>?"),
    "a turn longer than the context": (*WORKING["infer"], "--turn", "word " * 3000),
    "a conversation longer than the context": (*WORKING["infer"], *(("--turn", "word " * 700) * 3)),
    "conversations of other data": ("compare", "--data", "demo:nosuch"),
    "more samples in a batch than there are": (*WORKING["compare"], "--batch-size", "3"),
    "an answer longer than the context": (*WORKING["compare"], "--max-new-tokens", "2048"),
    "an answer longer than the context, infer": (*WORKING["infer"], "--max-new-tokens", "2048"),
    "an answer longer than the context, profile": (*WORKING["profile"], "--max-new-tokens", "2048"),
    "compiling a part of a model": ("compare", "--compile", "--layers", "1"),
    "compiling without a warm-up": (*WORKING["profile"], "--compile"),
    "compiling a method inside the language model": ("compare", "--compile", "--methods", "fastv", "--limit", "2"),
    "bitsandbytes without stored weights": ("compare", "--weights", "random", "--quantization", "bnb-4bit"),
    "a maximum and an exact number of new tokens": (*WORKING["compare"], "--new-tokens", "2"),
    "the same, profile": (*WORKING["profile"], "--new-tokens", "2"),
    "more new tokens than the context holds": ("compare", "--limit", "2", "--new-tokens", "2048"),
    "the same with a padded prompt": ("profile", "--prompt-tokens", "1400", "--new-tokens", "100"),
    "a prompt shorter than its question": (*WORKING["compare"], "--prompt-tokens", "5"),
    "a prompt shorter than its question, profile": (*WORKING["profile"], "--prompt-tokens", "5"),
}

# --- Budgets, methods, parameters, questions -----------------------------------------------------------------------

BUDGETS = (
    *("", " ", "0", "0%", "00", "0.0%", "-1", "-5%", "1.5", "abc", "101%", "100.1%", "1e2", "nan", "inf", "%", "10%%"),
    *("٣", "１０", "64;16", "64 16", "1/2", "0x40", "577", "1000000", HUGE, "9" * 5000, "0.0001%", "1" * 30 + "%"),
    *("10 %x", "64tokens", "\x1b[31m", "[red]", "+5", "10%,", "full", "0.1"),
)
METHODS = (
    *("", " ", "mmtk", "nosuch", "MMTok", "mmtok:", ":text", "mmtok:nosuch", "mmtok.text", "../mmtok", "[red]"),
    *("\x1b[31mmmtok", "mmtok\nfull", "a" * 5000, "random;full", "os:system", "mmtok_cli.methods.full:Full", "√"),
)
SETTINGS = (
    *("", "=", "x", "mmtok", "mmtok.", ".alpha=1", "mmtok.alpha", "mmtok.alpha=", "=1", "mmtok=1", "mmtok.nosuch=1"),
    *("nosuch.alpha=1", "fastv.layer=3", "mmtok.__class__=1", "mmtok.seed=1", "[red]=1", "mmtok.alpha=\x1b[31m"),
    *("mmtok.alpha=1=2", "mmtok..alpha=1", "mmtok.alpha.x=1", "mmtok:text.alpha=0.5"),
)
NO_VALUES = {
    "a whole number": ("abc", "1.5", "nan", HUGE, "-1"),
    "a number": ("abc", "nan", "inf", "1e400", "1,5"),
    "true or false": ("abc", "2", "nan"),
}
QUESTIONS = {
    "empty": "",
    "space": "   ",
    "line end": "\n",
    "tab": "\t",
    "undecodable": "a\udcffb",
    "two markers": "<image> and <image>?",
    "longer than the context": "word " * 3000,
    "50 MB": "word " * 10_000_000,
    "50 MB without spaces": "x" * 50_000_000,
}


def with_commands(inputs: Iterable[Value]) -> Iterator[tuple[str, Value]]:
    """Each input with `infer` and with one of the others in turn, since all of them would take too long."""
    for one, other in zip(inputs, cycle(("prune", "profile", "compare"))):
        yield from (("infer", one), (other, one))


def budgets() -> Iterator[BadInput]:
    for command, text in with_commands(BUDGETS):
        says = "less than one" if text == "0.0001%" else "budget"
        yield BadInput("budget", _short(text), (*WORKING[command], f"--budget={text}"), says=says)


def methods() -> Iterator[BadInput]:
    for command, text in with_commands(METHODS):
        arguments = (*WORKING[command], f"--method={text}")
        yield BadInput("method", _short(text), arguments, says="no method")
    for text in METHODS[2:]:
        yield BadInput("method", _short(text), ("methods", text), says="no method")


def parameters() -> Iterator[BadInput]:
    for command, text in with_commands(SETTINGS):
        yield BadInput("parameter", _short(text), (*WORKING[command], "--method=mmtok", f"--set={text}"))
    for method in BUILT_IN:
        for name, kind in parameter_types(method_class(method)).items():
            if name == "seed":
                continue  # any integer is one
            for value in NO_VALUES.get(expected(kind).removesuffix(" or none"), ("", "abc", "nan")):
                text = f"{method}.{name}={value}"
                arguments = (*WORKING["infer"], f"--method={method}", f"--set={text}")
                yield BadInput("parameter", _short(text), arguments)


def questions() -> Iterator[BadInput]:
    for name, text in QUESTIONS.items():
        for command in ("infer",) if len(text) > 10**6 else ("infer", "prune", "profile"):
            yield BadInput("question", name, (command, "photo.png", text, *WORKING[command][3:]))
        if name != "two markers":  # which is a matter of each sample
            arguments = (*WORKING["compare"], "--data=pictures", f"--question={text}")
            yield BadInput("question", name, arguments)


# --- Images --------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def noise(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


PHOTO = picture(120, 80, 4)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
MAGIC = {
    "PNG": b"\x89PNG\r\n\x1a\n",
    "JPEG": b"\xff\xd8\xff\xe0",
    "WEBP": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
    "GIF": b"GIF89a",
    "TIFF": b"II*\x00",
    "BMP": b"BM",
}
BROKEN_EXIF = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x05\xff\xff\xff\xff\xff\xff\xff\xf0"

IMAGES: dict[str, bytes | Callable[[Path], object]] = {
    "empty.png": b"",
    "one-byte.png": b"\x89",
    "text.jpg": b"this is not a picture",
    "page.jpg": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
    "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "document.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "archive.png": b"PK\x03\x04" + noise(99),
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "phone.heic": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
    "plain.ppm": b"P6 2 2 255 " + noise(12),
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "huge.png": png_header(60000, 60000),
    "enormous.png": png_header(2**31 - 1, 2**31 - 1),
    "zero.png": png_header(0, 0),
    "no-data.png": png_header(100, 100),
    "odd-depth.png": png_header(9, 9, depth=5),
    "odd-colour.png": png_header(9, 9, colour=99),
    "float.tif": encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
    "deep.tif": encoded(Image.fromarray(np.full((9, 9), 70000, np.int32)), "TIFF"),
    "negative.tif": encoded(Image.fromarray(np.full((9, 9), -1, np.int32)), "TIFF"),
    "bad-crc.png": encoded(PHOTO, "PNG").replace(b"IDAT", b"IDAX", 1),
    "directory.png": lambda path: path.mkdir(),
    "fifo.png": os.mkfifo,
    "socket.png": lambda path: _socket(path),
    "zeros.png": lambda path: path.symlink_to("/dev/zero"),
    "null.png": lambda path: path.symlink_to("/dev/null"),
    "random.png": lambda path: path.symlink_to("/dev/urandom"),
    "terminal.png": lambda path: path.symlink_to("/dev/tty"),
    "memory.png": lambda path: path.symlink_to("/proc/self/mem"),
    "broken-link.png": lambda path: path.symlink_to("nowhere.png"),
    "loop.png": lambda path: path.symlink_to("loop.png"),
    "link-to-fifo.png": lambda path: path.symlink_to("fifo.png"),
    "link-to-directory.png": lambda path: path.symlink_to("directory.png"),
    "forbidden.png": lambda path: _forbidden(path, encoded(PHOTO, "PNG")),
    **{f"noise.{kind.lower()}": MAGIC[kind] + noise(500) for kind in FORMATS},
    **{f"tenth.{kind.lower()}": encoded(PHOTO, kind)[: len(encoded(PHOTO, kind)) // 10] for kind in FORMATS},
    **{f"half.{kind.lower()}": encoded(PHOTO, kind)[: len(encoded(PHOTO, kind)) // 2] for kind in FORMATS},
}
NO_IMAGE_FILES = {
    "missing": "images/missing.png",
    "no name": "",
    "a name of 300 letters": LONG + ".png",
    "a path of 5000 letters": "x/" * 2500 + "a.png",
    "somebody's home": "~nobody/a.png",
    "nobody's home": "~nosuchuser/a.png",
    "below a file": "photo.png/a.png",
    "in a forbidden directory": "closed/a.png",
    "a URL": "https://example.com/a.png",
    "a file URL": "file:///etc/passwd",
    "a pattern": "images/*.png",
    "a dash": "-",
    "the standard input": "/dev/stdin",
    "a hostile name": "images/\x1b[31mred\x1b[0m.png",
    "a name on two lines": "images/a\nerror: b.png",
    "a reversed name": "images/\u202egnp.exe",
    "an undecodable name": "images/a\udcff.png",
    "a name of markup": "images/[red]a[/red].png",
}
# To be read all the same.
GOOD_IMAGES: dict[str, bytes | Callable[[Path], object]] = {
    "really-a-jpeg.png": encoded(PHOTO, "JPEG"),
    "no-suffix": encoded(PHOTO, "PNG"),
    "animated.gif": encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
    "animated.webp": encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
    "animated.png": encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(180)]),
    "print.jpg": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "grey-16.png": encoded(Image.fromarray(np.full((80, 120), 32768, np.uint16)), "PNG"),
    "palette.png": encoded(PHOTO.convert("P"), "PNG", transparency=0),
    "grey-alpha.png": encoded(PHOTO.convert("LA"), "PNG"),
    "bits.png": encoded(PHOTO.convert("1"), "PNG"),
    "progressive.jpg": encoded(PHOTO, "JPEG", progressive=True),
    "lab.tif": encoded(Image.new("LAB", (120, 80), (120, 40, 40)), "TIFF"),
    "broken-exif.jpg": encoded(PHOTO, "JPEG", exif=BROKEN_EXIF),
    "short-exif.jpg": encoded(PHOTO, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05"),
    "no-exif.jpg": encoded(PHOTO, "JPEG", exif=b"Exif\x00\x00garbage"),
    "[1] é 红 .png": encoded(PHOTO, "PNG"),
    "link.png": lambda path: path.symlink_to("no-suffix"),
}


def images() -> Iterator[BadInput]:
    files = {name: f"images/{name}" for name in IMAGES} | NO_IMAGE_FILES
    for command, (name, path) in with_commands(files.items()):
        says = Path(path).name if path.startswith("images/") and path.isprintable() else ""
        if command != "compare":
            yield BadInput("image", name, (command, path, *WORKING[command][2:]), says=says)
        elif path:
            yield BadInput("image", f"{name} as --image", (*WORKING["infer"], f"--image={path}"), says=says)


# --- Data files ----------------------------------------------------------------------------------------------------


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def row(**changes: object) -> dict[str, object]:
    whole = {"image": "photo.png", "question": ASKED, "answer": "yes"} | changes
    return {name: value for name, value in whole.items() if value is not ...}


DATA: dict[str, bytes | Callable[[Path], object]] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\t\n",
    "text.jsonl": b"What is it?\n",
    "cut.jsonl": lines(row())[:-9],
    "array.jsonl": b"[1, 2]\n",
    "number.jsonl": b"3\n",
    "null.jsonl": b"null\n",
    "string.jsonl": b'"a"\n',
    "deep.jsonl": b"[" * 100_000 + b"]" * 100_000,
    "deep-object.jsonl": b'{"image": ' + b"[" * 100_000,
    "latin-1.jsonl": '{"image": "photo.png", "question": "déjà?"}'.encode("latin-1"),
    "binary.jsonl": noise(5000),
    "really-a-png.jsonl": encoded(PHOTO, "PNG"),
    "no-image.jsonl": lines(row(image=...)),
    "null-image.jsonl": lines(row(image=None)),
    "number-image.jsonl": lines(row(image=3)),
    "true-image.jsonl": lines(row(image=True)),
    "empty-image.jsonl": lines(row(image="")),
    "no-images.jsonl": lines(row(image=[])),
    "nested-images.jsonl": lines(row(image=[["photo.png"]])),
    "object-image.jsonl": lines(row(image={"path": "photo.png"})),
    "base64-image.jsonl": lines(row(image="iVBORw0KGgo" + "A" * 5000)),
    "data-url.jsonl": lines(row(image="data:image/png;base64,iVBORw0KGgo" + "A" * 5000)),
    "url.jsonl": lines(row(image="https://example.com/a.png")),
    "missing-images.jsonl": lines(row(image="a.png"), row(image="b.png")),
    "nul-image.jsonl": lines(row(image="a\0b.png")),
    "long-image.jsonl": lines(row(image=LONG + ".png")),
    "home-image.jsonl": lines(row(image="~nobody/a.png")),
    "surrogate-image.jsonl": b'{"image": "a\\udcff.png", "question": "What?"}\n',
    "directory-image.jsonl": lines(row(image="images")),
    "fifo-image.jsonl": lines(row(image="images/fifo.png")),
    "zeros-image.jsonl": lines(row(image="images/zeros.png")),
    "damaged-image.jsonl": lines(row(image="images/half.png")),
    "no-question.jsonl": lines(row(question=...)),
    "null-question.jsonl": lines(row(question=None)),
    "empty-question.jsonl": lines(row(question="")),
    "blank-question.jsonl": lines(row(question="  \n")),
    "list-question.jsonl": lines(row(question=["What?"])),
    "surrogate-question.jsonl": b'{"image": "photo.png", "question": "a\\udcff"}\n',
    "long-question.jsonl": lines(row(question="word " * 3000)),
    "50-mb-question.jsonl": lines(row(question="word " * 10_000_000)),
    "object-answer.jsonl": lines(row(answer={"text": "yes"})),
    "nested-answers.jsonl": lines(row(answers=[["yes"], ["no"], ["no"]])),
    "list-id.jsonl": lines(row(id=[1])),
    "list-kind.jsonl": lines(row(kind=[1])),
    "two-markers.jsonl": lines(row(question="<image> or <image>?")),
    "no-questions.jsonl": lines(row(question=..., questions=[])),
    "text-questions.jsonl": lines(row(question=..., questions="What?")),
    "null-questions.jsonl": lines(row(question=..., questions=[None, None])),
    "nested-questions.jsonl": lines(row(question=..., questions=[["What?"], ["Where?"]])),
    "more-questions-than-answers.jsonl": lines(row(question=..., questions=["What?", "Where?"], answers=["a"])),
    "one-answer-to-questions.jsonl": lines(row(question=..., questions=["What?", "Where?"])),
    "empty-conversation.jsonl": lines({"image": "photo.png", "conversations": []}),
    "text-conversation.jsonl": lines({"image": "photo.png", "conversations": "What?"}),
    "conversation-without-text.jsonl": lines({"image": "photo.png", "conversations": [{"from": "human"}] * 2}),
    "directory.jsonl": lambda path: path.mkdir(),
    "fifo.jsonl": os.mkfifo,
    "socket.jsonl": lambda path: _socket(path),
    "fifo.json": os.mkfifo,
    "zeros.csv": lambda path: path.symlink_to("/dev/zero"),
    "zeros.jsonl": lambda path: path.symlink_to("/dev/zero"),
    "null-device.jsonl": lambda path: path.symlink_to("/dev/null"),
    "broken-link.jsonl": lambda path: path.symlink_to("nowhere.jsonl"),
    "loop.jsonl": lambda path: path.symlink_to("loop.jsonl"),
    "forbidden.jsonl": lambda path: _forbidden(path, lines(row())),
}
NO_DATA = {
    "missing": "nothing.jsonl",
    "missing without suffix": "nosuch",
    "no name": "",
    "space": " ",
    "a name of 300 letters": LONG + ".jsonl",
    "a path of 5000 letters": "x/" * 2500 + "a.jsonl",
    "nobody's home": "~nosuchuser/a.jsonl",
    "below a file": "photo.png/a.jsonl",
    "in a forbidden directory": "closed/a.jsonl",
    "an empty folder": "empty",
    "a forbidden folder": "closed",
    "a folder without images": "data",
    "images without a question": "pictures",
    "a pattern that matches nothing": "pictures/*.webp",
    "a pattern that is not closed": "pictures/[",
    "a pattern with misplaced stars": "pictures/**x/*.png",
    "a missing image": "pictures/nosuch.png",
    "an image below a file": "photo.png/a.png",
    "an image with a name of 300 letters": LONG + ".png",
    "an image that is a pipe": "images/fifo.png",
    "a missing file in a folder with brackets": "more [2024]/nosuch.jsonl",
    "a pattern of data": "data/*.jsonl",
    "vqav2 without a file": "vqav2:",
    "vqav2 with a missing file": "vqav2:nosuch.json",
    "vqav2 with three files": "vqav2:good.json,good.json,good.json",
    "vqav2 with another file": "vqav2:good.json",
    "a device": "/dev/zero",
    "a table that is a device": "data/zeros.csv",
    "a pipe of JSON": "data/fifo.json",
    "pope with a pipe": "pope:data/fifo.jsonl",
    "pope without a file": "pope:",
    "pope with a missing file": "pope:nosuch.jsonl",
    "pope with another file": "pope:good.jsonl",
    "pope with an image": "pope:photo.png",
    "hub without a name": "hub:",
    "hub with a missing dataset": "hub:nobody/nosuch",
    "hub with too many parts": "hub:a:b:c:d",
    "hub with an empty folder": "hub:empty",
    "hub with a hostile name": "hub:../../etc",
    "another scheme": "ftp:nosuch",
    "a URL": "https://example.com/a.jsonl",
    "a model": "models/good",
    "a run": "saved/good",
}
DATA_OPTIONS: dict[str, tuple[str, ...]] = {
    "missing image root": ("--image-root=nosuch",),
    "a file as image root": ("--image-root=photo.png",),
    "an empty image root": ("--image-root=empty",),
    "a long image root": (f"--image-root={LONG}",),
    "a question for questions": ("--question=What?",),
    "an empty question": ("--question=",),
    "a template for images without questions": ("--data=pictures", "--question=Say: {question}"),
    "a question for the demo": ("--data=demo", "--question=What?"),
    "columns for the demo": ("--data=demo", "--columns=image=picture"),
    "columns that do not exist": ("--columns=question=nosuch",),
    "columns of the wrong type": ("--columns=image=answer",),
}


ABOUT_A_SAMPLE = ("damaged-image", "long-question", "50-mb-question", "two-markers")  # the message names no file


def data() -> Iterator[BadInput]:
    for name in DATA:
        says = "" if _stem(name) in ABOUT_A_SAMPLE else _stem(name)
        yield BadInput("data", name, (*WORKING["compare"], f"--data=data/{name}", "--image-root=."), says=says)
    for name, text in NO_DATA.items():
        yield BadInput("data", name, (*WORKING["compare"], f"--data={text}"))
    for name, arguments in DATA_OPTIONS.items():
        yield BadInput("data", name, (*WORKING["compare"], *arguments))


# --- Models --------------------------------------------------------------------------------------------------------

REMOVED = object()
CONFIG, TOKENIZER, PROCESSOR = "config.json", "tokenizer_config.json", "processor_config.json"
TEMPLATE, WEIGHTS = "chat_template.jinja", "model.safetensors"

# The file, the field and what it is set to.
MODEL_FIELDS: tuple[tuple[str, str, object], ...] = (
    *((CONFIG, "model_type", value) for value in (None, REMOVED, 3, "", "bert", "nosuch", [])),
    *((CONFIG, "text_config", value) for value in (None, REMOVED, 3, "x", [])),
    *((CONFIG, "vision_config", value) for value in (None, REMOVED, 3, "x", [])),
    *((CONFIG, "text_config.hidden_size", value) for value in (None, 0, -1, "x", 1.5, 10**12, 127)),
    *((CONFIG, "text_config.num_attention_heads", value) for value in (None, 0, -1, "x", 3)),
    *((CONFIG, "text_config.num_hidden_layers", value) for value in (None, 0, -1, "x", 10**9, 5)),
    *((CONFIG, "text_config.vocab_size", value) for value in (None, 0, -1, "x", 10**12, 10)),
    *((CONFIG, "text_config.max_position_embeddings", value) for value in (None, 0, -1, "x")),
    *((CONFIG, "text_config.hidden_act", value) for value in (None, "nosuch", 3)),
    *((CONFIG, "text_config.rope_parameters", value) for value in (3, "x", {"rope_type": "nosuch"})),
    *((CONFIG, "vision_config.patch_size", value) for value in (None, 0, -1, "x", 10**9)),
    *((CONFIG, "vision_config.image_size", value) for value in (None, 0, -1, "x", 10**9)),
    *((CONFIG, "image_token_index", value) for value in (None, -1, "x", 10**9)),
    *((CONFIG, "vision_feature_layer", value) for value in ("x", 99)),
    *((CONFIG, "dtype", value) for value in ("nosuch", 3)),
    *((CONFIG, "quantization_config", value) for value in ({"quant_method": "nosuch"}, 3)),
    *((PROCESSOR, "image_token", value) for value in (3, [])),
    *((PROCESSOR, "patch_size", value) for value in (0, "x")),
    *((PROCESSOR, "image_processor.crop_size", value) for value in (0, -1, "x", {"height": 0, "width": 0})),
    *((PROCESSOR, "processor_class", value) for value in ("NoSuch", 3)),
    *((TOKENIZER, "tokenizer_class", value) for value in (3, [])),
)
# The file and its whole content; None removes it.
MODEL_FILES: dict[str, tuple[str, bytes | Callable[[Path], object] | None]] = {
    **{f"{file} missing": (file, None) for file in (CONFIG, "tokenizer.json", WEIGHTS)},
    **{f"{file} empty": (file, b"") for file in (CONFIG, "tokenizer.json", TOKENIZER, PROCESSOR, TEMPLATE, WEIGHTS)},
    **{f"{file} cut": (file, b'{"a": ') for file in (CONFIG, "tokenizer.json", TOKENIZER, PROCESSOR)},
    **{f"{file} an array": (file, b"[]") for file in (CONFIG, "tokenizer.json", TOKENIZER, PROCESSOR)},
    **{f"{file} a number": (file, b"3") for file in (CONFIG, "tokenizer.json", TOKENIZER, PROCESSOR)},
    **{f"{file} binary": (file, noise(999)) for file in (CONFIG, "tokenizer.json", TOKENIZER, PROCESSOR, WEIGHTS)},
    **{f"{file} a directory": (file, lambda path: path.mkdir()) for file in (CONFIG, "tokenizer.json", WEIGHTS)},
    **{f"{file} forbidden": (file, lambda path: _forbidden(path, b"{}")) for file in (CONFIG, "tokenizer.json")},
    **{f"{file} a pipe": (file, os.mkfifo) for file in (CONFIG, "tokenizer.json", WEIGHTS)},
    "weights cut": (WEIGHTS, (DEMO / WEIGHTS).read_bytes()[:100_000]),
    "weights without tensors": (WEIGHTS, struct.pack("<Q", 2) + b"{}"),
    "weights with a huge header": (WEIGHTS, struct.pack("<Q", 2**60) + b"{}"),
    "template with an error": (TEMPLATE, b"{% if %}"),
    "template that raises": (TEMPLATE, b"{{ raise_exception('no') }}"),
    "template of an unknown name": (TEMPLATE, b"{{ nosuch.nosuch }}"),
    "template without an image": (TEMPLATE, b"{{ messages[0]['role'] }}"),
    "template with two images": (TEMPLATE, b"<image><image> {{ messages[0]['role'] }}"),
    "template that escapes": (TEMPLATE, b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template that never ends": (
        TEMPLATE,
        b"{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
    ),
}
NO_MODELS = {
    "no name": "",
    "space": " ",
    "near a known one": "llava-1.5-7",
    "a missing directory": "./nowhere/at/all",
    "a missing absolute directory": "/nowhere/at/all",
    "nobody's home": "~nosuchuser/model",
    "a hub id that is not here": "nobody/has-this-model",
    "a hostile hub id": "../etc",
    "a hub id of three parts": "a/b/c",
    "a file": "photo.png",
    "a pipe": "images/fifo.png",
    "an empty directory": "empty",
    "a forbidden directory": "closed",
    "a directory of images": "pictures",
    "a run directory": "saved/good",
    "a name of 300 letters": LONG,
    "a path of 5000 letters": "x/" * 2500,
    "escape sequences": "\x1b[31mred",
    "markup": "[red]x[/red]",
    "two lines": "a\nb",
    "undecodable": "a\udcff",
    "a URL": "https://huggingface.co/llava-hf/llava-1.5-7b-hf",
}


def models() -> Iterator[BadInput]:
    for name in (*(_field_name(*each) for each in MODEL_FIELDS), *MODEL_FILES):
        arguments = (*WORKING["infer"], f"--model=models/{_directory(name)}")
        yield BadInput("model", name, arguments, says=_directory(name))
    for command, (name, text) in with_commands(NO_MODELS.items()):
        yield BadInput("model", name, (*WORKING[command], f"--model={text}"))


# --- Run directories -----------------------------------------------------------------------------------------------

PLAN, ROUND, PREDICTIONS = "plan.json", "rounds/00000-001.json", "predictions/000000.json"
RUN_FIELDS: tuple[tuple[str, str, object], ...] = (
    *((PLAN, "schema", value) for value in (None, "mmtok.plan/99", "other/1", 3)),
    *((PLAN, "cases", value) for value in (None, REMOVED, [], {}, "x", [3])),
    *((PLAN, "samples", value) for value in (None, REMOVED, -1, 0, "x", 10**10)),
    *((PLAN, "rounds", value) for value in (None, REMOVED, -1, 0, "x", 10**10)),
    *((PLAN, "timed", value) for value in (-1, "x", 10**10)),
    *((PLAN, "seed", value) for value in (None, -1, "x")),
    *((PLAN, "order", value) for value in (None, "x", [["x"]])),
    *((PLAN, "environment", value) for value in (None, REMOVED, {}, 3)),
    *((PLAN, "rules.track", value) for value in (None, "nosuch", 3)),
    *((PLAN, "model", value) for value in (None, REMOVED, 3)),
    *((PLAN, "quality", value) for value in (None, "x")),
    *((PLAN, "nosuch", value) for value in (3,)),
    *((ROUND, "case", value) for value in (None, REMOVED, -1, 99, "x")),
    *((ROUND, "round", value) for value in (None, -1, "x", 10**10)),
    *((ROUND, "key", value) for value in (None, REMOVED, "other", 3)),
    *((ROUND, "seconds", value) for value in (None, REMOVED, {}, 3)),
    *((ROUND, "seconds.total", value) for value in (None, REMOVED, 0, -1, "x", float("nan"), float("inf"))),
    *((ROUND, "seconds.prefill", value) for value in (None, REMOVED, -1, "x", float("nan"))),
    *((ROUND, "tokens", value) for value in (None, REMOVED, [], 3)),
    *((ROUND, "answers", value) for value in (None, REMOVED, 3)),
    *((ROUND, "kv_cache", value) for value in (None, REMOVED, -1, "x")),
    *((ROUND, "steps", value) for value in (None, REMOVED, -1, "x")),
    *((PREDICTIONS, "key", value) for value in (None, REMOVED, "other")),
    *((PREDICTIONS, "samples", value) for value in (None, REMOVED, 3)),
    *((PREDICTIONS, "predictions", value) for value in (None, REMOVED, 3)),
    *((PREDICTIONS, "predictions.0.case", value) for value in (None, REMOVED, 99, -1, "x")),
    *((PREDICTIONS, "predictions.0.score", value) for value in (2, -1, "x", float("nan"))),
)
RUN_FILES: dict[str, tuple[str, bytes | Callable[[Path], object] | None]] = {
    "no plan": (PLAN, None),
    "no rounds": ("rounds", None),
    **{f"{file} empty": (file, b"") for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} cut": (file, b'{"schema": "mm') for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} binary": (file, noise(999)) for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} an array": (file, b"[]") for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} deep": (file, b"[" * 100_000) for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} a directory": (file, lambda path: path.mkdir()) for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} a pipe": (file, os.mkfifo) for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} forbidden": (file, lambda path: _forbidden(path, b"{}")) for file in (PLAN, ROUND, PREDICTIONS)},
    **{f"{file} /dev/zero": (file, lambda path: path.symlink_to("/dev/zero")) for file in (PLAN, ROUND, PREDICTIONS)},
}
NO_RUNS = {
    "missing": "nosuch",
    "no name": "",
    "a file": "photo.png",
    "an empty directory": "empty",
    "a forbidden directory": "closed",
    "a directory of images": "pictures",
    "a model": "models/good",
    "a pipe": "images/fifo.png",
    "a plan": "saved/good/plan.json",
    "a name of 300 letters": LONG,
    "a path of 5000 letters": "x/" * 2500,
    "nobody's home": "~nosuchuser/run",
    "escape sequences": "\x1b[31mred",
    "two lines": "a\nb",
    "undecodable": "a\udcff",
}
RUN_USES: dict[str, tuple[str, ...]] = {
    "the same run twice": ("report", "saved/good", "saved/good"),
    "the same run twice, spelled otherwise": ("report", "saved/good", "saved/../saved/good"),
    "a good run and a missing one": ("report", "saved/good", "nosuch"),
    "resume with another budget": (*WORKING["compare"], "--resume", "--run-dir=saved/good", "--budget=8"),
    "resume with another method": (*WORKING["compare"], "--resume", "--run-dir=saved/good", "--methods=uniform"),
    "resume with other data": (*WORKING["compare"], "--resume", "--run-dir=saved/good", "--data=demo"),
    "a new run in a run directory": (*WORKING["compare"], "--run-dir=saved/good"),
    "a new run in a file": (*WORKING["compare"], "--run-dir=photo.png"),
    "a new run below a file": (*WORKING["compare"], "--run-dir=photo.png/run"),
    "a new run in a forbidden directory": (*WORKING["compare"], "--run-dir=closed/run"),
    "a new run under a long name": (*WORKING["compare"], f"--run-dir={LONG}"),
    "a new run in a device": (*WORKING["compare"], "--run-dir=/dev/null"),
    "a new run in a pipe": (*WORKING["compare"], "--run-dir=images/fifo.png"),
}


def runs() -> Iterator[BadInput]:
    for name in (*(_field_name(*each) for each in RUN_FIELDS), *RUN_FILES):
        path = f"saved/{_directory(name)}"
        yield BadInput("run", name, ("report", path), says=_directory(name))
        if name.startswith(PLAN) or (name in RUN_FILES and name != "no rounds"):  # which are measured again
            yield BadInput("run", name, ("compare", "--resume", f"--run-dir={path}"), says=_directory(name))
    for name, path in NO_RUNS.items():
        yield BadInput("run", name, ("report", path))
        yield BadInput("run", name, ("compare", "--resume", f"--run-dir={path}"))
    for name, arguments in RUN_USES.items():
        yield BadInput("run", name, arguments)


# --- Outputs -------------------------------------------------------------------------------------------------------

OUTPUTS = {  # options that name a file to be written, and what must come with them
    ("infer", ""): (),
    ("prune", "--output"): (),
    ("prune", "--gain-curve"): ("--method=mmtok",),
    ("profile", "--export"): (),
    ("profile", "--plot"): ("--scaling", "--scaling-tokens=576"),
    ("compare", "--export"): (),
    ("compare", "--plot"): (),
    ("report", "--export"): (),
}
SUFFIX = {"--output": "png", "--gain-curve": "svg", "--plot": "png", "--export": "json"}
NO_OUTPUTS = {  # {0}: the suffix of a format that the option takes
    "no name": "",
    "no suffix": "out",
    "another suffix": "out.xyz",
    "a suffix alone": ".{0}",
    "a directory": "folder.{0}",
    "a pipe": "pipe.{0}",
    "a socket": "socket.{0}",
    "below a file": "photo.png/out.{0}",
    "in a forbidden directory": "closed/out.{0}",
    "in a read-only directory": "read-only/out.{0}",
    "in /proc": "/proc/out.{0}",
    "in a device": "/dev/null/out.{0}",
    "a name of 300 letters": LONG + ".{0}",
    "a path of 5000 letters": "x/" * 2500 + "out.{0}",
    "a loop of links": "loop.{0}",
}
INPUTS_OVERWRITTEN: dict[str, tuple[str, ...]] = {
    "the image": (*WORKING["prune"], "--output=photo.png"),
    "the image, spelled otherwise": (*WORKING["prune"], "--output=./pictures/../photo.png"),
    "the image behind a link": (*WORKING["prune"], "--output=link-to-photo.png"),
    "another name of the image": (*WORKING["prune"], "--output=second-name.png"),
    "two outputs of prune": (*WORKING["prune"], "--method=mmtok", "--output=a.png", "--gain-curve=a.png"),
    "two outputs of compare": (*WORKING["compare"], "--export=a.json", "--export=./a.json"),
    "the image by a plot": (*WORKING["profile"], "--scaling", "--scaling-tokens=576", "--plot=photo.png"),
    "the data": ("compare", "--data=good.json", *WORKING["compare"][3:], "--export=good.json"),
    "an image of the data": (*WORKING["compare"], "--plot=photo.png"),
    "the model's configuration": (*WORKING["compare"], "--model=models/good", "--export=models/good/config.json"),
    "the model's tokenizer": (*WORKING["profile"], "--model=models/good", "--export=models/good/tokenizer.json"),
    "the plan of the run": ("report", "saved/good", "--export=saved/good/plan.json"),
    "the result of the run": ("report", "saved/good", "--export=saved/good/comparison.json"),
    "a measurement of the run": ("report", "saved/good", f"--export=saved/good/{ROUND}"),
    "the plan of another run": (*WORKING["compare"], "--export=saved/good/plan.json"),
}


def outputs() -> Iterator[BadInput]:
    for (command, option), needed in OUTPUTS.items():
        if not option:
            continue
        for name, text in NO_OUTPUTS.items():
            arguments = (*WORKING[command], *needed, f"{option}={text.format(SUFFIX[option])}")
            yield BadInput("output", f"{option[2:]} {name}", arguments, says=option)
    for name in ("a name of 300 letters", "below a file", "in a forbidden directory", "in /proc"):
        path = NO_OUTPUTS[name].format("d")
        yield BadInput("output", f"trace-dir {name}", (*WORKING["profile"], f"--trace-dir={path}"), says="--trace-dir")
    yield BadInput("output", "trace-dir a file", (*WORKING["profile"], "--trace-dir=photo.png"), says="--trace-dir")
    for name, arguments in INPUTS_OVERWRITTEN.items():
        yield BadInput("output", f"over {name}", arguments)


# --- Environment and packages --------------------------------------------------------------------------------------

VARIABLES = {  # an empty one counts as unset
    "MMTOK_MODEL": (" ", "nosuch", "./nowhere", "\x1b[31m", LONG, "~nosuchuser/m"),
    "MMTOK_DEVICE": (" ", "tpu", "cuda:99", "CPU", "\x1b[31m", "a\nb"),
    "MMTOK_DTYPE": (" ", "int8", "Float32", "\x1b[31m", "a\nb"),
}
BROKEN_METHOD = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from mmtok_cli.methods.base import Method
from mmtok_cli.tokens import Selection

@dataclass(frozen=True)
class Broken(Method):
    '''Returns what it must not.'''

    summary: ClassVar[str] = "broken"

    def select(self, vision, text, budget):
        some = torch.arange(budget)
        {}
"""
SELECTIONS = {  # the body of a method's `select`
    "too many": "return Selection(torch.arange(budget + 1))",
    "too few": "return Selection(torch.arange(budget - 1))",
    "none at all": "return Selection(torch.arange(0))",
    "negative": "return Selection(some - 3)",
    "duplicates": "return Selection(some * 0)",
    "out of range": "return Selection(some + 10**6)",
    "descending": "return Selection(some.flip(0))",
    "floats": "return Selection(some.float())",
    "booleans": "return Selection(some > 3)",
    "a list": "return Selection(some.tolist())",
    "indices alone": "return some",
    "nothing": "return None",
    "two dimensions": "return Selection(some[None])",
    "an error": "raise RuntimeError('no')",
    "an exit": "raise SystemExit(0)",
    "NaN": "return Selection(some, tokens=vision.projected[:budget] * float('nan'))",
    "other tokens": "return Selection(some, tokens=torch.zeros(1, 1))",
}
MODULES = {  # a module, and what its entry point names
    "that is missing": ("", "nosuch_module:Broken"),
    "with a syntax error": ("def (", "module:Broken"),
    "that raises": ("raise RuntimeError('no')", "module:Broken"),
    "that exits": ("raise SystemExit(0)", "module:Broken"),
    "without the class": ("x = 1", "module:Broken"),
    "with another class": ("class Broken: pass", "module:Broken"),
    "with a number": ("Broken = 3", "module:Broken"),
}


def environment() -> Iterator[BadInput]:
    settings = [(variable, value) for variable, values in VARIABLES.items() for value in values]
    for command, (variable, value) in with_commands(settings):
        name = f"{variable}={_short(value)}"
        yield BadInput("environment", name, WORKING[command], environment={variable: value})


def packages() -> Iterator[BadInput]:
    for name in (*SELECTIONS, *MODULES):
        where = f"packages/{_directory(name)}"
        for command in ("infer", "prune"):
            arguments = (*WORKING[command], "--method=broken")
            says = "Broken.select" if name in SELECTIONS else "broken"
            yield BadInput("package", name, arguments, says=says, packages=where)
        if name in MODULES:
            yield BadInput("package", name, ("methods", "broken"), says="broken", packages=where)


def usage() -> Iterator[BadInput]:
    for name, arguments in USAGE.items():
        yield BadInput("usage", name, arguments)


KINDS: Sequence[Callable[[], Iterator[BadInput]]] = (
    *(usage, options, budgets, methods, parameters, questions, images, data, models, runs, outputs, environment),
    packages,
)


def bad_inputs() -> list[BadInput]:
    return [case for kind in KINDS for case in kind()]


# --- The files -----------------------------------------------------------------------------------------------------


def make_files(directory: Path, run: Callable[[Sequence[str], Path], object]) -> None:
    """Write everything that the tables name. run: runs a command in the directory, for the saved run."""
    for name in ("images", "pictures", "data", "models", "saved", "packages", "empty", "folder", "more [2024]"):
        (directory / name).mkdir()
    PHOTO.save(directory / "photo.png")
    for number in range(2):
        picture(60, 60, number).save(directory / "pictures" / f"{number}.png")
    good = lines(row(), row(answer="no"))
    (directory / "good.jsonl").write_bytes(good)
    (directory / "good.json").write_bytes(good)
    (directory / "more [2024]" / "good.jsonl").write_bytes(good)
    (directory / "link-to-photo.png").symlink_to("photo.png")
    (directory / "second-name.png").hardlink_to(directory / "photo.png")
    for name, content in (IMAGES | GOOD_IMAGES).items():
        _put(directory / "images" / name, content)
    for name, content in DATA.items():
        _put(directory / "data" / name, content)
    for suffix in set(SUFFIX.values()):
        (directory / f"folder.{suffix}").mkdir()
        os.mkfifo(directory / f"pipe.{suffix}")
        _socket(directory / f"socket.{suffix}")
        (directory / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
    shutil.copytree(DEMO, directory / "models" / "good")
    run((*WORKING["compare"], "--run-dir=saved/good"), directory)
    for fields, files, kind in ((MODEL_FIELDS, MODEL_FILES, "models"), (RUN_FIELDS, RUN_FILES, "saved")):
        whole = directory / kind / "good"
        for each in fields:
            _with_field(whole, directory / kind / _directory(_field_name(*each)), *each)
        for name, (file, content) in files.items():
            _with_file(whole, directory / kind / _directory(name), file, content)
    for name, body in SELECTIONS.items():
        _install(directory / "packages" / _directory(name), BROKEN_METHOD.format(body), "module:Broken")
    for name, (code, target) in MODULES.items():
        _install(directory / "packages" / _directory(name), code, target)
    for name, mode in (("closed", 0), ("read-only", 0o555)):
        (directory / name).mkdir(mode=mode)


def _put(path: Path, content: bytes | Callable[[Path], object]) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)


def _socket(path: Path) -> None:
    here = Path.cwd()
    try:
        os.chdir(path.parent)  # the address of a socket is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _forbidden(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0)


def _with_field(whole: Path, target: Path, file: str, pointer: str, value: object) -> None:
    """A copy of a directory in which a field of a file has another value."""
    changed = json.loads((whole / file).read_text())
    *path, last = [int(part) if part.isdigit() else part for part in pointer.split(".")]
    place = changed
    for part in path:
        place = place[part]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    _with_file(whole, target, file, json.dumps(changed).encode())


def _with_file(whole: Path, target: Path, file: str, content: bytes | Callable[[Path], object] | None) -> None:
    """A copy of a directory, by hard links, in which a file has another content or is missing."""
    shutil.copytree(whole, target, copy_function=os.link)
    path = target / file
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if content is not None:
        _put(path, content)


def _install(directory: Path, code: str, entry_point: str) -> None:
    """Put a package with a method called `broken` where pip would."""
    info = directory / "module-1.0.dist-info"
    info.mkdir(parents=True)
    (directory / "module.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: module\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mmtok.methods]\nbroken = {entry_point}\n")


def _field_name(file: str, pointer: str, value: object) -> str:
    shown = "removed" if value is REMOVED else _short(json.dumps(value))
    return f"{file} {pointer}={shown}"


def _directory(name: str) -> str:
    """A name as that of a directory."""
    return "".join(c if c.isalnum() or c in "-=.," else "_" for c in name)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _short(text: str) -> str:
    """Text as part of a test's name."""
    shown = "".join(c if c.isprintable() and c not in "[]" else f"<{ord(c):x}>" for c in text)
    return shown if len(shown) <= 40 else f"{shown[:12]}…({len(text)})"
