"""The part of COCO's instances.json that a split's references need, checked before a run starts.

Nearly all of the file is polygons, of which a split needs few. Two regular expressions keep `json` from parsing them:
one cuts them out of the file, which takes a sixth of the time and less than half of the memory; the other knows most
polygons to be sound, which parsing them would double the time for. Segmentations stay JSON until a mask is asked for:
as lists of floats they would take ten times the memory, in every worker of a data loader.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmmasksd.data.images import MAX_PIXELS
from cmmasksd.data.masks import usable_segmentation
from cmmasksd.data.readers.fields import parse_json, whole_number
from cmmasksd.data.samples import Reference
from cmmasksd.errors import UserError, shown
from cmmasksd.files import safe_path


class ImageFile(NamedTuple):
    """An image's file, and its size in pixels."""

    path: str
    height: int
    width: int


def read_instances(
    path: Path, image_folder: Path, references: Sequence[Reference], left_out: Counter[str]
) -> tuple[dict[int, ImageFile], dict[int, bytes]]:
    """Read what references need.

    Args:
        path: instances.json.
        image_folder: folder of the image files.
        references: the references of a split.
        left_out: the polygons without area that were left out are counted here.

    Returns:
        The images by image_id, and the segmentations (JSON) by ann_id. An annotation without area has none.

    Raises:
        UserError: the file is damaged, or does not fit the references.
    """
    content = path.read_bytes()
    image_records, annotation_records = parse_instances(content, path)
    images = _images(image_records, {reference.image_id for reference in references}, image_folder, path)
    needed = {ann_id for reference in references for ann_id in reference.ann_ids}
    annotations = _annotations(annotation_records, needed, path)
    for reference in references:
        for ann_id in reference.ann_ids:
            if (image_id := annotations[ann_id][0]) != reference.image_id:
                raise UserError(
                    f"{path}: annotation {ann_id} lies in image {image_id}, but reference {reference.ref_id}, which "
                    f"names it, in image {reference.image_id}: the two files are not of the same release"
                )
    segmentations: dict[int, bytes] = {}
    for ann_id, (image_id, segmentation) in annotations.items():
        _, *size = images[image_id]
        try:
            match segmentation:
                case [[int(start), int(end)]]:
                    text = content[start:end]
                    if _is_sound(text, *size):
                        segmentations[ann_id] = text
                        continue
                case _:  # RLE, or something wrong
                    text = json.dumps(segmentation).encode()
            usable, without_area = usable_segmentation(json.loads(text), *size)
            if usable:
                segmentations[ann_id] = json.dumps(usable).encode() if without_area else text
        except (ValueError, RecursionError) as error:  # our own UserError, or JSON's
            raise UserError(f"annotation {ann_id} of {path}: {error}; download the file again") from None
        if without_area:
            left_out["polygons without area"] += without_area
    return images, segmentations


_POLYGONS = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[[-+0-9.eE,\s\[\]]*\]\s*\])')


def parse_instances(
    content: bytes, path: Path, keys: Sequence[str] = ("images", "annotations")
) -> list[list[dict[str, Any]]]:
    """The lists of records with these keys, polygons replaced by [[start, end]], their place in the file."""
    shortened = _POLYGONS.sub(lambda match: b'"segmentation":[[%d,%d]]' % match.span(1), content)
    parsed = parse_json(shortened, str(path), "download it again from its release")
    lists = []
    for key in keys:
        records = parsed.get(key) if isinstance(parsed, dict) else None
        if not isinstance(records, list):
            raise UserError(f"{path} has no list {key!r}: expected COCO's instances format")
        if wrong := [nth for nth, record in enumerate(records, start=1) if not isinstance(record, dict)]:
            raise UserError(f"{path}: entry {wrong[0]} of {key!r} is {shown(records[wrong[0] - 1])}: expected {{...}}")
        lists.append(records)
    return lists


def _images(
    records: list[dict[str, Any]], needed: Collection[int], image_folder: Path, path: Path
) -> dict[int, ImageFile]:
    """The needed images by image_id."""
    images: dict[int, ImageFile] = {}
    for record in records:
        image_id = whole_number(record, "id", f"{path}: an image")
        if image_id not in needed:
            continue
        where = f"{path}: image {image_id}"
        height, width = whole_number(record, "height", where), whole_number(record, "width", where)
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            raise UserError(f"{where} is {width}x{height} pixels: expected 1 to {MAX_PIXELS} pixels")
        # a folder of links to COCO's files is common
        file = safe_path(image_folder, record.get("file_name"), f"{where}: file_name", outward_links=True)
        image = ImageFile(str(file), height, width)
        if images.setdefault(image_id, image) != image:
            raise UserError(f"{where} appears twice, with different files or sizes: remove one of them")
    _require_all("image", needed, images, path)
    return images


def _annotations(records: list[dict[str, Any]], needed: Collection[int], path: Path) -> dict[int, tuple[int, object]]:
    """The image_id and the segmentation of the needed annotations by ann_id."""
    annotations: dict[int, tuple[int, object]] = {}
    for record in records:
        ann_id = whole_number(record, "id", f"{path}: an annotation")
        if ann_id not in needed:
            continue
        where = f"{path}: annotation {ann_id}"
        if ann_id in annotations:
            raise UserError(f"{where} appears twice: remove one of them")
        segmentation = record.get("segmentation")
        if segmentation is None:
            raise UserError(f"{where} has no segmentation: a box alone gives no mask, add its polygons or RLE")
        annotations[ann_id] = whole_number(record, "image_id", where), segmentation
    _require_all("annotation", needed, annotations, path)
    return annotations


def _require_all(kind: str, needed: Collection[int], given: Collection[int], path: Path) -> None:
    if absent := sorted(set(needed).difference(given)):
        raise UserError(
            f"{path} lacks {len(absent)} of {len(needed)} {kind} ids that the refs file names, such as {absent[0]}: "
            "the two files are not of the same release"
        )


# At most 2,003 corners with coordinates below 1,000 (never far outside an image of 100 pixels), the first three not on
# one line
_NUMBER = rb"((?:0|[1-9][0-9]{0,2})(?:\.[0-9]{1,9})?)"
_SOUND = re.compile(
    rb"\[\["
    + rb", ?".join([_NUMBER] * 6)
    + rb"(?:, ?N, ?N){0,2000}+\]\]".replace(b"N", _NUMBER.replace(b"(", b"(?:", 1))
)


def _is_sound(polygons: bytes, height: int, width: int) -> bool:
    """Whether `usable_segmentation` is known to take the polygons (JSON) as they are, without a closer look."""
    if max(height, width) < 100 or not (match := _SOUND.fullmatch(polygons)):
        return False
    x0, y0, x1, y1, x2, y2 = map(float, match.groups())
    return abs((x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)) > 1e-3
