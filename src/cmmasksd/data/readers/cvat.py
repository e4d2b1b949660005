"""CVAT's XML "for images 1.1": polygons, masks, ellipses and boxes; sentences in an attribute such as `expression`.

Shapes of one label with the same group id (not 0) are one object. Points, polylines, cuboids and skeletons have no mask
and are counted as left out.

A file with a DTD is refused: only a DTD can declare entities, whose expansion exhausts memory or reads other files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmmasksd.data.images import MAX_PIXELS
from cmmasksd.data.masks import decode_segmentation, mask_to_rle
from cmmasksd.data.readers.records import Records, ellipse, number, read_utf8, rotated, sentences
from cmmasksd.errors import UserError, reason, shown

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_SHAPES = ("polygon", "mask", "ellipse", "box")
_WITHOUT_MASK = ("points", "polyline", "cuboid", "skeleton")


def read_cvat(path: Path) -> Records:
    """The objects of a CVAT file.

    Raises:
        UserError: the file is damaged, has a DTD, or is of another format of CVAT.
    """
    root = _parsed(path)
    if root.tag != "annotations" or root.find("image") is None:
        raise UserError(f"{path} has no images with annotations: export the task as 'CVAT for images 1.1'")
    records = Records()
    for image in root.findall("image"):
        name = image.get("name")
        where = f"{path}: image {shown(name)}"
        height, width = _whole(image, "height", where), _whole(image, "width", where)
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise UserError(f"{where} is {width}x{height} pixels: expected 1 to {MAX_PIXELS} pixels")
        image_id = records.add_image(name, height, width)
        records.left_out.update(f"{s.tag} shapes without mask" for s in image if s.tag in _WITHOUT_MASK)
        objects: dict[object, list[tuple[str, Element]]] = {}
        for shape_number, shape in enumerate((s for s in image if s.tag in _SHAPES), start=1):
            group = shape.get("group_id") or "0"
            key = ("shape", shape_number) if group == "0" else (shape.get("label"), group)
            objects.setdefault(key, []).append((f"{where}, shape {shape_number}", shape))
        for parts in objects.values():
            first, shape = parts[0]
            label = shape.get("label")
            if label is None:
                raise UserError(f"{first} has no label: give it a class")
            texts: dict[str, None] = {}
            for place, part in parts:
                attributes = {a.get("name", "").casefold(): a.text for a in part.findall("attribute")}
                texts.update(dict.fromkeys(sentences(attributes, place)))
            segmentations = [_segmentation(part, place, height, width) for place, part in parts]
            box = any(part.tag == "box" for _, part in parts)
            records.add_object(
                image_id, label, _union(segmentations, height, width, first), first, box=box, expressions=texts
            )
    return records


def _parsed(path: Path) -> Element:
    from xml.etree import ElementTree

    text = read_utf8(path)
    if "<!DOCTYPE" in text:
        raise UserError(f"{path} has a DTD, which CVAT never writes: remove it")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is not XML ({reason(error)}): export it again from CVAT") from None


def _whole(element: Element, key: str, where: str) -> int:
    value = element.get(key)
    if value is None or not value.isascii() or not value.isdigit() or len(value) > 9:
        raise UserError(f"{where} has {key!r} {'missing' if value is None else shown(value)}: expected a whole number")
    return int(value)


def _segmentation(shape: Element, where: str, height: int, width: int) -> Any:
    """The shape as a COCO segmentation."""
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{where} has the points {shown(shape.get('points'))}: expected x,y;x,y;...")
        return [[number(value, where, "a point") for pair in pairs for value in pair]]
    if shape.tag == "mask":
        return mask_to_rle(_mask(shape, where, height, width))
    keys = ("cx", "cy", "rx", "ry") if shape.tag == "ellipse" else ("xtl", "ytl", "xbr", "ybr")
    a, b, c, d = (number(shape.get(key), where, f"{key!r}") for key in keys)
    if shape.tag == "ellipse":
        points, centre = ellipse(a, b, c, d), (a, b)
    else:
        points, centre = np.array([(a, b), (c, b), (c, d), (a, d)]), ((a + c) / 2, (b + d) / 2)
    return [rotated(points, centre, number(shape.get("rotation", "0"), where, "'rotation'")).ravel().tolist()]


def _mask(shape: Element, where: str, height: int, width: int) -> np.ndarray:
    """A shape of the kind "mask", (H, W) bool: run lengths along the rows of a rectangle, background first."""
    left, top, w, h = (_whole(shape, key, where) for key in ("left", "top", "width", "height"))
    if left + w > width or top + h > height:
        raise UserError(f"{where} is a mask that leaves its image of {width}x{height} pixels: export it again")
    try:
        runs = [int(run) for run in (shape.get("rle") or "").split(",")]
    except ValueError:
        runs = [-1]
    if min(runs) < 0 or sum(runs) != w * h:
        raise UserError(f"{where} has the rle {shown(shape.get('rle'))}, which does not fill {w}x{h}: export it again")
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + h, left : left + w] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)
    return mask


def _union(segmentations: list[Any], height: int, width: int, where: str) -> Any:
    """One segmentation of all parts of an object."""
    if len(segmentations) == 1:
        return segmentations[0]
    if all(isinstance(segmentation, list) for segmentation in segmentations):
        return [polygon for segmentation in segmentations for polygon in segmentation]
    try:
        return mask_to_rle(np.any([decode_segmentation(part, height, width) for part in segmentations], axis=0))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
