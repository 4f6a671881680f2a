"""Opening images that people have lying about, or saying in one line why that is not possible."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from PIL.Image import Image

from mmtok_cli.errors import MMTokError


def open_image(path: Path | str) -> Image:
    """Read an image as a person sees it: turned upright, transparency over white, the first frame, 8-bit RGB.

    Raises MMTokError when there is no such file, or it is not an image, or it is damaged or absurdly large.
    """
    path = Path(path)
    if path.is_dir():
        raise MMTokError(f"{path} is a directory, not an image", "name one image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(path) as image:
                image.load()
                return _as_seen(image)
    except FileNotFoundError as error:
        raise MMTokError(f"there is no file {path}", "check the spelling of the path") from error
    except PermissionError as error:
        raise MMTokError(f"{path} may not be read", "check the file's permissions") from error
    except UnidentifiedImageError as error:
        raise MMTokError(f"{path} is not an image", "give a PNG, JPEG, WebP, GIF, TIFF or BMP file") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise MMTokError(
            f"{path} unfolds to more than {PILImage.MAX_IMAGE_PIXELS or 0:,} pixels", "scale it down first"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MMTokError(f"{path} is damaged: {error}", "save or download it again") from error


def _as_seen(image: Image) -> Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit values at 255 instead of scaling them.
        return PILImage.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, "white")
        return PILImage.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
