"""Image files -> RGB arrays: the one place where pixels enter.

What is unusual: the EXIF orientation is NOT applied unless asked for. The masks of RefCOCO are drawn in the frame of
the stored pixels, so turning a picture there would move it away from its mask; for a user's own photograph, ask for it.
Files are bounded in pixels before they are decoded, and only plain raster formats are opened.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cmmasksd.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger images are refused: a file of a few kilobytes can unpack to gigabytes."""

# Pillow would also open PostScript (by starting Ghostscript), icons, and formats of a single instrument.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def read_image(source: str | Path | bytes, *, exif: bool = False) -> np.ndarray:
    """Read an image file as RGB.

    Grey, palette and CMYK images are converted; transparent pixels are laid over white, as a viewer shows them; of an
    animation, the first frame is read.

    Args:
        source: path of the file, or its content.
        exif: turn the image upright as its EXIF orientation says. Leave it off where masks were drawn on the stored
            pixels (RefCOCO); turn it on for photographs from a camera.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the file is missing, is no image, is truncated, or has more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, bytes):
        shown, file = "the image's content", io.BytesIO(source)
    else:
        shown, file = f"image {source}", Path(source)
        if not file.is_file():
            raise UserError(f"{shown} {'is not a file' if file.exists() else 'does not exist'}: check the path")
    try:
        with _open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _too_large(shown, f" of {width}x{height}")
            if image.mode in ("I", "F"):
                raise UserError(f"{shown} has pixels of 32 bits with no fixed white: save it with 8 or 16 bits")
            return to_rgb(ImageOps.exif_transpose(image) if exif else image)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(shown) from None
    except PermissionError:
        raise UserError(f"{shown} cannot be read: permission denied") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"damaged ({error})"
        raise UserError(f"{shown} does not decode: {reason}; expected an intact {', '.join(_FORMATS)} file") from error


def _open(file: Path | io.BytesIO) -> Image.Image:
    with warnings.catch_warnings():  # our own limit below is stricter and says more than Pillow's warning
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=_FORMATS)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any mode -> (H, W, 3) uint8."""
    if image.mode.startswith("I;16"):  # 16-bit grey: convert() would clip everything above 255 to white
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _too_large(shown: str, size: str = "") -> UserError:
    return UserError(f"{shown}{size} has more than {MAX_PIXELS / 1e6:.0f} megapixels: make it smaller first")
