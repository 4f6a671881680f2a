"""Files of selections: which vision tokens are kept of each image.

`mmtok prune --export` writes such a file, and `--kept` of `infer`, `compare` and `prune` reads it.

A `.json` file holds one object, as in

    {"schema": "mmtok.kept/1", "selections": [{"image": "img.jpg", "indices": [0, 5, 17]}]}

and a `.safetensors` file the same object in its metadata under `mmtok`, with the indices of selection number i in the
tensor `i.indices`. The latter can also hold rows that are not rows of the image, such as merged tokens: `i.tokens`
[kept, dim] and `i.merged` [kept]. `KeptFile` documents every field; `python -m mmtok_cli.results` prints its schema.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.files import write_whole
from mmtok_cli.tokens import PADDING

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".json", ".safetensors")
METADATA = "mmtok"


class Kept(BaseModel):
    """What is kept of one image.

    image: its name in the data: that of the file, or what the dataset calls it. question: None if the selection holds
    for every question about the image. total: vision tokens of the image as it was encoded, at the scale at which it
    was; None if it is not to be checked.
    indices: places of the kept tokens among them, in the order in which the tokens enter the language model, which
    ascends except for merged tokens; -1 is the encoder's class token, -2 padding of a crop that the unreduced prompt
    leaves out. Empty in the metadata of a .safetensors file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    question: str | None = None
    total: int | None = Field(None, ge=1)
    indices: tuple[int, ...] = ()


class KeptFile(BaseModel):
    """A file of selections. All but the selections is for the reader: what they were made with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["mmtok.kept/1"] = Field("mmtok.kept/1", alias="schema")
    model: str | None = None
    method: str | None = None
    parameters: dict[str, Any] = {}
    budget: str | None = None
    image_scale: Annotated[float, Field(ge=0.01, le=1)] | Literal["auto"] | None = None
    acts: str | None = Field(
        None, description="Where the method acts; a replay drops tokens before the language model."
    )
    selections: tuple[Kept, ...]

    @model_validator(mode="after")
    def _each_once(self) -> KeptFile:
        seen: set[tuple[str, str | None]] = set()
        for one in self.selections:
            if (one.image, one.question) in seen:
                raise ValueError(f"the image {one.image!r} occurs twice with the same question")
            seen.add((one.image, one.question))
        return self


class KeptSelections:
    """The selections of a file, by image and question.

    rows: [kept, dim] and [kept] of selections whose rows are not all rows of the image, by their number. digest: of the
    file's content.
    """

    def __init__(
        self, path: Path, file: KeptFile, rows: Mapping[int, tuple[Tensor, Tensor | None]], digest: str
    ) -> None:
        self.path = path
        self.file = file
        self.rows = rows
        self.digest = digest
        self._numbers = {(one.image, one.question): number for number, one in enumerate(file.selections)}

    def number_of(self, image: str, question: str) -> int:
        """The number of the selection of an image. Raises MMTokError if there is none."""
        for key in ((image, question), (image, None)):
            if key in self._numbers:
                return self._numbers[key]
        known = any(one.image == image for one in self.file.selections)
        what = f"of {image} with the question {question!r}" if known else f"of {image}"
        raise MMTokError(
            f"{self.path} has no selection {what}",
            "name images and questions as the data does, or leave the question out if it does not matter",
        )


def read_kept(path: Path) -> KeptSelections:
    """Read a file of selections. Raises MMTokError for one that cannot be read or is something else."""
    if path.suffix.lower() not in SUFFIXES:
        raise MMTokError(f"{path} is neither a .json nor a .safetensors file", "`mmtok prune --export` writes both")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MMTokError(f"{path} cannot be read: {error.strerror or first_line(error)}", "check its path") from error
    digest = hashlib.sha256(content).hexdigest()[:16]
    try:
        if path.suffix.lower() == ".json":
            return KeptSelections(path, _checked(json.loads(content)), {}, digest)
        file, rows = _from_tensors(content, path)
        return KeptSelections(path, file, rows, digest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        message = f"{path} is not a file of selections: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    except Exception as error:  # whatever JSON and safetensors raise for damaged files
        message = f"{path} is not a file of selections: {first_line(error)}"
    raise MMTokError(message, "see `mmtok prune --export`, which writes such files")


def require_format(path: Path, method: str | None, rows: Mapping[int, object]) -> None:
    """Raises MMTokError where a JSON file would have to hold rows."""
    if path.suffix.lower() == ".json" and rows:
        raise MMTokError(
            f"{method} keeps merged tokens, the class token or padding of crops, and {path.name} can hold indices only",
            f"export to {path.with_suffix('.safetensors').name}, which holds the rows as well",
        )


def write_kept(path: Path, file: KeptFile, rows: Mapping[int, tuple[Tensor, Tensor | None]]) -> None:
    """Write selections in the format of the suffix. rows: see KeptSelections.

    Raises MMTokError for a file that cannot be written, and where `require_format` does.
    """
    require_format(path, file.method, rows)
    if path.suffix.lower() == ".json":
        text = json.dumps(file.model_dump(by_alias=True, exclude_none=True), ensure_ascii=True) + "\n"
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
        return
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for number, one in enumerate(file.selections):
        tensors[f"{number}.indices"] = torch.tensor(one.indices, dtype=torch.int64)
        if number in rows:
            tokens, merged = rows[number]
            tensors[f"{number}.tokens"] = tokens.cpu().contiguous()
            if merged is not None:
                tensors[f"{number}.merged"] = merged.cpu().contiguous()
    plain = [one.model_copy(update={"indices": ()}) for one in file.selections]
    head = file.model_copy(update={"selections": tuple(plain)}).model_dump_json(by_alias=True, exclude_none=True)
    write_whole(path, lambda part: save_file(tensors, part, metadata={METADATA: head}))


def _from_tensors(content: bytes, path: Path) -> tuple[KeptFile, dict[int, tuple[Tensor, Tensor | None]]]:
    from safetensors import safe_open
    from safetensors.torch import load

    with safe_open(path, framework="pt") as opened:
        head = (opened.metadata() or {}).get(METADATA)
    if head is None:
        raise ValueError(f"its metadata has no {METADATA!r}")
    plain, tensors = json.loads(head), load(content)
    selections = plain.get("selections", [])
    for number, one in enumerate(selections):
        one["indices"] = tensors[f"{number}.indices"].tolist()
    rows = {
        number: (tensors[f"{number}.tokens"], tensors.get(f"{number}.merged"))
        for number in range(len(selections))
        if f"{number}.tokens" in tensors
    }
    for number, (tokens, merged) in rows.items():
        kept = len(selections[number]["indices"])
        if tokens.ndim != 2 or len(tokens) != kept or (merged is not None and merged.shape != (kept,)):
            raise ValueError(f"{number}.tokens and {number}.merged must have a row for each of the {kept} indices")
    return _checked(plain), rows


def _checked(plain: Any) -> KeptFile:
    file = KeptFile.model_validate(plain)
    if not file.selections:
        raise ValueError("it has no selections")
    for one in file.selections:
        _check_indices(one)
    return file


def _check_indices(one: Kept) -> None:
    limit: Sequence[int] = [] if one.total is None else [i for i in one.indices if i >= one.total]
    if limit:
        raise ValueError(f"index {limit[0]} of {one.image!r} is beyond its {one.total} vision tokens")
    if any(i < PADDING for i in one.indices):
        raise ValueError(f"an index of {one.image!r} is below {PADDING}")
