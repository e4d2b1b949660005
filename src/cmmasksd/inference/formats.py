"""Segmentations as other tools know them: COCO, labelme, supervision; and one picture of several with a legend.

All take the list that `Segmenter.segment` returns, the segmentations of one image. Sentences become the names of
categories and labels. A sentence that found nothing leaves no annotation. Boxes are (x0, y0, x1, y1) here and in
supervision, half-open, but [x, y, width, height] in COCO.

What is unusual: polygons run along the edges of the pixels, so tools that fill them by pycocotools get the mask back
exactly. A hole is joined to its outline by a cut of no width, since neither format knows holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cmmasksd.errors import UserError
from cmmasksd.inference.visualize import PALETTE, overlay

if TYPE_CHECKING:
    from cmmasksd.inference.base import Segmentation


def to_coco(found: Sequence[Segmentation], *, file_name: str = "image", image_id: int = 1) -> dict[str, Any]:
    """A COCO data set (instances.json) of one image.

    Args:
        found: segmentations of one image.
        file_name: of the image, as the file shall name it.
        image_id: of the image.

    Returns:
        A dict ready for JSON: images, annotations with polygons, area, bbox and our score, and a category for every
        sentence.

    Raises:
        UserError: no segmentation, or of several images.
    """
    height, width = _image_of(found).shape[:2]
    names = list(dict.fromkeys(one.text for one in found))
    annotations = []
    for one in found:
        if one.box is None:
            continue
        x0, y0, x1, y1 = one.box
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": names.index(one.text) + 1,
                "segmentation": one.polygons,
                "area": one.area,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
                "score": one.score,
            }
        )
    return {
        "info": {"description": "cmmasksd"},
        "licenses": [],
        "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
        "annotations": annotations,
        "categories": [{"id": nth, "name": name, "supercategory": ""} for nth, name in enumerate(names, start=1)],
    }


def to_labelme(found: Sequence[Segmentation], *, file_name: str) -> dict[str, Any]:
    """A labelme file: save it as JSON beside the image and open it to correct the outlines.

    Args:
        found: segmentations of one image.
        file_name: the image's path, relative to where the JSON file will lie.

    Returns:
        A dict ready for JSON. Parts of one mask share their group_id; the score is in the description.

    Raises:
        UserError: no segmentation, or of several images.
    """
    height, width = _image_of(found).shape[:2]
    shapes = [
        {
            "label": one.text,
            "points": np.reshape(polygon, (-1, 2)).tolist(),
            "group_id": group,
            "description": f"score {one.score:.3f}",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for group, one in enumerate(found, start=1)
        for polygon in one.polygons
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


def to_detections(found: Sequence[Segmentation]) -> Any:
    """A `supervision.Detections`, for its annotators, trackers and metrics.

    Returns:
        xyxy, mask, confidence (our score), class_id (the sentence's place among the different sentences) and
        data["class_name"] (the sentence).

    Raises:
        UserError: supervision is not installed, no segmentation, or of several images.
    """
    try:
        import supervision  # pyright: ignore (an optional package)
    except ImportError as error:
        raise UserError(f"detections need the package supervision ({error}): pip install supervision") from None
    height, width = _image_of(found).shape[:2]
    names = list(dict.fromkeys(one.text for one in found))
    seen = [(one, one.box) for one in found if one.box is not None]
    return supervision.Detections(
        xyxy=np.array([box for _, box in seen], dtype=np.float32).reshape(-1, 4),
        mask=np.array([one.mask for one, _ in seen], dtype=bool).reshape(-1, height, width),
        confidence=np.array([one.score for one, _ in seen], dtype=np.float32),
        class_id=np.array([names.index(one.text) for one, _ in seen], dtype=int),
        data={"class_name": np.array([one.text for one, _ in seen], dtype=str)},
    )


def overlay_all(found: Sequence[Segmentation], *, alpha: float = 0.5, legend: bool = True) -> np.ndarray:
    """All masks in one picture, each in its colour, over a legend of sentences and scores.

    Args:
        found: segmentations of one image; beyond seven, colours come again.
        alpha: share of the colours, 0 to 1.
        legend: add the legend below the image. Its font knows Latin letters only.

    Returns:
        (H + height of the legend, W, 3) uint8.

    Raises:
        UserError: no segmentation, or of several images.
    """
    drawn = _image_of(found)
    for nth, one in enumerate(found):
        drawn = overlay(drawn, one.mask, PALETTE[nth % len(PALETTE)], alpha)
    if not legend:
        return drawn
    from PIL import Image, ImageDraw, ImageFont

    width = drawn.shape[1]
    size = max(10, round(max(drawn.shape) / 40))
    font = ImageFont.load_default(size)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    entries = []
    for one in found:
        lines = [""]
        for word in f"{one.text} ({f'{one.score:.2f}' if one.mask.any() else 'nothing found'})".split():
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
    for nth, lines in enumerate(entries):
        place = (size // 2, top + size // 8, size // 2 + size, top + size // 8 + size)
        draw.rectangle(place, fill=PALETTE[nth % len(PALETTE)], outline="black")
        for line in lines:
            draw.text((2 * size, top), line, "black", font)
            top += step
    return np.concatenate([drawn, np.asarray(strip)])


def _image_of(found: Sequence[Segmentation]) -> np.ndarray:
    """The one image of segmentations, (H, W, 3) uint8."""
    if not found:
        raise UserError("there is no segmentation: give the list that Segmenter.segment returns")
    image = found[0].image
    for one in found[1:]:
        if one.image is not image and not np.array_equal(one.image, image):
            raise UserError("the segmentations are of several images: give those of one image at a time")
    return image
