"""labelme files: their objects as rows of a manifest, and their shapes as masks."""

from __future__ import annotations

import base64
import math
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cmmasksd.data.images import image_size, read_mask
from cmmasksd.data.masks import decode_segmentation, mask_to_rle
from cmmasksd.data.readers.fields import parse_json
from cmmasksd.data.readers.records import Records
from cmmasksd.data.readers.rows import Row, Shapes, read_expressions
from cmmasksd.errors import UserError, shown
from cmmasksd.files import safe_path


def labelme_rows(file: Path, root: Path) -> Iterator[Row]:
    """One row per object of a labelme file.

    Args:
        file: the labelme file.
        root: folder that it must not lead out of.
    """
    image, objects, size = _objects(file, root)
    shape_of: dict[str, int] = {}  # by sentence
    for parts in objects:
        first = parts[0][0]
        where = f"{file}, shape {first}"
        texts = read_expressions([text for _, shape in parts for text in shape["label"].split("|")], where)
        for text in texts:
            if (other := shape_of.setdefault(text.casefold(), first)) != first:
                raise UserError(
                    f"{where}: the sentence {shown(text)} also names shape {other}: give both the same group_id if "
                    "they are parts of one object, else write sentences that tell them apart"
                )
        yield Row(where, image, tuple(dict.fromkeys(texts)), Shapes([shape for _, shape in parts], size))


def read_labelme(root: Path) -> Records:
    """The objects of a folder of labelme files whose labels are classes.

    Raises:
        UserError: a file is damaged, or there is none.
    """
    files = sorted(root.rglob("*.json"))
    if not files:
        raise UserError(f"{root} has neither data.yaml nor labelme files (.json): give the annotations of another tool")
    records = Records()
    for file in files:
        image, objects, stated = _objects(file, root)
        size = image_size(image, exif=True)
        image_id = records.add_image(image.relative_to(root).as_posix(), *size)
        for parts in objects:
            number, shape = parts[0]
            where = f"{file}, shape {number}"
            try:
                mask = labelme_mask(Shapes([part for _, part in parts], stated), size)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            records.add_object(image_id, shape["label"], mask_to_rle(mask), where)
    return records


def labelme_mask(shapes: Shapes, size: tuple[int, int]) -> np.ndarray:
    """The union of labelme shapes, (H, W) bool; size is the image's (height, width)."""
    stated_height, stated_width = shapes.size
    if None not in shapes.size and shapes.size != size:
        raise UserError(
            f"it was labelled at {shown(stated_width)}x{shown(stated_height)} pixels and its image has "
            f"{size[1]}x{size[0]}: use the image that was labelled"
        )
    union = np.zeros(size, dtype=bool)
    for shape in shapes.shapes:
        kind = shape.get("shape_type", "polygon")
        points = _points(shape.get("points"))
        if points is None:
            raise UserError(f"its points are {shown(shape.get('points'))}: expected [[x, y], ...]")
        if kind in ("rectangle", "circle", "mask") and len(points) != 2:
            raise UserError(f"a {kind} has {len(points)} points: expected two")
        if kind == "mask":
            union |= _pasted(shape.get("mask"), points, size)
            continue
        if kind == "rectangle":
            (x0, y0), (x1, y1) = points
            points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        elif kind == "circle":  # its centre, and a point on it
            angles = np.arange(0, 2 * math.pi, math.pi / 64)
            points = points[0] + math.dist(*points) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        elif kind != "polygon":
            raise UserError(f"a shape of the type {shown(kind)} has no area: draw a polygon, rectangle, circle or mask")
        union |= decode_segmentation([points.ravel().tolist()], *size)
    return union


def _points(points: object) -> np.ndarray | None:
    """labelme's points as (P, 2) float64; None where they are anything else."""
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        return None
    numbers = [number for point in points for number in point]
    if not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers):  # also false for NaN
        return None
    return np.array(numbers, dtype=np.float64).reshape(-1, 2)


def _pasted(encoded: object, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A shape of the type "mask", (H, W) bool: a PNG in base64 that fills the rectangle of its two points."""
    if not isinstance(encoded, str):
        raise UserError("a shape of the type 'mask' has no 'mask': save it again with labelme")
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise UserError(f"its mask is not base64 ({error}): save it again with labelme") from None
    part = read_mask(content)
    (left, top), (right, bottom) = points.round().astype(int)
    whole = np.zeros(size, dtype=bool)
    rectangle = whole[max(top, 0) : bottom + 1, max(left, 0) : right + 1]
    if min(left, top) < 0 or rectangle.shape != part.shape:
        raise UserError(
            f"its mask of {part.shape} does not fit its points {points.tolist()}: save it again with labelme"
        )
    rectangle |= part
    return whole


def _objects(file: Path, root: Path) -> tuple[Path, list[list[tuple[int, dict[str, Any]]]], tuple[Any, Any]]:
    """The image of a labelme file, the numbered shapes of each object, and the stated (height, width)."""
    content = parse_json(file.read_bytes(), str(file), "save it again with labelme")
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not isinstance(content.get("imagePath"), str):
        raise UserError(
            f"{file} is not a labelme file (no 'shapes' or no 'imagePath'): move it out of {root}, or give the file "
            "itself if it is COCO's or Label Studio's"
        )
    name = posixpath.join(file.parent.relative_to(root).as_posix(), content["imagePath"].replace("\\", "/"))
    image = safe_path(root, name, f"{file}: imagePath")
    objects: dict[object, list[tuple[int, dict[str, Any]]]] = {}
    for number, shape in enumerate(shapes, start=1):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise UserError(f"{file}, shape {number} has no label: give it a sentence")
        group = shape.get("group_id")
        if not isinstance(group, int | str | None) or len(str(group)) > 100:
            raise UserError(f"{file}, shape {number} has the group_id {shown(group)}: expected a whole number or null")
        objects.setdefault(("shape", number) if group is None else str(group), []).append((number, shape))
    return image, list(objects.values()), (content.get("imageHeight"), content.get("imageWidth"))
