"""YOLO segmentation: a folder with data.yaml, images, and a text file of normalised polygons per image.

    cups/data.yaml                names: [cup, plate]
    cups/images/train/1.jpg       or cups/train/images/1.jpg
    cups/labels/train/1.txt       or cups/train/labels/1.txt: "0 0.1 0.2 0.4 0.2 0.4 0.6", class and corners

The paths in data.yaml are not followed, since tools write them for other machines: all images in folders called
`images` are read. An image without a text file has no object. A line of four numbers is a box.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cmmasksd.data.images import IMAGE_SUFFIXES, image_size
from cmmasksd.data.readers.records import Records, number, read_utf8
from cmmasksd.errors import UserError, reason, shown

_MAX_YAML_BYTES = 1024 * 1024


def read_yolo(file: Path) -> Records:
    """The objects of a YOLO data set.

    Args:
        file: its data.yaml, beside or above the folders of images.

    Raises:
        UserError: data.yaml or a text file is damaged, or there is no image.
    """
    names = _names(file)
    root = file.parent
    images = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and "images" in path.relative_to(root).parts[:-1] and path.is_file()
    )
    if not images:
        raise UserError(
            f"{root} has no image in a folder called images: expected images/ and labels/ beside {file.name}"
        )
    records = Records()
    for name in names.values():
        records.add_category(name)
    for path in images:
        height, width = image_size(path, exif=True)
        relative = path.relative_to(root)
        image_id = records.add_image(relative.as_posix(), height, width)
        parts = list(relative.with_suffix(".txt").parts)
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        labels = root.joinpath(*parts)
        if not labels.is_file():
            continue
        for line_number, line in enumerate(read_utf8(labels).splitlines(), start=1):
            where = f"{labels}, line {line_number}"
            words = line.split()
            if not words:
                continue
            name = names.get(words[0])
            if name is None:
                raise UserError(
                    f"{where} has the class {shown(words[0])}, which {file.name} does not name: add its name"
                )
            values = np.array([number(word, where, "a coordinate") for word in words[1:]])
            if ((values < -0.1) | (values > 1.1)).any():
                raise UserError(f"{where} has coordinates outside 0 to 1: write them as shares of the image's sides")
            if len(values) == 4:
                x, y, w, h = values
                values = np.array(
                    [x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2]
                )
                box = True
            elif len(values) >= 6 and len(values) % 2 == 0:
                box = False
            else:
                raise UserError(f"{where} has {len(values)} coordinates: expected x and y of at least three corners")
            polygon = (values.reshape(-1, 2) * (width, height)).ravel().tolist()
            records.add_object(image_id, name, [polygon], where, box=box)
    return records


def _names(file: Path) -> dict[str, str]:
    """The names of the classes by their number, as a text file writes it."""
    import yaml

    if file.stat().st_size > _MAX_YAML_BYTES:
        raise UserError(f"{file} has more than {_MAX_YAML_BYTES} bytes: expected the names of classes")
    try:
        content = yaml.safe_load(read_utf8(file))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{file} is not YAML ({reason(error)}): correct it") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError(f"{file} has the names {shown(names)}: expected `names: [cup, plate]`, one per class")
    for key, name in names.items():
        if type(key) is not int or not 0 <= key < 1_000_000 or not isinstance(name, str):
            raise UserError(f"{file} names class {shown(key)} {shown(name)}: expected a number and text")
    return {str(key): name for key, name in names.items()}
