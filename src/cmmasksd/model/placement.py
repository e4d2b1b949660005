"""Where an image lies on the model's canvas, and bounds of the settings that decide it.

Plain numbers, no torch: the processor and the segmenter of exported models share these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from cmmasksd.errors import UserError, shown

MAX_SIDE = 4096
"""The longest side of a canvas in pixels."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an image lies on the model's canvas. All in pixels.

    Attributes:
        original: (H, W) of the image.
        canvas: (H, W) of the model's input.
        content: (top, left, height, width) of the image on the canvas; the rest is padding.
    """

    original: tuple[int, int]
    canvas: tuple[int, int]
    content: tuple[int, int, int, int]


def place(height: int, width: int, canvas: tuple[int, int], resize: Literal["warp", "letterbox"]) -> Placement:
    """The placement of an image of the given size."""
    if resize == "warp":
        return Placement((height, width), canvas, (0, 0, *canvas))
    scale = min(canvas[0] / height, canvas[1] / width)
    h, w = (min(c, max(1, round(side * scale))) for c, side in zip(canvas, (height, width), strict=True))
    return Placement((height, width), canvas, ((canvas[0] - h) // 2, (canvas[1] - w) // 2, h, w))


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number within bounds.

    Raises:
        UserError: it is anything else.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise UserError(f"{name} is {shown(value)}: expected a whole number from {low} to {high}")
    return int(value)


def per_channel(name: str, value: object, low: float, high: float) -> tuple[float, float, float]:
    """A mean or a standard deviation of red, green and blue.

    Raises:
        UserError: they are not three numbers within bounds.
    """
    if isinstance(value, list | tuple) and len(value) == 3:
        red, green, blue = value
        numbers = all(isinstance(part, int | float) and not isinstance(part, bool) for part in value)
        if numbers and all(low <= part <= high for part in value):
            return float(red), float(green), float(blue)
    raise UserError(f"{name} is {shown(value)}: expected three numbers from {low} to {high}")


def mean_and_std(mean: object, std: object, prefix: str = "") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of pixel values in [0, 1].

    Raises:
        UserError: they are not numbers within bounds.
    """
    return per_channel(f"{prefix}mean", mean, 0.0, 1.0), per_channel(f"{prefix}std", std, 0.001, 1.0)


def columns_first(source: Sequence[int], target: Sequence[int]) -> bool:
    """Whether to resize (H, W) to another (H, W) along the columns first, instead of along the rows.

    True where the intermediate image would have over four times the pixels of both: for a narrow and long source.
    """
    return source[0] * target[1] > 4 * max(source[0] * source[1], target[0] * target[1])


def canvas_of(size: object, patch_size: int) -> tuple[int, int]:
    """(height, width) of a canvas in pixels.

    Raises:
        UserError: these are not two multiples of the patch size within bounds.
    """
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise UserError(f"size is {shown(size)}: expected a height and a width in pixels")
    height, width = (whole(name, side, 0, MAX_SIDE) for name, side in zip(("height", "width"), size, strict=True))
    if any(side < patch_size or side % patch_size for side in (height, width)):
        good = [max(1, round(side / patch_size)) * patch_size for side in (height, width)]
        raise UserError(
            f"an input of {height}x{width} pixels is not a multiple of the patch size {patch_size}: "
            f"use {good[0]}x{good[1]}"
        )
    return height, width


def inside(cells: int, canvas: int, start: int, length: int) -> tuple[int, int]:
    """The first and the last cell of one axis of the logits whose centre lies in the image."""
    first = math.ceil(start * cells / canvas - 0.5)
    last = math.ceil((start + length) * cells / canvas - 0.5) - 1
    if last < first:  # the image is thinner than a cell and lies between two centres
        first = last = min(cells - 1, int((start + length / 2) * cells / canvas))
    return first, last


def threshold_to_logit(threshold: float) -> float:
    """The logit of a threshold in (0, 1).

    Raises:
        UserError: the threshold is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise UserError(f"threshold must be between 0 and 1, got {threshold}")
    return math.log(threshold / (1 - threshold))
