"""Image files and arrays -> RGB arrays: the one place where pixels enter.

What is unusual: the EXIF orientation is applied only on request. RefCOCO's masks are drawn on the stored pixels, so its
images must not be turned; photographs of a user should be. The number of pixels is bounded before an image is decoded,
and only plain raster formats are opened.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cmmasksd.errors import UserError

MAX_PIXELS = 64_000_000
"""Limit of pixels of an image: a file of a few kilobytes can unpack to gigabytes."""

MAX_SIDE, MAX_RATIO = 32_768, 100
"""Limits of a side in pixels, and of the ratio of the sides: every line costs time, however short it is."""

MAX_BYTES = 4 * MAX_PIXELS
"""Limit of bytes read from a file object."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of the files in a folder that are read as images."""

# Pillow would also open PostScript (by starting Ghostscript), icons, and formats of single instruments
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


class ImageTooLarge(UserError):
    """More pixels than allowed, a side that is too long, or an image that is too narrow."""


def read_image(source: str | Path | bytes, *, exif: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file as RGB.

    Grey, palette and CMYK images are converted; transparent pixels are laid over white, as viewers show them; of an
    animation, the first frame is read.

    Args:
        source: path of the file, or its content.
        exif: whether to turn the image upright as its EXIF orientation says. Leave it off where masks were drawn on the
            stored pixels (RefCOCO); turn it on for photographs.
        max_pixels: a lower limit than ``MAX_PIXELS``.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the file is missing, not an image, truncated, or too large (ImageTooLarge): more than
            ``max_pixels`` pixels, a side above ``MAX_SIDE``, or sides of a ratio above ``MAX_RATIO``.
    """
    with _opened(source, _FORMATS, max_pixels) as (image, what):
        return _rgb(image, what, exif=exif)


def read_frames(source: str | Path | bytes) -> Iterator[tuple[int | None, np.ndarray]]:
    """The frames of an animated GIF, WebP or PNG, or the image of any other file; upright.

    Args and errors: see `read_image`.

    Yields:
        The frame's number from 1 (None for a still image) and its pixels, (H, W, 3) uint8.
    """
    with _opened(source, _FORMATS) as (image, what):
        animated = image.format in ("GIF", "WEBP", "PNG")  # a TIFF has pages, a JPEG may have thumbnails
        count = getattr(image, "n_frames", 1) if animated else 1
        for nth in range(count):
            image.seek(nth)
            yield (nth + 1 if count > 1 else None), _rgb(image, what, exif=True)


def image_size(source: str | Path | bytes, *, exif: bool = False) -> tuple[int, int]:
    """(height, width) of an image file from its header, without decoding it; see `read_image`."""
    with _opened(source, _FORMATS) as (image, _):
        width, height = image.size
        return (width, height) if exif and _orientation(image) >= 5 else (height, width)


def stored_size(source: str | Path | bytes) -> tuple[tuple[int, int], int]:
    """(height, width) of the stored pixels of an image file from its header, and its EXIF orientation, 1 (upright)
    to 8; from 5 on, it exchanges the sides."""
    with _opened(source, _FORMATS) as (image, _):
        return (image.height, image.width), _orientation(image)


def _orientation(image: Image.Image) -> int:
    # in search of a late EXIF block, Pillow would unpack the whole PNG
    known = image.format != "PNG" or "exif" in image.info
    value = image.getexif().get(ExifTags.Base.Orientation, 1) if known else 1
    return value if value in range(1, 9) else 1


def is_turned(source: str | Path | bytes) -> bool:
    """Whether the EXIF orientation of an image file says that its stored pixels are not upright."""
    with _opened(source, _FORMATS) as (image, _):
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def read_mask(source: str | Path | bytes) -> np.ndarray:
    """Read a mask from a PNG: all pixels but those of value 0, palette index 0, or full transparency.

    Returns:
        (H, W) bool.

    Raises:
        UserError: as for `read_image`, or the format is another one (a JPEG's zeros are not zero).
    """
    with _opened(source, ("PNG",)) as (image, _):
        values: Any = np.array(image)
    if values.ndim == 2:
        return values != 0
    if values.shape[2] in (2, 4):
        return np.logical_and(values[..., :-1].any(axis=2), values[..., -1])
    return values.any(axis=2)


@contextmanager
def _opened(
    source: str | Path | bytes, formats: tuple[str, ...], max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Image.Image, str]]:
    """The image, not yet decoded, and its name in messages. An error in the block becomes a UserError."""
    if isinstance(source, bytes):
        what, file = "the image's content", io.BytesIO(source)
    else:
        what, file = f"image {source}", Path(source)
        require_file(file, what)
    with _decoding(what, formats):
        with warnings.catch_warnings():  # our own limit is stricter and says more than Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=formats)
        with opened:
            require_bounded(*opened.size, what, max_pixels)
            yield opened, what


@contextmanager
def _decoding(what: str, formats: tuple[str, ...] = _FORMATS) -> Iterator[None]:
    """An error in the block becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(what, MAX_PIXELS) from None
    except PermissionError:
        raise UserError(f"{what} cannot be read: permission denied") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = "not a PNG" if formats == ("PNG",) else "not an image"
        reason = reason if isinstance(error, Image.UnidentifiedImageError) else f"damaged ({error})"
        raise UserError(f"{what} does not decode: {reason}; expected an intact {', '.join(formats)} file") from error


def require_file(file: Path, what: str) -> None:
    """Raise a UserError unless a path is that of a file."""
    if not os.path.isfile(file):  # Path.is_file raises where a name is too long
        raise UserError(f"{what} {'is not a file' if os.path.exists(file) else 'does not exist'}: check the path")


def require_bounded(width: int, height: int, what: str, most: int = MAX_PIXELS) -> None:
    """Raise ImageTooLarge beyond `most` or ``MAX_PIXELS`` pixels, ``MAX_SIDE`` or ``MAX_RATIO``."""
    if width * height > min(most, MAX_PIXELS):
        raise _too_large(f"{what} of {width}x{height}", min(most, MAX_PIXELS))
    if max(width, height) > MAX_SIDE:
        raise ImageTooLarge(f"{what} of {width}x{height} has a side above {MAX_SIDE} pixels: make it smaller first")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageTooLarge(f"{what} of {width}x{height} has sides of a ratio above {MAX_RATIO}: crop it first")


def _too_large(what: str, most: int) -> UserError:
    return ImageTooLarge(f"{what} has more than {most / 1e6:g} megapixels: make it smaller first")


ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | np.ndarray | Image.Image
"""What `as_pixels` takes."""


def as_pixels(image: ImageInput) -> np.ndarray:
    """An image in any form as RGB, upright as its EXIF orientation says.

    Args:
        image: path of a file, its content, a file object opened for reading bytes (read to its end), a PIL image, or
            an array of uint8: (H, W, 3) RGB, (H, W, 4) RGBA (transparent pixels over white) or (H, W) grey.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: it is none of these (a URL, for example), is damaged, or is too large (see `read_image`).
    """
    if isinstance(image, str) and re.match(r"[a-z][a-z0-9+.-]+://|data:", image, re.IGNORECASE):
        raise UserError(f"{image[:60]} is a URL, and nothing is downloaded here: give a file, or its bytes")
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image), exif=True)
    if isinstance(image, bytes | bytearray | memoryview):
        return read_image(bytes(image), exif=True)
    if isinstance(image, np.ndarray):
        return _array_pixels(image)
    if isinstance(image, Image.Image):
        with _decoding("the image"):  # it may not be read from its file yet
            require_bounded(image.width, image.height, "the image")
            return _rgb(image, "the image", exif=True)
    if hasattr(image, "read"):
        return read_image(read_bytes(image), exif=True)
    raise UserError(f"a {type(image).__name__} is not an image: give a path, bytes, a PIL image or an array")


def read_bytes(file: BinaryIO) -> bytes:
    """The content of a binary file object; a UserError beyond ``MAX_BYTES``."""
    content = file.read(MAX_BYTES + 1)
    if not isinstance(content, bytes):
        raise UserError("the file object gives text: open the image with mode 'rb'")
    if len(content) > MAX_BYTES:
        raise UserError(f"the image's content has more than {MAX_BYTES / 1e6:.0f} MB: make it smaller first")
    return content


def _array_pixels(array: np.ndarray) -> np.ndarray:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    colour = array.ndim == 3 and array.shape[2] in (3, 4)
    if not (grey or colour) or array.dtype != np.uint8 or 0 in array.shape:
        hint = ": values from 0 to 1 become it by (255 * x).round().astype('uint8')" if array.dtype.kind == "f" else ""
        kinds = "(H, W, 3) uint8 RGB, (H, W, 4) RGBA or (H, W) grey"
        raise UserError(f"an image must be {kinds}, not {array.shape} {array.dtype}{hint}")
    require_bounded(array.shape[1], array.shape[0], "the image")
    if grey:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array if array.shape[2] == 3 else _to_rgb(Image.fromarray(array))


def _rgb(image: Image.Image, what: str, *, exif: bool) -> np.ndarray:
    if image.mode in ("I", "F"):
        raise UserError(f"{what} has pixels of 32 bits with no fixed white: save it with 8 or 16 bits")
    return _to_rgb(ImageOps.exif_transpose(image) if exif else image)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Any mode -> (H, W, 3) uint8."""
    if image.mode.startswith("I;16"):  # 16-bit grey: convert() would clip everything above 255 to white
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
