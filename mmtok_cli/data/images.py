"""Opening arbitrary user images, with a clear error for those that cannot be opened."""

from __future__ import annotations

import hashlib
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from PIL.Image import Image

from mmtok_cli.errors import MMTokError, first_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")


def open_image(path: Path | str, content: bytes | None = None) -> Image:
    """Read an image as viewers show it: EXIF rotation applied, transparency on white, the first frame, 8-bit RGB.

    content: the bytes of the file, if they were read already; `path` is then only its name. Raises MMTokError for a
    missing, damaged or extremely large file, for one that is not an image, and for a device or a named pipe.
    """
    if content is None:
        require_file(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about metadata
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(path if content is None else BytesIO(content), formats=FORMATS) as image:
                image.load()
                return in_rgb(_upright(image))
    except MMTokError as error:
        raise MMTokError(f"{path}: {error.message}", error.hint) from error
    except UnidentifiedImageError as error:
        raise MMTokError(f"{path} is not an image", "give a PNG, JPEG, WebP, GIF, TIFF or BMP file") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise MMTokError(
            f"{path} decompresses to more than {PILImage.MAX_IMAGE_PIXELS or 0:,} pixels", "scale it down first"
        ) from error
    except MemoryError as error:
        raise MMTokError(f"{path} does not fit into memory", "scale it down first") from error
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise _not_readable(path, error) from error
        raise MMTokError(f"{path} is damaged: {first_line(error)}", "save or download it again") from error


def is_image(path: Path) -> bool:
    """Whether a file begins as an image does. No more of it is read."""
    try:
        require_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PILImage.open(path, formats=FORMATS).close()
    except PILImage.DecompressionBombError:
        return True
    except Exception:  # as in `open_image`
        return False
    return True


def require_file(path: Path) -> None:
    """Refuse what is not a regular file before it is opened: opening a named pipe would wait for its writer, and a
    device may never end. Raises MMTokError that says what the path is instead."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _not_readable(path, error) from error
    except ValueError as error:  # a null character
        raise MMTokError(f"{str(path)!r} is not the name of a file", "check the spelling of the path") from error
    if stat.S_ISDIR(mode):
        raise MMTokError(f"{path} is a directory, not a file", "name a file in it")
    if not stat.S_ISREG(mode):
        raise MMTokError(f"{path} is a device, a pipe or a socket, not a file", "save its content to a file first")


def _not_readable(path: Path | str, error: OSError) -> MMTokError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return MMTokError(f"there is no file {path}", "check the spelling of the path")
    if isinstance(error, PermissionError):
        return MMTokError(f"{path}: permission denied", "check the permissions of the file")
    return MMTokError(f"{path} cannot be read: {error.strerror or first_line(error)}", "check the path")


def _upright(image: Image) -> Image:
    """The image rotated as its EXIF metadata say; as it is stored if they are damaged, as viewers show it."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's parser of metadata raises almost anything as well
        return image


def in_rgb(image: Image) -> Image:
    """The image as 8-bit RGB, transparency on white. Raises MMTokError for pixels whose value range is not defined."""
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


def image_name(image: Image) -> str:
    """A name by which questions about one image are recognised: the digest of its pixels."""
    found = hashlib.sha256(f"{image.mode} {image.size}".encode())
    found.update(image.tobytes())
    return f"image-{found.hexdigest()[:12]}"


def _from_integers(values: np.ndarray) -> Image:
    """Grey values of more than 8 bits, scaled (Pillow would clip them at 255 instead)."""
    highest = int(values.max(initial=0))
    if int(values.min(initial=0)) < 0 or highest > 65535:
        raise MMTokError("images of more than 16 bits per channel are not supported", "save it with 8 bits per channel")
    if values.dtype.itemsize == 2 or highest > 255:
        values = values.astype(np.uint32) >> 8
    return PILImage.fromarray(values.astype(np.uint8)).convert("RGB")
