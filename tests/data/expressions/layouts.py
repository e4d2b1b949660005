"""Random layouts of annotated regions, and files of instances."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmmasksd.data.expressions import Instance
from cmmasksd.data.masks import mask_to_rle

COLOURS = {"red": (200, 30, 30), "green": (40, 150, 50), "blue": (40, 60, 200), "white": (245, 245, 245)}
HEIGHT, WIDTH = 120, 160


def box_mask(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def instance(category: str, x0: int, y0: int, x1: int, y1: int, **more: Any) -> Instance:
    return Instance(category, box_mask(x0, y0, x1, y1), **more)


def random_scene(rng: random.Random, classes: Sequence[str], *, certain: bool) -> tuple[list[Instance], np.ndarray]:
    """Rectangles and ellipses, later ones over earlier ones, each of one colour; some crowds and tiny ones if asked."""
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    masks: list[np.ndarray] = []
    colours = []
    for _ in range(rng.randint(1, 7)):
        tiny = not certain and rng.random() < 0.1
        width, height = (5, 5) if tiny else (rng.randint(14, 60), rng.randint(14, 50))
        x, y = rng.randint(0, WIDTH - width), rng.randint(0, HEIGHT - height)
        mask = box_mask(x, y, x + width, y + height)
        if rng.random() < 0.5:
            rows, columns = np.ogrid[:HEIGHT, :WIDTH]
            reach = ((columns - x - width / 2 + 0.5) / width) ** 2 + ((rows - y - height / 2 + 0.5) / height) ** 2
            mask = reach <= 0.25
        for earlier in masks:
            earlier &= ~mask
        masks.append(mask)
        colours.append(rng.choice(list(COLOURS)))
        image[mask] = COLOURS[colours[-1]]
    scene = []
    for mask in masks:
        if mask.any():
            crowd = not certain and rng.random() < 0.08
            verified = certain or rng.random() > 0.08
            scene.append(Instance(rng.choice(classes), mask, crowd=crowd, verified=verified))
    return scene, image


def write_instances(
    folder: Path, images: Sequence[tuple[np.ndarray | None, Sequence[Instance]]], name: str = "instances.json"
) -> Path:
    """A file in COCO's format, and its images as PNG where they have pixels."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    categories = sorted({x.category for _, scene in images for x in scene})
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
    for image_id, (pixels, scene) in enumerate(images, 1):
        height, width = scene[0].mask.shape if pixels is None else pixels.shape[:2]
        file = f"{image_id}.png"
        content["images"].append({"id": image_id, "file_name": file, "height": height, "width": width})
        if pixels is not None:
            Image.fromarray(pixels).save(folder / "images" / file)
        for x in scene:
            record = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": categories.index(x.category) + 1,
                "iscrowd": int(x.crowd),
                "segmentation": mask_to_rle(x.mask),
            }
            if not x.verified:
                record["verified"] = 0
            content["annotations"].append(record)
    path = folder / name
    path.write_text(json.dumps(content))
    return path
