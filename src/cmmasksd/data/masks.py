"""Polygons and run-length codes (RLE) <-> boolean masks, in COCO's two notations.

What is unusual: the parts of an object are *united*. Code that sums the decoded parts gets the value 2 where polygons
overlap, and then trains on it or deletes the overlap. Crowd annotations, whose segmentation is an RLE dict, decode too.

Polygons are rasterised by pycocotools, so that masks equal COCO's own to the pixel. RLE is decoded here: pycocotools
2.0.11 returns uninitialised memory when the counts cover less than the image, and reads past the end of a truncated
string. Outlines are traced along the edges of the pixels, so that mask -> polygons -> mask is exact, where tracing
through pixel centres (OpenCV) loses half a pixel all round, which is much of a small object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cmmasksd.errors import UserError, shown

# pycocotools' memory grows with the length of an outline, by some 50 bytes per pixel
_FAR = 10  # coordinates beyond this many image sides are refused
_LONG = 10_000_000  # as are outlines of more pixels


def decode_segmentation(segmentation: object, height: int, width: int) -> np.ndarray:
    """Decode a COCO ``segmentation`` into a mask.

    Args:
        segmentation: a list of polygons ``[[x0, y0, x1, y1, ...], ...]`` in pixels, whose union is the object; or an
            RLE dict ``{"size": [height, width], "counts": ...}`` with a list of run lengths or a compressed string.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The mask, (H, W) bool.

    Raises:
        UserError: the segmentation is empty or malformed, or its size is not the image's.
    """
    if isinstance(segmentation, dict):
        return _runs_to_mask(_checked_rle(segmentation, height, width), height, width)
    if not isinstance(segmentation, (list, tuple)):
        raise UserError(f"segmentation is {shown(segmentation)}: expected a list of polygons or an RLE dict")
    if not segmentation:
        raise UserError("segmentation is empty: expected at least one polygon, or an RLE dict for an empty mask")
    from pycocotools import mask as coco

    polygons: Any = [_checked_polygon(polygon, _polygon_points(polygon), height, width) for polygon in segmentation]
    union: Any = coco.merge(coco.frPyObjects(polygons, height, width))
    return _runs_to_mask(_checked_runs(_unpacked_counts(union["counts"]), height, width), height, width)


def usable_segmentation(segmentation: object, height: int, width: int) -> tuple[Any, int]:
    """Check a COCO ``segmentation`` without drawing it, and leave out the polygons that have no area.

    Such polygons (a click, a line; fewer than three corners) come out of labelling tools beside good ones.

    Args:
        segmentation, height, width: as for ``decode_segmentation``.

    Returns:
        The segmentation that ``decode_segmentation`` takes, an empty list where no polygon is left; and the number of
        polygons that were left out.

    Raises:
        UserError: the segmentation is malformed.
    """
    if isinstance(segmentation, dict):
        _checked_rle(segmentation, height, width)
        return segmentation, 0
    if not isinstance(segmentation, (list, tuple)):
        raise UserError(f"segmentation is {shown(segmentation)}: expected a list of polygons or an RLE dict")
    usable = []
    for polygon in segmentation:
        points = _polygon_points(polygon)
        if len(points) >= 6 and _has_area(_checked_polygon(polygon, points, height, width)):
            usable.append(polygon)
    return usable, len(segmentation) - len(usable)


def mask_to_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Bounding box of a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        (x0, y0, x1, y1) in pixels, half-open: mask[y0:y1, x0:x1] holds all of it; None for an empty mask.
    """
    rows, columns = (np.flatnonzero(_checked_mask(mask).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask as a compressed RLE that JSON can hold.

    Args:
        mask: (H, W) bool.

    Returns:
        ``{"size": [height, width], "counts": str}``, which ``decode_segmentation`` and pycocotools read.
    """
    from pycocotools import mask as coco

    rle: Any = coco.encode(np.asfortranarray(_checked_mask(mask), dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Trace the outline of every 4-connected part of a mask; decoding the polygons gives the mask back exactly.

    COCO's polygons have no notion of a hole. A part's holes are joined to its outline by vertical cuts of no width that
    are walked down and up again: the even-odd fill of pycocotools (and the shoelace area) leaves the hole out.

    Args:
        mask: (H, W) bool.

    Returns:
        One polygon ``[x0, y0, x1, y1, ...]`` per part, corners only; no polygon for an empty mask.
    """
    rows, columns = (np.flatnonzero(_checked_mask(mask).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    box = mask[top : rows[-1] + 1, left : columns[-1] + 1]  # tracing costs by the pixel, and objects are small
    start, successor, outlines = _trace(box)
    polygons = []
    for first in outlines:
        walk = [first]
        while (edge := successor[walk[-1]]) != first:
            walk.append(edge)
        y, x = np.divmod(start[walk], box.shape[1] + 1)
        points = np.stack([x + left, y + top], axis=1)
        heading = np.sign(np.roll(points, -1, axis=0) - points)
        corner = (heading != np.roll(heading, 1, axis=0)).any(axis=1)
        polygons.append(points[corner].ravel().astype(float).tolist())
    return polygons


def _trace(mask: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Directed boundary edges of the pixels, foreground on the right hand, with holes already joined to their outline.

    A vertex is a pixel corner, numbered y * (W + 1) + x. Headings: 0 right, 1 down, 2 left, 3 up.

    Returns:
        The vertex where each edge starts, the edge that follows each edge, and the first edge of every outline.
    """
    height, width = mask.shape
    row = width + 1
    padded = np.pad(mask, 1)
    # A pixel's upper edge, walked to the right, bounds the object where the pixel above is background; and so on.
    sides = [
        (mask & ~padded[:-2, 1:-1], 0),
        (mask & ~padded[1:-1, 2:], 1),
        (mask & ~padded[2:, 1:-1], row + 1),
        (mask & ~padded[1:-1, :-2], row),
    ]
    starts, headings = [], []
    for heading, (side, corner) in enumerate(sides):
        y, x = np.nonzero(side)
        starts.append(y * row + x + corner)
        headings.append(np.full(len(y), heading))
    start, heading = np.concatenate(starts), np.concatenate(headings)
    end = start + np.array([1, row, -1, -row])[heading]

    edge_at = np.full((4, (height + 1) * row), -1)
    edge_at[heading, start] = np.arange(len(start))
    right, ahead, left = (edge_at[(heading + turn) % 4, end] for turn in (1, 0, 3))
    # Turning right first keeps to the same pixel where two pixels meet only at a corner: parts are 4-connected.
    successor = np.where(right >= 0, right, np.where(ahead >= 0, ahead, left)).tolist()

    # In raster order, a loop is met first at its topmost edge: an upper edge for an outline, a lower edge for a hole.
    horizontal = np.flatnonzero(heading % 2 == 0)
    horizontal = horizontal[np.argsort(np.minimum(start, end)[horizontal])]
    upper_edges = edge_at[0].reshape(height + 1, row)
    outlines, bridge_starts, seen = [], [], bytearray(len(start))
    for first in horizontal.tolist():
        if seen[first]:
            continue
        edge = first
        while not seen[edge]:
            seen[edge] = 1
            edge = successor[edge]
        if heading[first] == 0:
            outlines.append(first)
            continue
        # A hole: from its top left corner, straight up through the object to the first upper edge, whose loop has been
        # walked already. That edge now goes down the cut and round the hole; two new edges go back up and carry on.
        y, x = divmod(int(end[first]), row)
        column = upper_edges[:y, x]
        above = int(column[column >= 0][-1])
        up = len(successor)
        successor += [up + 1, successor[above]]
        successor[above], successor[first] = successor[first], up
        bridge_starts += [int(end[first]), int(start[above])]
    return np.concatenate([start, np.array(bridge_starts, dtype=start.dtype)]), successor, outlines


def _checked_rle(rle: dict[Any, Any], height: int, width: int) -> np.ndarray:
    """RLE dict -> its run lengths, (R,), which add up to the image."""
    if "size" not in rle or "counts" not in rle:
        raise UserError(f"RLE {shown(rle)} lacks 'size' or 'counts': expected both")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise UserError(
            f"RLE of size {shown(size)} for an image of height {height} and width {width}: expected size "
            f"[{height}, {width}] (height first)"
        )
    if isinstance(counts, (str, bytes)):
        runs = _unpacked_counts(counts.encode("ascii", "replace") if isinstance(counts, str) else counts)
    else:
        runs = _number_array(counts)
    if runs is None or runs.dtype.kind not in "iu":
        raise UserError(f"RLE counts are {shown(counts)}: expected a list of whole numbers, or a string")
    return _checked_runs(runs, height, width)


def _unpacked_counts(packed: bytes) -> np.ndarray:
    """COCO's compressed string -> run lengths, (R,) int64.

    Each run is written in 6-bit digits, least significant first: 5 bits of value and one that says "more follow"; the
    top value bit of the last digit is the sign. From the fourth run on, the difference to the run before last is kept.
    """
    digits = np.frombuffer(packed, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits & 0x20 == 0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not len(last) or last[-1] != len(digits) - 1:
        raise UserError(f"RLE counts {shown(packed)} are cut short or not COCO's compressed string: write them again")
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 8:  # 40 bits: far more than an image can need, and nothing below overflows
        raise UserError(f"RLE counts {shown(packed)} hold a run too long for any image: write them again")
    place = 5 * (np.arange(len(digits)) - np.repeat(first, length))
    runs = np.add.reduceat((digits & 0x1F) << place, first)
    runs -= np.where(digits[last] & 0x10, 1 << (5 * length), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _checked_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """The run lengths, (R,), if they add up to the image; else a UserError."""
    # Each run is checked before they are added up, so that no sum can wrap round.
    if not len(runs) or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise UserError(
            f"RLE counts do not add up to the {height * width} pixels of an image of height {height} and width {width}"
            ": the segmentation is damaged or belongs to another image"
        )
    return runs


def _runs_to_mask(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Alternating runs of background and object, down the columns, (R,) -> (H, W) bool."""
    return np.ascontiguousarray(np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T)


def _polygon_points(polygon: object) -> np.ndarray:
    """A polygon -> its (2P,) coordinates, or a UserError."""
    points = _number_array(polygon)
    if points is None and polygon != []:
        raise UserError(f"polygon is {shown(polygon)}: expected a flat list of numbers [x0, y0, x1, y1, ...]")
    return np.zeros(0) if points is None else points.astype(np.float64)


def _checked_polygon(polygon: object, points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The (2P,) float64 coordinates of a polygon, if they can be drawn; else a UserError."""
    if len(points) < 6 or len(points) % 2:
        raise UserError(f"polygon of {len(points)} numbers: expected an even count, 6 or more (x and y of each corner)")
    far = _FAR * max(height, width)
    if not (np.abs(points) <= far).all():  # also false for NaN
        raise UserError(
            f"polygon {shown(polygon)} lies far outside its image of height {height} and width {width}: expected "
            "pixel coordinates"
        )
    if len(points) * far > _LONG and (length := np.abs(np.diff(points.reshape(-1, 2), axis=0)).sum()) > _LONG:
        raise UserError(f"polygon {shown(polygon)} is {length:.0f} pixels long: expected the outline of an object")
    return points


def _has_area(points: np.ndarray) -> bool:
    """Whether a polygon of (2P,) coordinates encloses anything."""
    x, y = points[::2] - points[0], points[1::2] - points[1]
    if abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) > 1e-6:
        return True
    return bool(np.abs(x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 1e-6)  # such as the two halves of a bow tie


def _number_array(values: object) -> np.ndarray | None:
    """A flat sequence of numbers as an array; None where it is anything else."""
    if not isinstance(values, np.ndarray):  # whose elements are numbers; for text, an array could be vast
        kinds = set(map(type, values)) if isinstance(values, Sequence) else {type(values)}
        if not all(issubclass(kind, int | float | np.number) and kind is not bool for kind in kinds):
            return None
    array = np.asarray(values)
    return array if array.ndim == 1 and array.dtype.kind in "iuf" else None


def _checked_mask(mask: np.ndarray) -> np.ndarray:
    # A mask of probabilities or of 0 and 255 would become True nearly everywhere without a word.
    if mask.ndim != 2 or mask.dtype != bool:
        raise TypeError(f"mask of shape {mask.shape} and dtype {mask.dtype}: expected (H, W) bool")
    return mask
