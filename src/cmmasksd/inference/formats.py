"""Segmentations in the formats of other tools (COCO, labelme, supervision), and one image of them all.

All functions take the list that `Segmenter.segment` returns, the segmentations of one image. Sentences become the names
of categories and labels. Boxes are (x0, y0, x1, y1) here and in supervision, half-open, but [x, y, width, height] in
COCO.

An empty mask gives no annotation, since these formats have no object without pixels, and a model that misses an object
must not teach that there is none. COCO keeps the image and the category, so that the object can be drawn.

Unusual: polygons run along the edges of the pixels, so tools that fill them by pycocotools get the exact mask back. A
hole is joined to its outline by a cut of no width, since neither format has holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cmmasksd.errors import UserError
from cmmasksd.inference.visualize import FILL, PALETTE, Drawing

if TYPE_CHECKING:
    from cmmasksd.inference.base import Segmentation


def to_coco(segmentations: Sequence[Segmentation], *, file_name: str = "image", image_id: int = 1) -> dict[str, Any]:
    """A COCO data set (instances.json) with one image.

    Args:
        segmentations: segmentations of one image.
        file_name: name of the image in the data set.
        image_id: id of the image in the data set.

    Returns:
        A dict ready for JSON: the image, annotations with polygons, area, bbox, our score and presence, and the
        sentence, and one category per distinct sentence.

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
                "presence": segmentation.presence,
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
        for name in names.values():  # also those of empty masks
            categories.setdefault(name, len(categories) + 1)
        images.append(part["images"][0] | {"id": image_id})
        for annotation in part["annotations"]:
            category_id = categories[names[annotation["category_id"]]]
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


def overlay_all(segmentations: Sequence[Segmentation], *, alpha: float = FILL, labels: bool = True) -> np.ndarray:
    """All masks in one image, each in its colour, with its sentence and score.

    Args:
        segmentations: segmentations of one image; colours repeat after seven masks.
        alpha: share of the colours in the fill, 0 to 1.
        labels: write the labels, in a font that has Latin letters only, and enlarge a small image to make them legible.

    Returns:
        (H, W, 3) uint8; a multiple of the size for a small image with labels.

    Raises:
        UserError: the list is empty, or has segmentations of several images.
    """
    drawing = Drawing(_image_of(segmentations), enlarge=labels)
    for index, segmentation in enumerate(segmentations):
        label = segmentation.label(index + 1) if labels else ""
        drawing.add(segmentation.mask, PALETTE[index % len(PALETTE)], fill=alpha, label=label)
    return drawing.finish()


def _image_of(segmentations: Sequence[Segmentation]) -> np.ndarray:
    """The image that all segmentations share, (H, W, 3) uint8."""
    if not segmentations:
        raise UserError("the list of segmentations is empty: give the list that Segmenter.segment returns")
    image = segmentations[0].image
    for segmentation in segmentations[1:]:
        if segmentation.image is not image and not np.array_equal(segmentation.image, image):
            raise UserError("the segmentations are of several images: give those of one image")
    return image
