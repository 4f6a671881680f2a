"""Images written as base64 within a data file."""

from __future__ import annotations

import base64
import hashlib
import re

from PIL.Image import Image

from mmtok_cli.data.images import open_image
from mmtok_cli.errors import MMTokError

LONGEST_NAME = 64  # VLMEvalKit takes what is longer for base64
LONGEST_PATH = 4096  # no path is longer, so no more characters need be looked at
PREFIX = re.compile(r"data:image/[\w.+-]+;base64,")
BASE64 = re.compile(r"[A-Za-z0-9+/\s]++={0,2}")


def is_base64(text: str) -> bool:
    """Whether a text is an image and not the name of a file: a data URL, or long and of base64's characters alone."""
    start = text[:LONGEST_PATH]
    return PREFIX.match(start) is not None or (len(text) > LONGEST_NAME and BASE64.fullmatch(start.strip()) is not None)


def image_name(text: str) -> str:
    """A name by which equal images are recognised."""
    return f"image-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def decoded(text: str, name: str) -> Image:
    """The image. Raises MMTokError, which calls it `name`, where it cannot be read."""
    try:
        content = base64.b64decode(PREFIX.sub("", text, count=1))
    except ValueError as error:  # binascii.Error, or a character that is not of ASCII
        raise MMTokError(f"{name} is not base64: {error}", "encode the bytes of an image file") from error
    return open_image(name, content)
