"""Annotated photographs: images and regions with class names, as labelling tools export them.

    instances.json          COCO (also CVAT, Roboflow, FiftyOne); sentences in `expression`, `caption` or `sentences`
    data.yaml, or a folder  YOLO segmentation; without data.yaml, labelme files whose labels are classes
    annotations.xml         CVAT for images
    a JSON list             Label Studio

Beside COCO's own fields two optional ones of an annotation are read: `verified` (0: the mask may hold several objects,
such as a connected component of a class) and `order` (the depth order of COCO-Amodal, 1 is the nearest).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmmasksd.data.images import MAX_PIXELS, stored_size
from cmmasksd.data.masks import decode_segmentation, mask_to_rle, usable_segmentation
from cmmasksd.data.readers.cvat import read_cvat
from cmmasksd.data.readers.fields import text, whole_number
from cmmasksd.data.readers.instances import parse_instances
from cmmasksd.data.readers.label_studio import read_label_studio
from cmmasksd.data.readers.labelme import read_labelme
from cmmasksd.data.readers.records import Records, sentences
from cmmasksd.data.readers.rows import Row, read_expressions
from cmmasksd.data.readers.yolo import read_yolo
from cmmasksd.data.samples import require_expression
from cmmasksd.errors import UserError, shown
from cmmasksd.files import safe_path

log = logging.getLogger(__name__)

_YOLO_FILES = ("data.yaml", "data.yml", "dataset.yaml")


@dataclass(frozen=True, slots=True)
class Annotation:
    """An annotation whose mask is not decoded: `segmentation` is COCO's, or its place in the file."""

    ann_id: int
    category: str
    segmentation: Any
    crowd: bool
    verified: bool
    order: int | None
    expressions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image and its annotations; `path` is None where there are no image files."""

    file_name: str
    path: Path | None
    height: int
    width: int
    annotations: tuple[Annotation, ...]


class AnnotatedImages:
    """The images of one file or folder of annotations.

    Args:
        path: the file, or the folder of a YOLO data set or of labelme files.
        image_folder: folder of the image files; by default `images` beside the file, or else the file's own folder.
            Folders of YOLO and labelme hold their images.
        class_name: how a class's name is written.

    Attributes:
        path: the file.
        images: images in the order of the file.
        categories: class -> number of annotations in the file, for all classes that it labels.
        left_out: number of shapes that have no mask, by reason.
        image_folder: None where no image file was found.

    Raises:
        UserError: the file is damaged or not in a known format, names a path outside the folder, or the folder
            does not exist.
    """

    def __init__(self, path: Path, image_folder: Path | None = None, *, class_name: Callable[[str], str] = str) -> None:
        if not path.exists():
            raise UserError(f"annotations {path} do not exist: give the file that the labelling tool exported")
        if image_folder is not None and not image_folder.is_dir():
            raise UserError(f"image folder {image_folder} does not exist: check the path")
        self._content = b""  # of a COCO file, whose polygons stay JSON
        self._assumed_upright = False
        if path.is_dir():
            path = next((path / name for name in _YOLO_FILES if (path / name).is_file()), path)
        self.path = path
        suffix = path.suffix.lower()
        if image_folder is not None and (path.is_dir() or suffix in (".yaml", ".yml")):
            raise UserError(f"{path} holds its images: leave out their folder")
        if path.is_dir():
            image_folder, records = path, read_labelme(path)
        elif suffix in (".yaml", ".yml"):
            image_folder, records = path.parent, read_yolo(path)
        elif suffix == ".xml":
            records = read_cvat(path)
        elif _starts_with_list(path):
            records = read_label_studio(path, image_folder)
        else:
            self._content = path.read_bytes()
            parts = parse_instances(self._content, path, ("images", "annotations", "categories"))
            records = Records(parts[0], parts[1], parts[2])
        self.left_out = records.left_out
        images, annotations = records.images, records.annotations
        names = _categories(records.categories, path, class_name)
        by_image = _annotations(annotations, names, path)
        self.categories = Counter(dict.fromkeys(names.values(), 0))
        self.categories.update(annotation.category for group in by_image.values() for annotation in group)
        files: dict[int, tuple[str, int, int]] = {}
        for record in images:
            image_id = whole_number(record, "id", f"{path}: an image")
            where = f"{path}: image {image_id}"
            size = whole_number(record, "height", where), whole_number(record, "width", where)
            if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
                raise UserError(f"{where} is {size[1]}x{size[0]} pixels: expected 1 to {MAX_PIXELS} pixels")
            if image_id in files:
                raise UserError(f"{where} appears twice: remove one of them")
            folder = image_folder or path.parent
            safe_path(folder, record.get("file_name"), f"{where}: file_name", outward_links=True)
            files[image_id] = record["file_name"].replace("\\", "/"), *size
        if absent := sorted(by_image.keys() - files.keys()):
            raise UserError(f"{path}: an annotation names image {absent[0]}, which is not in the file: add the image")
        self.image_folder = image_folder or _image_folder(path, [name for name, *_ in files.values()])
        self.images = []
        for image_id, (name, height, width) in files.items():
            file = None
            if self.image_folder is not None:
                where = f"{path}: image {image_id}: file_name"
                file = safe_path(self.image_folder, name, where, outward_links=True)
            self.images.append(AnnotatedImage(name, file, height, width, tuple(by_image.get(image_id, ()))))

    def is_upright(self, image: AnnotatedImage) -> bool:
        """Whether the masks of an image are drawn on it as EXIF turns it, rather than on its stored pixels.

        The size tells, unless EXIF turns by 180°, mirrors, or turns a square. Then the answer is yes: labelling tools
        (CVAT, Label Studio, labelme) show images upright, and trainers of YOLO read them so. A COCO file may come from
        elsewhere, so the first such image is logged.

        Raises:
            UserError: the image is damaged, or of another size than its annotations.
        """
        assert image.path is not None
        size, (stored, turn) = (image.height, image.width), stored_size(image.path)
        upright = stored[::-1] if turn >= 5 else stored
        if size not in (stored, upright):
            raise UserError(
                f"image {image.path} is {upright[1]}x{upright[0]} pixels and its annotations are for "
                f"{image.width}x{image.height}: use the images that were annotated"
            )
        if turn > 1 and stored == upright and self._content and not self._assumed_upright:
            self._assumed_upright = True
            log.warning(
                "%s is taken to be annotated upright, as labelling tools show it, since its size does not tell (EXIF "
                "orientation %d): if %s is about the stored pixels, remove the orientation from its images",
                *(image.path, turn, self.path),
            )
        return turn > 1 and size == upright

    def mask(self, image: AnnotatedImage, annotation: Annotation) -> np.ndarray | None:
        """The mask of an annotation, (H, W) bool; None where it has no area.

        Raises:
            UserError: the segmentation is malformed.
        """
        segmentation = annotation.segmentation
        try:
            match segmentation:
                case [[int(start), int(end)]]:
                    segmentation = json.loads(self._content[start:end])
            usable, _ = usable_segmentation(segmentation, image.height, image.width)
            mask = decode_segmentation(usable, image.height, image.width) if usable else None
        except (ValueError, RecursionError) as error:  # our own UserError, or JSON's
            raise UserError(f"{self.path}: annotation {annotation.ann_id}: {error}") from None
        return mask if mask is not None and mask.any() else None


def _starts_with_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _categories(records: list[dict[str, Any]], path: Path, class_name: Callable[[str], str]) -> dict[int, str]:
    names: dict[int, str] = {}
    for record in records:
        category_id = whole_number(record, "id", f"{path}: a category")
        where = f"{path}: category {category_id}"
        name = text(record, "name", where)
        require_expression(name, f"{where}: its name")
        if len(name) > 100:
            raise UserError(f"{where} has the name {shown(name)}: expected at most 100 characters")
        if category_id in names:
            raise UserError(f"{where} appears twice: remove one of them")
        names[category_id] = class_name(name)
    return names


def _annotations(records: list[dict[str, Any]], names: dict[int, str], path: Path) -> dict[int, list[Annotation]]:
    """The annotations by image_id."""
    by_image: dict[int, list[Annotation]] = {}
    seen: set[int] = set()
    for record in records:
        ann_id = whole_number(record, "id", f"{path}: an annotation")
        where = f"{path}: annotation {ann_id}"
        if ann_id in seen:
            raise UserError(f"{where} appears twice: remove one of them")
        seen.add(ann_id)
        category_id = whole_number(record, "category_id", where)
        if category_id not in names:
            raise UserError(f"{where} has category_id {category_id}, which is not in the file: add the category")
        crowd, verified, order = record.get("iscrowd", 0), record.get("verified", 1), record.get("order")
        for key, value in (("iscrowd", crowd), ("verified", verified)):
            if value not in (0, 1) or isinstance(value, float):
                raise UserError(f"{where} has {key!r} {shown(value)}: expected 0 or 1")
        if order is not None and (type(order) is not int or order.bit_length() > 63):
            raise UserError(f"{where} has 'order' {shown(order)}: expected a whole number")
        by_image.setdefault(whole_number(record, "image_id", where), []).append(
            Annotation(
                ann_id,
                names[category_id],
                record.get("segmentation"),
                bool(crowd),
                bool(verified),
                order,
                tuple(_sentences(record, where)),
            )
        )
    return by_image


def _sentences(record: dict[str, Any], where: str) -> list[str]:
    attributes = record.get("attributes")  # CVAT writes them into COCO files
    return sentences(record, where) or (sentences(attributes, where) if isinstance(attributes, dict) else [])


def _image_folder(path: Path, names: list[str]) -> Path | None:
    """The folder beside a file of instances that holds its images."""
    for folder in (path.parent / "images", path.parent):
        if any((folder / name).is_file() for name in names):
            return folder
    return None


def expression_rows(path: Path) -> Iterator[Row]:
    """One row per object of an annotation file that has sentences.

    Raises:
        UserError: the file is damaged, has no sentence, or its images are not beside it.
    """
    file = AnnotatedImages(path)
    annotated = [(image, a) for image in file.images for a in image.annotations if a.expressions]
    if not annotated:
        raise UserError(
            f"{path} has no sentence: write sentences with `cmmasksd data expressions --instances {path} --out "
            "FILE.jsonl`"
        )
    if file.image_folder is None:
        raise UserError(f"{path} has no image file beside it or in images: put the file there")
    if file.left_out:
        log.warning("%s: left out: %s", path, ", ".join(f"{reason} ({n})" for reason, n in file.left_out.items()))
    for image in {image.file_name: image for image, _ in annotated}.values():
        if image.path is not None and image.path.is_file():
            file.is_upright(image)
    for image, annotation in annotated:
        where = f"{path}: annotation {annotation.ann_id}"
        mask = None if annotation.segmentation is None else file.mask(image, annotation)
        if mask is None:
            raise UserError(f"{where} has a sentence and no mask: draw the outline of its object")
        image_path = safe_path(file.image_folder, image.file_name, f"{where}: image")
        yield Row(where, image_path, read_expressions(list(annotation.expressions), where), mask_to_rle(mask))
