"""VQAv2's pairs of files: questions, and the answers of ten annotators to each (arXiv 1612.00837)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtok_cli.data.json_files import Entries, read_json
from mmtok_cli.errors import MMTokError

NEEDS = frozenset({"image_id", "question", "question_id"})
HINT = "give VQAv2's question file and, after a comma, its annotation file: vqav2:QUESTIONS.json,ANNOTATIONS.json"


def vqav2_entries(document: Any, path: Path, annotations: Path | None) -> Entries:
    """The questions of a document with their answers and the names of their images.

    path: of the document. annotations: by default the file of the official name beside it; without it no answer is
    known. Raises MMTokError for files that are not of this format or do not belong together.
    """
    questions = _list_in(document, "questions", path)
    annotations = annotations or annotations_beside(path)
    known = {} if annotations is None else _by_question(annotations)
    asked = {str(question.get("question_id")) for question in questions if isinstance(question, dict)}
    if annotations is not None and not asked & known.keys():
        raise MMTokError(f"{annotations} answers none of the questions in {path}", "give the files of one split")
    for number, row in enumerate(questions, start=1):
        yield f"item {number}", _joined(row, known, document.get("data_subtype", ""))


def is_vqav2(document: Any) -> bool:
    """Whether a document is a question file. It names images by their numbers and has no field `image`."""
    rows = document.get("questions") if isinstance(document, dict) else None
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and _is_question(rows[0])


def _is_question(row: dict[str, Any]) -> bool:
    return row.keys() >= NEEDS and "image" not in row


def _joined(row: Any, known: dict[str, dict[str, Any]], subset: str) -> dict[str, Any] | MMTokError:
    if not isinstance(row, dict) or not _is_question(row):
        return MMTokError(f"it has not all of {', '.join(sorted(NEEDS))}", HINT)
    image = row["image_id"]
    name = f"COCO_{subset}_{image:012d}.jpg" if isinstance(image, int) else str(image)
    annotation = known.get(str(row["question_id"]), {})
    answers = {"answers": annotation["answers"], "kind": annotation.get("answer_type")} if annotation else {}
    return row | {"image": name} | answers


def _by_question(path: Path) -> dict[str, dict[str, Any]]:
    rows = _list_in(read_json(path), "annotations", path)
    answered = [row for row in rows if isinstance(row, dict) and isinstance(row.get("answers"), list)]
    found = {str(row.get("question_id")): row for row in answered}
    if not found:
        raise MMTokError(f"{path} has no annotations with question_id and answers", HINT)
    return found


def _list_in(document: Any, name: str, path: Path) -> list[Any]:
    rows = document.get(name) if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise MMTokError(f"{path} has no list under {name!r}", HINT)
    return rows


def annotations_beside(questions: Path) -> Path | None:
    """The annotation file of the official name, as in v2_mscoco_val2014_annotations.json, if it exists."""
    name = questions.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("questions", "annotations")
    path = questions.with_name(name)
    return path if path != questions and path.is_file() else None
