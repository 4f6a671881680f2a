"""Opening arbitrary user images, with a clear error for those that cannot be opened."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from PIL.Image import Image

from mmtok_cli.errors import MMTokError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")


def open_image(path: Path | str, content: bytes | None = None) -> Image:
    """Read an image as viewers show it: EXIF rotation applied, transparency on white, the first frame, 8-bit RGB.

    content: the bytes of the file, if they were read already; `path` is then only its name. Raises MMTokError for a
    missing, damaged or extremely large file and for one that is not an image.
    """
    path = Path(path)
    try:
        if content is None and path.is_dir():
            raise MMTokError(f"{path} is a directory, not an image", "name one image file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(path if content is None else BytesIO(content), formats=FORMATS) as image:
                image.load()
                return _as_seen(image)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MMTokError(f"there is no file {path}", "check the spelling of the path") from error
    except PermissionError as error:
        raise MMTokError(f"{path}: permission denied", "check the permissions of the file") from error
    except UnidentifiedImageError as error:
        raise MMTokError(f"{path} is not an image", "give a PNG, JPEG, WebP, GIF, TIFF or BMP file") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise MMTokError(
            f"{path} decompresses to more than {PILImage.MAX_IMAGE_PIXELS or 0:,} pixels", "scale it down first"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise MMTokError(f"{path} cannot be read: {error.strerror}", "check the path") from error
        raise MMTokError(f"{path} is damaged: {error}", "save or download it again") from error


def _as_seen(image: Image) -> Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image))
    if image.mode == "F":
        raise MMTokError(
            "images with floating-point pixels are not supported: their value range is not defined",
            "save it with 8 bits per channel",
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, "white")
        return PILImage.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_integers(values: np.ndarray) -> Image:
    """Grey values of more than 8 bits, scaled (Pillow would clip them at 255 instead)."""
    highest = int(values.max(initial=0))
    if int(values.min(initial=0)) < 0 or highest > 65535:
        raise MMTokError("images of more than 16 bits per channel are not supported", "save it with 8 bits per channel")
    if values.dtype.itemsize == 2 or highest > 255:
        values = values.astype(np.uint32) >> 8
    return PILImage.fromarray(values.astype(np.uint8)).convert("RGB")
