"""Words of generated scenes, held-out pairs, and the records of a scene and its objects."""

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
"""Radius in pixels in a scene of 128 pixels. A target covers 4 % of the image on average; in RefCOCO, 10 to 15 %."""
FILLS = ("solid", "striped", "dotted")
STYLES = ("scenes", "scenes+", "scenesg")
SPLITS = ("train", "val", "testA", "testB", "pretrain")
HELD_OUT = frozenset((colour, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
"""Colour-shape pairs that appear in testB only (and in CLIP pretraining, which sees captions but no masks)."""

REFERENCES_PER_SCENE = 3
MIN_VISIBLE = 0.45
"""Least fraction of an object's pixels that stays visible."""

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
_HELD_OUT_WORDS = re.compile(
    "|".join(rf"\b{colour} {word}\b" for colour, shape in sorted(HELD_OUT) for word in WORDS.get(shape, (shape,)))
)


def names_held_out(expression: str) -> bool:
    """Whether an expression has the colour and the shape of a held-out pair."""
    return bool(_HELD_OUT_WORDS.search(expression))


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object.

    Attributes:
        x, y: centre of the whole shape in pixels, hidden parts included.
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
    """One scene.

    Attributes:
        scene_size: side of the square image in pixels.
        objects: the objects, from back to front.
        references: index of an object, and the expressions that name it.
        look: seed of what the objects do not determine: background, noise, shades.
    """

    scene_size: int
    objects: tuple[SceneObject, ...]
    references: tuple[tuple[int, tuple[str, ...]], ...]
    look: int = field(repr=False)
