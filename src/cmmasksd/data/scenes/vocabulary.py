"""The words of generated scenes, and the records that describe one: objects, their attributes, what is held out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "crescent", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (248, 216, 50),
    "green": (50, 160, 60),
    "cyan": (70, 210, 220),
    "blue": (40, 80, 205),
    "purple": (135, 50, 165),
    "white": (240, 240, 240),
}
SIZES = {"small": 12.0, "medium": 18.0, "large": 27.0}
"""Radius in pixels on a canvas of 128 pixels. An object that is named covers 4 % of the picture on average, still less
than in RefCOCO (nearly always over 5 %, on average 10 to 15 %)."""
FILLS = ("solid", "striped", "dotted")
STYLES = ("scenes", "scenes+", "scenesg")
SPLITS = ("train", "val", "testA", "testB", "pretrain")
HELD_OUT = frozenset((colour, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
"""Colour-shape pairs that only testB (and CLIP pretraining, which sees captions but never masks) shows."""

REFERENCES_PER_SCENE = 3
MIN_VISIBLE = 0.45
"""An object is never hidden by more than this leaves visible."""

ATTRIBUTES = ("size", "fill", "colour", "shape")
VALUES = (tuple(SIZES), FILLS, tuple(COLOURS), SHAPES)  # in the order of ATTRIBUTES
WORDS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "solid": ("solid", "plain"),
    "dotted": ("dotted", "spotted"),
    "crescent": ("crescent", "moon"),
}
GENERIC = ("thing", "shape", "object", "one")
_HELD_OUT_SAID = re.compile(
    "|".join(rf"\b{colour} {word}\b" for colour, shape in sorted(HELD_OUT) for word in WORDS.get(shape, (shape,)))
)


def names_held_out(sentence: str) -> bool:
    """Whether a sentence of a scene says both colour and shape of an object of a held-out pair."""
    return bool(_HELD_OUT_SAID.search(sentence))


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. Later objects of a scene lie in front of earlier ones.

    Attributes:
        x, y: centre of the whole shape, in pixels of the canvas, whether or not a part of it is hidden.
        radius: half its extent in pixels.
        turn: rotation in steps of 8 degrees, -2 to 2.
    """

    shape: str
    colour: str
    size: str
    fill: str
    x: int
    y: int
    radius: int
    turn: int = 0

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """Values in the order of ATTRIBUTES."""
        return (self.size, self.fill, self.colour, self.shape)


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects from back to front, and the sentences that name some of them: (object index, sentences)."""

    canvas: int
    objects: tuple[SceneObject, ...]
    references: tuple[tuple[int, tuple[str, ...]], ...]
    look: int = field(repr=False)
    """Seed of everything that the description does not mention: background, noise, shades."""
