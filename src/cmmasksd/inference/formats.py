"""Segmentations in the formats of other tools (COCO, labelme, supervision), and one image of them all with a legend.

All functions take the list that `Segmenter.segment` returns, the segmentations of one image. Sentences become the names
of categories and labels. An empty mask gives no annotation. Boxes are (x0, y0, x1, y1) here and in supervision,
half-open, but [x, y, width, height] in COCO.

Unusual: polygons run along the edges of the pixels, so tools that fill them by pycocotools get the exact mask back. A
hole is joined to its outline by a cut of no width, since neither format has holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cmmasksd.errors import UserError
from cmmasksd.inference.visualize import PALETTE, overlay

if TYPE_CHECKING:
    from cmmasksd.inference.base import Segmentation


def to_coco(segmentations: Sequence[Segmentation], *, file_name: str = "image", image_id: int = 1) -> dict[str, Any]:
    """A COCO data set (instances.json) with one image.

    Args:
        segmentations: segmentations of one image.
        file_name: name of the image in the data set.
        image_id: id of the image in the data set.

    Returns:
        A dict ready for JSON: the image, annotations with polygons, area, bbox, our score and the sentence, and one
        category per distinct sentence.

    Raises:
        UserError: the list is empty, or has segmentations of several images.
    """
    height, width = _image_of(segmentations).shape[:2]
    names = list(dict.fromkeys(segmentation.text for segmentation in segmentations))
    annotations = []
    for segmentation in segmentations:
        if segmentation.box is None:
            continue
        x0, y0, x1, y1 = segmentation.box
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": names.index(segmentation.text) + 1,
                "segmentation": segmentation.polygons,
                "area": segmentation.area,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
                "score": segmentation.score,
                "expression": segmentation.text,
            }
        )
    return {
        "info": {"description": "cmmasksd"},
        "licenses": [],
        "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
        "annotations": annotations,
        "categories": [{"id": index, "name": name, "supercategory": ""} for index, name in enumerate(names, start=1)],
    }


def merge_coco(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One COCO data set from those of single images, which `to_coco` returns. Ids are given anew."""
    categories: dict[str, int] = {}
    images, annotations = [], []
    for image_id, part in enumerate(parts, start=1):
        names = {category["id"]: category["name"] for category in part["categories"]}
        images.append(part["images"][0] | {"id": image_id})
        for annotation in part["annotations"]:
            name = names[annotation["category_id"]]
            category_id = categories.setdefault(name, len(categories) + 1)
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
            annotations.append(annotation | ids)
    return {
        "info": {"description": "cmmasksd"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": name, "supercategory": ""} for name, index in categories.items()],
    }


def to_labelme(segmentations: Sequence[Segmentation], *, file_name: str) -> dict[str, Any]:
    """A labelme file: save it as JSON beside the image and open it to correct the outlines.

    Args:
        segmentations: segmentations of one image.
        file_name: path of the image, relative to the JSON file.

    Returns:
        A dict ready for JSON. Parts of one mask share their group_id; the score is in the description.

    Raises:
        UserError: the list is empty, or has segmentations of several images.
    """
    height, width = _image_of(segmentations).shape[:2]
    shapes = [
        {
            "label": segmentation.text,
            "points": np.reshape(polygon, (-1, 2)).tolist(),
            "group_id": group,
            "description": f"score {segmentation.score:.3f}",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for group, segmentation in enumerate(segmentations, start=1)
        for polygon in segmentation.polygons
    ]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": file_name,
        "imageData": None,  # labelme reads it from imagePath
        "imageHeight": height,
        "imageWidth": width,
    }


def to_detections(segmentations: Sequence[Segmentation]) -> Any:
    """A `supervision.Detections`, for its annotators, trackers and metrics.

    Returns:
        xyxy, mask, confidence (our score), class_id (index of the sentence among the distinct sentences) and
        data["class_name"] (the sentence).

    Raises:
        UserError: supervision is not installed, the list is empty, or has segmentations of several images.
    """
    try:
        import supervision  # pyright: ignore (an optional package)
    except ImportError as error:
        raise UserError(f"detections need the package supervision ({error}): pip install supervision") from None
    height, width = _image_of(segmentations).shape[:2]
    names = list(dict.fromkeys(segmentation.text for segmentation in segmentations))
    boxes = [(segmentation, segmentation.box) for segmentation in segmentations if segmentation.box is not None]
    return supervision.Detections(
        xyxy=np.array([box for _, box in boxes], dtype=np.float32).reshape(-1, 4),
        mask=np.array([segmentation.mask for segmentation, _ in boxes], dtype=bool).reshape(-1, height, width),
        confidence=np.array([segmentation.score for segmentation, _ in boxes], dtype=np.float32),
        class_id=np.array([names.index(segmentation.text) for segmentation, _ in boxes], dtype=int),
        data={"class_name": np.array([segmentation.text for segmentation, _ in boxes], dtype=str)},
    )


def overlay_all(segmentations: Sequence[Segmentation], *, alpha: float = 0.5, legend: bool = True) -> np.ndarray:
    """All masks in one image, each in its colour, over a legend of sentences and scores.

    Args:
        segmentations: segmentations of one image; colours repeat after seven masks.
        alpha: share of the colours, 0 to 1.
        legend: add the legend below the image. Its font has Latin letters only.

    Returns:
        (H + height of the legend, W, 3) uint8.

    Raises:
        UserError: the list is empty, or has segmentations of several images.
    """
    drawn = _image_of(segmentations)
    for index, segmentation in enumerate(segmentations):
        drawn = overlay(drawn, segmentation.mask, PALETTE[index % len(PALETTE)], alpha)
    if not legend:
        return drawn
    from PIL import Image, ImageDraw, ImageFont

    width = drawn.shape[1]
    size = max(10, round(max(drawn.shape) / 40))
    font = ImageFont.load_default(size)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    entries = []
    for segmentation in segmentations:
        lines = [""]
        result = f"{segmentation.score:.2f}" if segmentation.mask.any() else "nothing found"
        for word in f"{segmentation.text} ({result})".split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and measure(longer, font) > width - 2.5 * size:
                lines.append(word)
            else:
                lines[-1] = longer
        entries.append(lines)
    step = round(1.4 * size)
    strip = Image.new("RGB", (width, step * sum(map(len, entries)) + size), "white")
    draw = ImageDraw.Draw(strip)
    top = size // 2
    for index, lines in enumerate(entries):
        square = (size // 2, top + size // 8, size // 2 + size, top + size // 8 + size)
        draw.rectangle(square, fill=PALETTE[index % len(PALETTE)], outline="black")
        for line in lines:
            draw.text((2 * size, top), line, "black", font)
            top += step
    return np.concatenate([drawn, np.asarray(strip)])


def _image_of(segmentations: Sequence[Segmentation]) -> np.ndarray:
    """The image that all segmentations share, (H, W, 3) uint8."""
    if not segmentations:
        raise UserError("the list of segmentations is empty: give the list that Segmenter.segment returns")
    image = segmentations[0].image
    for segmentation in segmentations[1:]:
        if segmentation.image is not image and not np.array_equal(segmentation.image, image):
            raise UserError("the segmentations are of several images: give those of one image")
    return image
