"""Position, size and contact of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Shape:
    """Position and size of a mask.

    Attributes:
        box: (x0, y0, x1, y1) in pixels, half-open.
        centres: centre of the box and centroid of the mask, (x, y) in pixels each.
        area: number of pixels.
    """

    box: tuple[int, int, int, int]
    centres: tuple[tuple[float, float], tuple[float, float]]
    area: int


def measure_shape(mask: np.ndarray) -> Shape | None:
    """The box, centres and area of a mask, (H, W) bool; None where it is empty."""
    columns, rows = mask.sum(axis=0), mask.sum(axis=1)
    area = int(columns.sum())
    if not area:
        return None
    (x0, x1), (y0, y1) = (np.flatnonzero(counts)[[0, -1]].tolist() for counts in (columns, rows))
    x, y = (float(counts @ np.arange(len(counts)) / area + 0.5) for counts in (columns, rows))
    return Shape((x0, y0, x1 + 1, y1 + 1), (((x0 + x1 + 1) / 2, (y0 + y1 + 1) / 2), (x, y)), area)


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def contains(box: Sequence[float], point: tuple[float, float]) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def resting(mask: np.ndarray, support: np.ndarray, shape: Shape) -> float:
    """Share of an object's columns whose lowest pixel, or one of three below it, is the support's."""
    x0, y0, x1, y1 = shape.box
    part = mask[y0:y1, x0:x1]
    columns = np.flatnonzero(part.any(axis=0))
    lowest = y1 - 1 - part[::-1, columns].argmax(axis=0)
    rows = np.minimum(lowest[:, None] + np.arange(4), len(mask) - 1)
    return float(support[rows, (columns + x0)[:, None]].any(axis=1).mean())


def enclosed(mask: np.ndarray, support: np.ndarray, shape: Shape) -> float:
    """Share of an object's rows in which the support shows on both of its sides."""
    _, y0, _, y1 = shape.box
    rows = mask[y0:y1]
    first, last = rows.argmax(axis=1), rows.shape[1] - 1 - rows[:, ::-1].argmax(axis=1)
    counts = np.concatenate([np.zeros((y1 - y0, 1), int), support[y0:y1].cumsum(axis=1)], axis=1)
    row = np.arange(y1 - y0)
    left, right = counts[row, first], counts[:, -1] - counts[row, last + 1]
    return float(((left > 0) & (right > 0) & rows.any(axis=1)).mean())


def rim(mask: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels within three of an object, its own left out."""
    x0, y0, x1, y1 = shape.box
    top, left = max(0, y0 - 3), max(0, x0 - 3)
    part = mask[top : y1 + 3, left : x1 + 3]
    grown = np.pad(part, 3)
    for axis in (0, 1):
        size = part.shape[axis]
        grown = np.logical_or.reduce([grown.take(range(by, by + size), axis=axis) for by in range(7)])
    rows, columns = np.nonzero(grown & ~part)
    return rows + top, columns + left


def touch(first: np.ndarray, second: np.ndarray, shape: Shape, other: Shape) -> bool:
    """Whether two objects overlap or come within three pixels of each other."""
    x0, y0, x1, y1 = shape.box
    if not overlap((x0 - 3, y0 - 3, x1 + 3, y1 + 3), other.box):
        return False
    return bool((first & second).any() or second[rim(first, shape)].any())
