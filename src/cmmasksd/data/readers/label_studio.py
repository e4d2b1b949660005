"""Label Studio's JSON: polygons, brushes, ellipses and rectangles; sentences in a TextArea per region.

Of several annotations of a task, the first that was not cancelled is read. Key points and vectors have no mask and are
counted as left out. The images are found by the last part of their URL, with or without the prefix that uploads get.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from cmmasksd.data.images import IMAGE_SUFFIXES, MAX_PIXELS
from cmmasksd.data.masks import mask_to_rle
from cmmasksd.data.readers.fields import parse_json, whole_number
from cmmasksd.data.readers.records import Records, ellipse, numbers, read_bytes, rotated
from cmmasksd.errors import UserError, shown

_SHAPES = ("polygon", "brush", "ellipse", "rectangle")
_WITHOUT_MASK = ("keypoint", "vector")


def read_label_studio(path: Path, folder: Path | None) -> Records:
    """The objects of a Label Studio export.

    Args:
        path: the export.
        folder: folder of the images, if it is known.

    Raises:
        UserError: the file is damaged, or of another format of Label Studio.
    """
    tasks = parse_json(read_bytes(path), str(path), "export it again from Label Studio")
    records = Records()
    task_of: dict[str, int] = {}
    folders = [folder] if folder else [path.parent / "images", path.parent]
    for number, task in enumerate(tasks if isinstance(tasks, list) else [], start=1):
        where = f"{path}, task {number}"
        annotations = task.get("annotations") if isinstance(task, dict) else None
        if not isinstance(annotations, list) or not isinstance(task.get("data"), dict):
            raise UserError(f"{where} has no 'data' or no 'annotations': export as JSON, not as JSON-MIN")
        name = _file_name(task["data"], folders, where)
        if (other := task_of.setdefault(name.casefold(), number)) != number:
            raise UserError(f"{where} has the image {shown(name)}, as task {other} has: give images different names")
        valid = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
        results = valid[0].get("result") if valid else []
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise UserError(f"{where} has the result {shown(results)}: export it again from Label Studio")
        _add_task(records, name, results, where)
    return records


def _add_task(records: Records, name: str, results: list[dict[str, Any]], where: str) -> None:
    shapes: dict[str, str] = {}  # by region
    values: dict[str, dict[str, Any]] = {}  # label, coordinates and texts by region
    sizes: set[tuple[int, int]] = set()
    for result in results:
        value, region = result.get("value"), result.get("id")
        if not isinstance(value, dict) or not isinstance(region, str):
            continue  # a choice or text about the whole image
        shape = str(result.get("type")).removesuffix("labels")
        if shape in _SHAPES:
            size = whole_number(result, "original_height", where), whole_number(result, "original_width", where)
            if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
                raise UserError(f"{where} is {size[1]}x{size[0]} pixels: expected 1 to {MAX_PIXELS} pixels")
            sizes.add(size)
            shapes[region] = shape
        elif shape in _WITHOUT_MASK:
            records.left_out[f"{shape} shapes without mask"] += 1
        values.setdefault(region, {}).update(value)
    if not sizes:
        return
    if len(sizes) > 1:
        raise UserError(f"{where} has regions of images of different sizes: expected one image per task")
    (size,) = sizes
    image_id = records.add_image(name, *size)
    for region, shape in shapes.items():
        value = values[region]
        place = f"{where}, region {shown(region)}"
        labels = next((v for key, v in value.items() if key.endswith("labels") and v), None)
        if not isinstance(labels, list) or not isinstance(labels[0], str):
            raise UserError(f"{place} has the label {shown(labels)}: give it a class")
        texts = value.get("text", [])
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place} has the text {shown(texts)}: expected a list of texts")
        texts = [part for text in texts for part in text.split("|") if part.strip()]
        segmentation = _segmentation(shape, value, place, *size)
        box = shape == "rectangle"
        records.add_object(image_id, labels[0], segmentation, place, box=box, expressions=texts)


def _file_name(data: dict[str, Any], folders: list[Path], where: str) -> str:
    """The name of a task's image file."""
    texts = [text for text in (data.get("image"), *data.values()) if isinstance(text, str)]
    for text in texts:
        try:
            parts = urlsplit(text)
            location = unquote(parse_qs(parts.query).get("d", [parts.path])[0])
        except ValueError:
            continue
        name = PurePosixPath(location.replace("\\", "/")).name
        if not name.lower().endswith(IMAGE_SUFFIXES) or len(name) > 255 or not name.isprintable():
            continue
        uploaded = re.sub(r"^[0-9a-f]{8}-(?=.)", "", name)
        for candidate in (name, uploaded):
            if any((folder / candidate).is_file() for folder in folders):
                return candidate
        return name
    raise UserError(f"{where} has the data {shown(data)}: expected the path or URL of an image")


def _segmentation(shape: str, value: dict[str, Any], where: str, height: int, width: int) -> Any:
    """A region as a COCO segmentation. Its coordinates are percent of the image's sides."""
    if shape == "brush":
        return mask_to_rle(_brush(value.get("rle"), where, height, width))
    sides = np.array([width, height]) / 100
    if shape == "polygon":
        points = value.get("points")
        if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
            raise UserError(f"{where} has the points {shown(points)}: expected [[x, y], ...]")
        flat = numbers([number for point in points for number in point], where, "the points")
        return [(flat.reshape(-1, 2) * sides).ravel().tolist()]
    keys = ("x", "y", *(("radiusX", "radiusY") if shape == "ellipse" else ("width", "height")))
    a, b, c, d, turn = numbers([value.get(key) for key in keys] + [value.get("rotation") or 0], where, "coordinates")
    (x, y), (w, h) = (a, b) * sides, (c, d) * sides
    points = ellipse(x, y, w, h) if shape == "ellipse" else np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])
    return [rotated(points, (x, y), turn).ravel().tolist()]  # a rectangle turns about its first corner


def _brush(encoded: object, where: str, height: int, width: int) -> np.ndarray:
    """A brush, (H, W) bool.

    Label Studio packs the bytes of an RGBA image, (H, W, 4), as bits: 32 for their number, 5 for the size of a word
    less one, four times 4 for the sizes of lengths less one; then blocks of a flag (1: one word, repeated), 2 bits that
    choose the size of the length, the length less one, and the words. The mask is where alpha is not 0.
    """
    if not isinstance(encoded, list) or not all(type(byte) is int and 0 <= byte <= 255 for byte in encoded):
        raise UserError(f"{where} has the rle {shown(encoded)}: expected a list of bytes")
    bits = np.unpackbits(np.array(encoded, dtype=np.uint8))
    damaged = UserError(f"{where} has a brush that is cut short or not of its image: export it again")
    position = 0

    def take(count: int) -> int:
        nonlocal position
        if position + count > len(bits):
            raise damaged
        value = int("".join(map(str, bits[position : position + count])), 2)
        position += count
        return value

    total, word = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != 4 * height * width or word != 8:
        raise damaged
    values = np.zeros(total, dtype=np.uint8)
    start = 0
    while start < total:
        repeated = take(1)
        count = take(lengths[take(2)]) + 1
        if start + count > total:
            raise damaged
        if repeated:
            values[start : start + count] = take(8)
        else:
            end = position + 8 * count
            if end > len(bits):
                raise damaged
            values[start : start + count] = np.packbits(bits[position:end])
            position = end
        start += count
    return values.reshape(height, width, 4)[..., 3] > 0
