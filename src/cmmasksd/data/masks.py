"""Polygons and run-length codes (RLE) <-> boolean masks, in COCO's two notations.

What is unusual: a mask is the union of an object's polygons. Code that sums the decoded polygons gets the value 2 where
they overlap, and then trains on it or deletes the overlap. Crowd annotations, whose segmentation is an RLE dict, decode
too.

faster-coco-eval draws and decodes masks. They equal those of pycocotools to the pixel; but pycocotools 2.0.11 returns
uninitialised memory for an RLE that covers less than the image, and reads past the end of a truncated one.

Outlines are traced along the edges of pixels, so that mask -> polygons -> mask is exact. OpenCV traces through the
centres of pixels, which loses half a pixel all round: much of a small object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cmmasksd.errors import UserError, shown

# Drawing a polygon takes some 50 bytes of memory per pixel of its outline
_MAX_DISTANCE = 10  # of a corner from the origin, in sides of the image
_MAX_LENGTH = 10_000_000  # of an outline, in pixels


def decode_segmentation(segmentation: object, height: int, width: int) -> np.ndarray:
    """Decode a COCO ``segmentation`` into a mask.

    Args:
        segmentation: a list of polygons ``[[x0, y0, x1, y1, ...], ...]`` in pixels, whose union is the object; or an
            RLE dict ``{"size": [height, width], "counts": ...}`` with a list of run lengths or a compressed string.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        The mask, (H, W) bool.

    Raises:
        UserError: the segmentation is empty or malformed, or its size is not the image's.
    """
    if isinstance(segmentation, dict):
        return _decode_rle(segmentation, height, width)
    if not isinstance(segmentation, (list, tuple)):
        raise UserError(f"segmentation is {shown(segmentation)}: expected a list of polygons or an RLE dict")
    if not segmentation:
        raise UserError("segmentation is empty: expected at least one polygon, or an RLE dict for an empty mask")
    from faster_coco_eval.core import mask as coco

    polygons: Any = [_checked_polygon(polygon, _polygon_points(polygon), height, width) for polygon in segmentation]
    parts: Any = coco.frPyObjects(polygons, height, width)
    return _row_major(coco.decode(coco.merge(parts)))


def usable_segmentation(segmentation: object, height: int, width: int) -> tuple[Any, int]:
    """Check a COCO ``segmentation`` without drawing it, and leave out polygons without area.

    Labelling tools write such polygons (a click, a line, fewer than three corners) beside good ones.

    Args:
        segmentation, height, width: as for ``decode_segmentation``.

    Returns:
        A segmentation for ``decode_segmentation``, or an empty list if no polygon is left; and the number of polygons
        that were left out.

    Raises:
        UserError: the segmentation is malformed.
    """
    if isinstance(segmentation, dict):
        _decode_rle(segmentation, height, width)
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
    from faster_coco_eval.core import mask as coco

    rle = coco.encode(np.asfortranarray(_checked_mask(mask), dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Trace the outline of every 4-connected part of a mask. Decoding the polygons gives exactly the mask.

    COCO's polygons have no holes. A part's holes are joined to its outline by vertical cuts of no width, walked down
    and up again: the even-odd fill of COCO's tools (and the shoelace area) leaves the holes out.

    Args:
        mask: (H, W) bool.

    Returns:
        One polygon ``[x0, y0, x1, y1, ...]`` per part, corners only; no polygon for an empty mask.
    """
    if (box := mask_to_box(mask)) is None:
        return []
    left, top, right, bottom = box
    start, successor, outlines = _trace(mask[top:bottom, left:right])  # it takes time per pixel; objects are small
    polygons = []
    for first in outlines:
        walk = [first]
        while (edge := successor[walk[-1]]) != first:
            walk.append(edge)
        y, x = np.divmod(start[walk], right - left + 1)
        points = np.stack([x + left, y + top], axis=1)
        heading = np.sign(np.roll(points, -1, axis=0) - points)
        corner = (heading != np.roll(heading, 1, axis=0)).any(axis=1)
        polygons.append(points[corner].ravel().astype(float).tolist())
    return polygons


def _trace(mask: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Directed boundary edges of the pixels, foreground to the right, with holes joined to their outline.

    A vertex is a pixel corner, numbered y * (W + 1) + x. Headings: 0 right, 1 down, 2 left, 3 up.

    Returns:
        The vertex where each edge starts, the edge that follows each edge, and the first edge of every outline.
    """
    height, width = mask.shape
    row = width + 1
    padded = np.pad(mask, 1)
    # a pixel's upper edge, walked to the right, bounds the object where the pixel above is background; and so on
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
    # turning right first keeps to the same pixel where two pixels meet only at a corner: parts are 4-connected
    successor = np.where(right >= 0, right, np.where(ahead >= 0, ahead, left)).tolist()

    # in raster order, the first edge of a loop is an upper edge for an outline and a lower edge for a hole
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
        # a hole: a cut from its top left corner straight up to the first upper edge, whose loop was walked before; that
        # edge now leads down the cut and round the hole, and two new edges lead back up
        y, x = divmod(int(end[first]), row)
        column = upper_edges[:y, x]
        above = int(column[column >= 0][-1])
        up = len(successor)
        successor += [up + 1, successor[above]]
        successor[above], successor[first] = successor[first], up
        bridge_starts += [int(end[first]), int(start[above])]
    return np.concatenate([start, np.array(bridge_starts, dtype=start.dtype)]), successor, outlines


def _decode_rle(rle: dict[Any, Any], height: int, width: int) -> np.ndarray:
    """RLE dict -> mask, (H, W) bool; a UserError if it is malformed or does not cover the image."""
    from faster_coco_eval.core import mask as coco

    if "size" not in rle or "counts" not in rle:
        raise UserError(f"RLE {shown(rle)} lacks 'size' or 'counts': expected both")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise UserError(
            f"RLE of size {shown(size)} for an image of height {height} and width {width}: expected size "
            f"[{height}, {width}] (height first)"
        )
    runs = None if isinstance(counts, str | bytes) else _number_array(counts)
    if not isinstance(counts, str | bytes) and (runs is None or runs.dtype.kind not in "iu"):
        raise UserError(f"RLE counts are {shown(counts)}: expected a list of whole numbers, or a string")
    try:
        if runs is not None:
            packed: Any = coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
        else:
            packed = {"size": [height, width], "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
        return _row_major(coco.decode(packed))
    except (ValueError, RuntimeError):
        raise UserError(
            f"RLE counts {shown(counts)} are cut short, or do not add up to the {height * width} pixels of an image of "
            f"height {height} and width {width}: the segmentation is damaged or belongs to another image"
        ) from None


def _row_major(mask: np.ndarray) -> np.ndarray:
    """COCO's (H, W) uint8, whose columns are contiguous -> bool, whose rows are."""
    return mask.astype(bool, order="C")


def _polygon_points(polygon: object) -> np.ndarray:
    """A polygon's coordinates, (2P,) float64, or a UserError."""
    points = _number_array(polygon)
    if points is None and polygon != []:
        raise UserError(f"polygon is {shown(polygon)}: expected a flat list of numbers [x0, y0, x1, y1, ...]")
    return np.zeros(0) if points is None else points.astype(np.float64)


def _checked_polygon(polygon: object, points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The coordinates of a polygon, (2P,) float64, if it can be drawn; else a UserError."""
    if len(points) < 6 or len(points) % 2:
        raise UserError(f"polygon of {len(points)} numbers: expected an even count, 6 or more (x and y of each corner)")
    far = _MAX_DISTANCE * max(height, width)
    if not (np.abs(points) <= far).all():  # also false for NaN
        raise UserError(
            f"polygon {shown(polygon)} lies far outside its image of height {height} and width {width}: expected "
            "pixel coordinates"
        )
    if (
        len(points) * far > _MAX_LENGTH
        and (length := np.abs(np.diff(points.reshape(-1, 2), axis=0)).sum()) > _MAX_LENGTH
    ):
        raise UserError(f"polygon {shown(polygon)} is {length:.0f} pixels long: expected the outline of an object")
    return points


def _has_area(points: np.ndarray) -> bool:
    """Whether a polygon of coordinates (2P,) encloses anything."""
    x, y = points[::2] - points[0], points[1::2] - points[1]
    if abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) > 1e-6:
        return True
    return bool(np.abs(x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 1e-6)  # such as the two halves of a bow tie


def _number_array(values: object) -> np.ndarray | None:
    """A flat sequence of numbers as an array; None for anything else."""
    if not isinstance(values, np.ndarray):  # an array made from text could be vast
        kinds = set(map(type, values)) if isinstance(values, Sequence) else {type(values)}
        if not all(issubclass(kind, int | float | np.number) and kind is not bool for kind in kinds):
            return None
    array = np.asarray(values)
    return array if array.ndim == 1 and array.dtype.kind in "iuf" else None


def _checked_mask(mask: np.ndarray) -> np.ndarray:
    # a mask of probabilities or of 0 and 255 would silently become True nearly everywhere
    if mask.ndim != 2 or mask.dtype != bool:
        raise TypeError(f"mask of shape {mask.shape} and dtype {mask.dtype}: expected (H, W) bool")
    return mask
