"""What the readers of labelling tools share: objects as COCO's records, sentences, and files of bounded size.

Every tool's file becomes COCO's three lists, which `annotated` checks: sizes, paths, classes and segmentations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmmasksd.errors import UserError, shown

MAX_FILE_BYTES = 500_000_000
"""Larger files of labelling tools are refused."""

_SENTENCE_KEYS = ("expressions", "expression", "sentences", "sentence", "captions", "caption")
"""Fields and attributes of an object that hold its sentences."""


@dataclass
class Records:
    """COCO's lists of images, annotations and categories; `expressions` of an annotation are its sentences. `left_out`
    counts shapes that are no annotation, by reason."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    _ids: dict[str, int] = field(default_factory=dict, init=False)

    def add_image(self, name: object, height: int, width: int) -> int:
        """Add an image; returns its id."""
        self.images.append({"id": len(self.images) + 1, "file_name": name, "height": height, "width": width})
        return len(self.images)

    def add_category(self, name: str) -> int:
        """The id of a class, which is added if it is new."""
        if name not in self._ids:
            self._ids[name] = len(self._ids) + 1
            self.categories.append({"id": self._ids[name], "name": name})
        return self._ids[name]

    def add_object(
        self, image_id: int, name: str, segmentation: object, where: str, *, box: bool = False, expressions: Any = ()
    ) -> None:
        """Add an object.

        Args:
            image_id: its image.
            name: its class.
            segmentation: COCO's.
            where: its place, for messages.
            box: whether the segmentation is a box around the object. Such an object is marked as a crowd: it is not
                named, and no sentence that is true of it can name another.
            expressions: its sentences.
        """
        if box and expressions:
            raise UserError(f"{where} has a sentence and only a box: draw its outline")
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "category_id": self.add_category(name),
                "segmentation": segmentation,
                "iscrowd": int(box),
                "expressions": list(expressions),
            }
        )


def read_bytes(path: Path) -> bytes:
    """The content of a labelling tool's file."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path} has more than {MAX_FILE_BYTES / 1e6:.0f} MB: export fewer images at a time")
    return path.read_bytes()


def read_utf8(path: Path) -> str:
    """The content of a labelling tool's file as text."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: export it again") from None


def sentences(fields: Mapping[str, Any], where: str) -> list[str]:
    """The sentences in the fields or attributes of an object: texts ("|" separates several), lists, or REFER's records.

    Raises:
        UserError: a field for sentences holds anything else.
    """
    texts: list[str] = []
    for key in _SENTENCE_KEYS:
        value = fields.get(key)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            text = item.get("raw", item.get("sent")) if isinstance(item, dict) else item
            if not isinstance(text, str):
                raise UserError(f"{where} has {key!r} {shown(value)}: expected text or a list of texts")
            texts += [part for part in text.split("|") if part.strip()]
    return texts


def numbers(values: Sequence[object], where: str, what: str) -> np.ndarray:
    """Finite numbers as float64; a UserError for anything else."""
    given = [value for value in values if isinstance(value, int | float) and abs(value) < 1e9]  # NaN is left out
    if len(given) < len(values) or any(isinstance(value, bool) for value in values):
        raise UserError(f"{where} has {what} {shown(values)}: expected numbers")
    return np.array(given, dtype=np.float64)


def number(text: str | None, where: str, what: str) -> float:
    """A number in a text."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9 or (text and len(text) > 50):
        raise UserError(f"{where} has {what} {shown(text)}: expected a number")
    return value


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """The outline of an ellipse, (128, 2) float64."""
    angles = np.arange(0, 2 * math.pi, math.pi / 64)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def rotated(points: np.ndarray, centre: Sequence[float], degrees: float) -> np.ndarray:
    """Points (P, 2) turned clockwise (y points down) about a centre."""
    turn = math.radians(degrees)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return (points - np.array(centre)) @ matrix + np.array(centre)
