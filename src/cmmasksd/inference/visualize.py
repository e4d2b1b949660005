"""Masks and maps drawn on images: one overlay, prediction against truth, and a heat map. Pure numpy.

Colours are those of Okabe and Ito (2008), which remain distinct under all common forms of colour blindness. In a
comparison the masks also differ in form: the prediction is filled, the truth is a line.
"""

from __future__ import annotations

import numpy as np

from cmmasksd.errors import UserError

Color = tuple[int, int, int]

PALETTE: tuple[Color, ...] = (
    (0, 114, 178),  # blue
    (240, 228, 66),  # yellow
    (213, 94, 0),  # vermillion
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (230, 159, 0),  # orange
    (204, 121, 167),  # reddish purple
)
"""Colours for several masks in one image; neighbours in the list differ in lightness too."""

PREDICTION_COLOR, TRUTH_COLOR = PALETTE[0], PALETTE[1]  # blue and yellow: the pair that shows on most photographs


def overlay(image: np.ndarray, mask: np.ndarray, color: Color = PALETTE[0], alpha: float = 0.5) -> np.ndarray:
    """Fill a mask with a translucent colour and draw its border in the full colour.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        mask: (H, W) bool.
        color: RGB, 0 to 255.
        alpha: share of the colour in the fill, 0 to 1.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: image and mask differ in size or kind, or alpha is outside 0 to 1.
    """
    check_sizes(image, mask)
    if not 0.0 <= alpha <= 1.0:
        raise UserError(f"alpha must be between 0 and 1, got {alpha}")
    drawn = image.copy()
    blend = (1.0 - alpha) * image[mask] + alpha * np.array(color, dtype=np.float64)  # (pixels of the mask, 3)
    drawn[mask] = np.rint(blend).astype(np.uint8)
    drawn[inner_border(mask, line_width(mask))] = color
    return drawn


def comparison(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The prediction as a filled overlay under the truth's outline.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        truth: (H, W) bool.
        prediction: (H, W) bool.

    Returns:
        (H, W, 3) uint8: prediction in PREDICTION_COLOR, outline of the truth in TRUTH_COLOR with a black rim, which
        makes it visible on a yellow background too.

    Raises:
        UserError: the sizes differ.
    """
    check_sizes(image, truth, prediction)
    drawn = overlay(image, prediction, PREDICTION_COLOR)
    width = line_width(truth)
    rim = ~_shrink(~truth, outside=True) & ~truth  # one pixel outside the truth
    drawn[rim] = 0
    drawn[inner_border(truth, width)] = TRUTH_COLOR
    return drawn


_HEAT = np.array([(20, 20, 60), (0, 114, 178), (230, 159, 0), (250, 240, 130)], float)  # dark to light: reads in grey


def heat(image: np.ndarray, values: np.ndarray, alpha: float = 0.65) -> np.ndarray:
    """Draw a map of values over an image, from its minimum (dark blue) to its maximum (light yellow).

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        values: (h, w), any numbers; each cell covers its part of the image.
        alpha: share of the colours.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the image is not (H, W, 3) uint8.
    """
    check_sizes(image)
    spread = float(values.max() - values.min())
    level = (values - values.min()) / spread if spread else np.zeros(values.shape)
    position = level * (len(_HEAT) - 1)
    low = np.minimum(position.astype(int), len(_HEAT) - 2)
    colours = _HEAT[low] + (position - low)[..., None] * (_HEAT[low + 1] - _HEAT[low])  # (h, w, 3)
    rows = np.arange(image.shape[0]) * values.shape[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * values.shape[1] // image.shape[1]
    grey = image.mean(2, keepdims=True)
    return np.rint((1 - alpha) * grey + alpha * colours[rows[:, None], columns]).astype(np.uint8)


def line_width(mask: np.ndarray) -> int:
    """Line width in pixels, in proportion to the image."""
    return max(1, round(max(mask.shape) / 120))


def check_sizes(image: np.ndarray, *masks: np.ndarray) -> None:
    """Check that an image is (H, W, 3) uint8 and that masks are (H, W) bool of the same size.

    Raises:
        UserError: they are not; the message names both sizes.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the image is {image.shape} {image.dtype}: give (H, W, 3) uint8 RGB")
    for mask in masks:
        if mask.shape != image.shape[:2] or mask.dtype != np.bool_:
            raise UserError(
                f"the mask is {mask.shape} {mask.dtype} and the image {image.shape[:2]}: give (H, W) bool at the"
                " image's own size"
            )


def inner_border(mask: np.ndarray, width: int) -> np.ndarray:
    """The border of a mask (H, W) bool on its inside, `width` pixels thick, also along the edges of the image."""
    core = mask
    for _ in range(width):
        core = _shrink(core, outside=False)
    return mask & ~core


def _shrink(mask: np.ndarray, *, outside: bool) -> np.ndarray:
    """(H, W) bool: pixels of a mask whose four neighbours are in it too; `outside` is the value beyond the image."""
    padded = np.pad(mask, 1, constant_values=outside)
    across = padded[1:-1, :-2] & padded[1:-1, 2:]
    along = padded[:-2, 1:-1] & padded[2:, 1:-1]
    return mask & across & along
