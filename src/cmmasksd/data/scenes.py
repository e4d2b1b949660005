"""Generated scenes with true referring expressions: the data set that needs no download.

A scene is a textured, noisy background with 3 to 10 overlapping objects (8 shapes x 8 colours x 3 sizes x 3 fills),
made so that objects share attributes with each other and every word of a sentence matters. Three styles follow the
three benchmarks: ``scenes`` (short, with location words, as RefCOCO), ``scenes+`` (no location words, as RefCOCO+) and
``scenesg`` (long, with relations to other objects, as G-Ref).

Unusual here:

- A sentence is never drawn from a template and hoped to be true. It starts as a logical description, whose meaning is
  evaluated twice: strictly for the object it names and loosely for all others (a margin around every "left of"), so
  that nobody would argue about the answer. Attributes that could be left out without making it ambiguous are left out.
- Sets of objects are bit masks in plain ints; textures, stencils and noise are drawn once and cropped. That makes more
  than 500 scenes a second on one core, so training can draw fresh scenes as fast as a laptop can learn from them.
- Everything is a function of (seed, split, index, style, canvas). Worker processes and their number change nothing.

``HELD_OUT`` lists eight colour-shape pairs. No object of train, val or testA has one; every target of testB has one.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cmmasksd.data.samples import Expression, Reference
from cmmasksd.errors import UserError

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
_VALUES = (tuple(SIZES), FILLS, tuple(COLOURS), SHAPES)  # in the order of ATTRIBUTES
_WORDS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "solid": ("solid", "plain"),
    "dotted": ("dotted", "spotted"),
    "crescent": ("crescent", "moon"),
}
_GENERIC = ("thing", "shape", "object", "one")
_HELD_OUT_SAID = re.compile(
    "|".join(rf"\b{colour} {word}\b" for colour, shape in sorted(HELD_OUT) for word in _WORDS.get(shape, (shape,)))
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


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


@lru_cache(maxsize=4096)
def stencil(shape: str, radius: int, turn: int) -> np.ndarray:
    """Coverage of a shape's pixels, (2r+3, 2r+3) float32 in [0, 1], antialiased by 4 x 4 supersampling."""
    n, over = 2 * radius + 3, 4
    grid = (np.arange(n * over) + 0.5) / over - n / 2
    x, y = np.meshgrid(grid / radius, grid / radius)
    angle = math.radians(8 * turn)
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if shape == "circle":
        inside = x**2 + y**2 <= 0.94**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.82
    elif shape == "triangle":
        inside = (y <= 0.72) & (y >= 1.75 * abs(x) - 0.95)
    elif shape == "star":
        theta, rho = np.arctan2(x, -y), np.hypot(x, y)
        wedge = abs((theta + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)  # 0 at a tip, pi/5 between two tips
        inner = 0.42
        a, b = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
        inside = rho * (np.sin(wedge) * (1 - a) + np.cos(wedge) * b) <= b
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.28) & (np.maximum(abs(x), abs(y)) <= 0.92)
    elif shape == "heart":
        u, v = 1.2 * x, -1.2 * y + 0.12
        inside = (u**2 + v**2 - 0.95 * 0.85) ** 3 <= u**2 * v**3 * 1.4
    elif shape == "crescent":
        inside = (x**2 + y**2 <= 0.95**2) & ((x - 0.45) ** 2 + y**2 >= 0.72**2)
    else:
        inside = abs(x) / 0.62 + abs(y) / 0.98 <= 1  # diamond: taller than wide, so that it is no turned square
    return inside.reshape(n, over, n, over).mean((1, 3), dtype=np.float32)


@lru_cache(maxsize=4096)
def _footprint(shape: str, radius: int, turn: int) -> tuple[np.ndarray, int]:
    """The pixels that a shape owns (at least half covered) as booleans, and their number."""
    owned = stencil(shape, radius, turn) >= 0.5
    return owned, int(np.count_nonzero(owned))


_TILE = 320  # texture tiles are cropped at random offsets; larger canvases wrap around


@lru_cache(maxsize=1)
def _textures() -> tuple[list[np.ndarray], np.ndarray]:
    """Brightness tiles in -1 .. 1 as float32, and one tile of pixel noise, (3, H, W) int16."""
    rng = np.random.default_rng(20230519)
    y, x = np.mgrid[:_TILE, :_TILE] * (2 * math.pi / _TILE)
    tiles = [np.sin(a * x + b * y) for a, b in ((6, 2), (-3, 9), (14, 14), (0, 20))]
    tiles += [np.sign(np.sin(10 * x) * np.sin(10 * y)), np.sin(8 * x) * np.sin(8 * y)]
    tiles += [np.sin(5 * x + 3 * np.sin(4 * y))]
    frequency = np.fft.fftfreq(_TILE)
    for power in (1.0, 1.4, 1.8):  # clouds, from rough to smooth
        amplitude = 1 / np.maximum(np.hypot(frequency[:, None], frequency), 1 / _TILE) ** power
        cloud = np.fft.ifft2(amplitude * np.exp(2j * math.pi * rng.random((_TILE, _TILE)))).real
        tiles.append(np.clip(cloud / (2 * cloud.std()), -1, 1))
    noise = np.clip(rng.normal(0, 256, (_TILE, _TILE, 3)), -768, 767).astype(np.int16)
    return [tile.astype(np.float32) for tile in tiles], np.ascontiguousarray(noise.transpose(2, 0, 1))


def _crop(tile: np.ndarray, canvas: int, draw: random.Random) -> np.ndarray:
    """A random (canvas, canvas) part of a tile (..., _TILE, _TILE)."""
    if canvas <= _TILE // 2:
        top, left = draw.randrange(_TILE - canvas), draw.randrange(_TILE - canvas)
        return tile[..., top : top + canvas, left : left + canvas]
    at = np.arange(canvas) + draw.randrange(_TILE)
    return tile[..., at[:, None] % _TILE, (at + draw.randrange(_TILE)) % _TILE]


def _pattern(fill: str, n: int, scale: float, draw: random.Random) -> np.ndarray | None:
    """Which pixels of an object take its second, darker colour; None for a solid one."""
    way, phase = draw.getrandbits(2), draw.random()  # whatever the fill: what comes later looks the same in a twin
    if fill == "solid":
        return None
    at = np.arange(n)
    period = 6.0 * scale
    if fill == "striped":
        a, b = ((1.0, 0.0), (0.0, 1.0), (0.7, 0.7), (0.7, -0.7))[way]
        return (at[:, None] * a + at * b + phase * period) % period < period / 2
    u = ((at + phase * period) % period - period / 2) ** 2
    return u[:, None] + u <= (0.32 * period) ** 2


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns:
        image: (canvas, canvas, 3) uint8 RGB.
        owner: (canvas, canvas) int8, the index of the object that is seen at each pixel, -1 for the background.
    """
    draw = random.Random(scene.look)
    size, scale = scene.canvas, scene.canvas / 128
    tiles, noise = _textures()
    base = [draw.randrange(70, 170)] * 3
    base = [level + draw.randrange(-22, 23) for level in base]
    shade = _crop(draw.choice(tiles), size, draw) * draw.uniform(6, 26)
    # planes (3, H, W) until the end: numpy is slow where the innermost axis has 3 elements
    image = (shade + np.array(base, np.float32)[:, None, None]).astype(np.int16)
    owner = np.full((size, size), -1, np.int8)
    for index, thing in enumerate(scene.objects):
        alpha = stencil(thing.shape, thing.radius, thing.turn)
        owned, _ = _footprint(thing.shape, thing.radius, thing.turn)
        n, half = alpha.shape[0], thing.radius + 1
        top, left = thing.y - half, thing.x - half
        inner = (slice(max(0, -top), min(n, size - top)), slice(max(0, -left), min(n, size - left)))
        outer = (slice(max(0, top), min(size, top + n)), slice(max(0, left), min(size, left + n)))
        jitter = draw.randrange(-14, 15)
        levels = [level + jitter + draw.randrange(-8, 9) for level in COLOURS[thing.colour]]
        colour = np.array(levels, np.float32)[:, None, None]
        pattern = _pattern(thing.fill, n, scale, draw)
        paint = colour if pattern is None else np.where(pattern[inner], colour * 0.4, colour)
        below = image[:, outer[0], outer[1]]
        below[...] = below + (paint - below) * alpha[inner]
        owner[outer][owned[inner]] = index
    strength = draw.randrange(2, 15)  # standard deviation of the noise, in grey levels
    image += (_crop(noise, size, draw) * np.int16(strength)) >> 8
    np.clip(image, 0, 255, out=image)
    pixels = np.empty((size, size, 3), np.uint8)
    for channel in range(3):
        pixels[:, :, channel] = image[channel]
    return pixels, owner


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def _below(draw: random.Random, n: int) -> int:
    """What `draw.randrange(n)` returns, without its checks, which take longer than the draw."""
    bits = n.bit_length()
    value = draw.getrandbits(bits)
    while value >= n:
        value = draw.getrandbits(bits)
    return value


def _draw_attributes(draw: random.Random, split: str, earlier: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Attributes of the next object: usually those of an earlier one with one or two changed, so that it distracts."""
    held_out_wanted = split == "testB" and draw.random() < 0.6
    while True:
        if earlier and draw.random() < 0.75:
            values = list(earlier[_below(draw, len(earlier))])
            changes = (1, 1, 2)[_below(draw, 3)]
            changed = [_below(draw, 4)]
            if changes == 2:
                other = _below(draw, 3)
                changed.append(3 if other == changed[0] else other)
            for attribute in changed:
                known = _VALUES[attribute]
                values[attribute] = known[_below(draw, len(known))]
        else:
            values = [known[_below(draw, len(known))] for known in _VALUES]
        held_out = (values[2], values[3]) in HELD_OUT
        if held_out == held_out_wanted or split == "pretrain" or (split == "testB" and not held_out_wanted):
            return tuple(values)


def _hidden(back: SceneObject, front: SceneObject) -> float:
    """Fraction of `back` that `front` covers."""
    dy, dx = front.y - back.y, front.x - back.x
    reach = back.radius + front.radius + 2
    if abs(dy) > reach or abs(dx) > reach:
        return 0.0
    under, pixels = _footprint(back.shape, back.radius, back.turn)
    over, _ = _footprint(front.shape, front.radius, front.turn)
    top, left = dy + back.radius - front.radius, dx + back.radius - front.radius
    n, m = under.shape[0], over.shape[0]
    a = under[max(0, top) : min(n, top + m), max(0, left) : min(n, left + m)]
    b = over[max(0, -top) : min(m, n - top), max(0, -left) : min(m, n - left)]
    return int(np.count_nonzero(a & b)) / pixels


def _layout(draw: random.Random, split: str, canvas: int) -> tuple[list[SceneObject], dict[tuple[int, int], float]]:
    """Objects from back to front, and for each overlapping (back, front) pair the fraction of back that is hidden."""
    scale = canvas / 128
    objects: list[SceneObject] = []
    attributes: list[tuple[str, ...]] = []
    discs: list[tuple[int, int, int]] = []
    hidden: dict[tuple[int, int], float] = {}
    covered: set[int] = set()
    hypot = math.hypot
    for _ in range(3 + _below(draw, 8)):
        values = _draw_attributes(draw, split, attributes)
        size, fill, colour, shape = values
        radius = max(3, round(SIZES[size] * scale) + _below(draw, 3) - 1)
        turn = _below(draw, 5) - 2
        room = canvas - 2 * radius - 2
        for _ in range(12):
            x, y = radius + 1 + _below(draw, room), radius + 1 + _below(draw, room)
            near = []
            for index, (left, top, extent) in enumerate(discs):
                distance = hypot(x - left, y - top) / (radius + extent)
                if distance < 1:
                    if distance < 0.7 or index in covered:
                        break  # too close, or a second object would cover it
                    near.append(index)
            else:
                thing = SceneObject(shape, colour, size, fill, x, y, radius, turn)
                parts = [_hidden(objects[index], thing) for index in near]
                if all(part <= 1 - MIN_VISIBLE for part in parts):
                    hidden.update({(index, len(objects)): part for index, part in zip(near, parts, strict=True)})
                    covered.update(near)
                    objects.append(thing)
                    attributes.append(values)
                    discs.append((x, y, radius))
                    break
    return objects, hidden


# ---------------------------------------------------------------------------------------------------------------------
# Meaning: sets of objects as bit masks, each location and relation as (strict, loose)

_SPANS = {
    # name: (axis, from, to) as fractions of the canvas, strict and loose
    "left": ((0, 0.0, 0.42), (0, 0.0, 0.52)),
    "right": ((0, 0.58, 1.0), (0, 0.48, 1.0)),
    "top": ((1, 0.0, 0.42), (1, 0.0, 0.52)),
    "bottom": ((1, 0.58, 1.0), (1, 0.48, 1.0)),
    "middle column": ((0, 0.36, 0.64), (0, 0.28, 0.72)),
    "middle row": ((1, 0.36, 0.64), (1, 0.28, 0.72)),
}
_ZONES = {
    **{name: (name,) for name in ("left", "right", "top", "bottom")},
    **{f"{row} {column}": (row, column) for row in ("top", "bottom") for column in ("left", "right")},
    "middle": ("middle row", "middle column"),
}
_EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}
_MARGIN = 0.06  # of the canvas, between neighbours that an order compares
RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
    "behind": "partly behind",
    "front": "in front of",
}


class _Meaning:
    """What can be said of a scene's objects: for every word, the set of objects (bits) that it is true of.

    A place or relation that is strictly true of a target is known by its loose set alone: the target, and all objects
    that it might be said of too. Together with attributes it names the target when no other object has them all.
    """

    def __init__(self, objects: Sequence[SceneObject], hidden: dict[tuple[int, int], float], canvas: int) -> None:
        self.objects, self.hidden, self.canvas = objects, hidden, canvas
        self.margin = _MARGIN * canvas
        having: dict[str, int] = {}
        for index, thing in enumerate(objects):
            for value in thing.attributes:
                having[value] = having.get(value, 0) | 1 << index
        self._having = having
        self._sharing: dict[int, list[int]] = {}
        self._related: dict[int, tuple[tuple[str, int, int], ...]] = {}
        self._anchors: dict[int, list[tuple[str, int, int]]] = {}
        self._zones: dict[str, tuple[int, int]] = {}

    def zones(self) -> dict[str, tuple[int, int]]:
        """For every region of the picture, the objects in it: (strict, loose) sets."""
        if not self._zones:
            at = [o.x for o in self.objects], [o.y for o in self.objects]
            spans = {}
            for name, bounds in _SPANS.items():
                sets = []
                for axis, low, high in bounds:
                    low, high = low * self.canvas, high * self.canvas
                    sets.append(sum([1 << i for i, here in enumerate(at[axis]) if low <= here <= high]))
                spans[name] = sets
            for name, parts in _ZONES.items():
                strict = loose = -1
                for part in parts:
                    strict, loose = strict & spans[part][0], loose & spans[part][1]
                self._zones[name] = (strict, loose)
        return self._zones

    def sharing(self, target: int) -> list[int]:
        """For each of the 16 subsets of ATTRIBUTES (as bits), the objects that share the target's values of them."""
        table = self._sharing.get(target)
        if table is None:
            table = [(1 << len(self.objects)) - 1]
            for value in self.objects[target].attributes:
                having = self._having[value]
                table += [found & having for found in table]
            self._sharing[target] = table
        return table

    def second(self, among: int, axis: int, sign: int) -> int | None:
        """The second of `among` along an axis; None if they are only two, or neighbours are too close to order."""
        at = sorted([((o.y if axis else o.x) * sign, i) for i, o in enumerate(self.objects) if among >> i & 1])
        if len(at) < 3 or any(b[0] - a[0] < self.margin for a, b in pairwise(at)):
            return None
        return at[1][1]

    def outermost(self, target: int, axis: int, sign: int) -> int:
        """The target and all objects that do not clearly come after it along an axis: the loose set of an extreme."""
        there, margin = self.objects[target], self.margin
        if axis:
            return sum(1 << i for i, o in enumerate(self.objects) if (o.y - there.y) * sign < margin)
        return sum(1 << i for i, o in enumerate(self.objects) if (o.x - there.x) * sign < margin)

    def related(self, anchor: int) -> tuple[tuple[str, int, int], ...]:
        """For every relation in which objects stand to the anchor: (relation, strict set, loose set)."""
        if anchor in self._related:
            return self._related[anchor]
        there = self.objects[anchor]
        near, far = 0.04 * self.canvas, 0.09 * self.canvas
        strict, loose = dict.fromkeys(RELATIONS, 0), dict.fromkeys(RELATIONS, 0)
        for i, o in enumerate(self.objects):
            if i == anchor:
                continue
            bit, dx, dy = 1 << i, o.x - there.x, o.y - there.y
            width, height = abs(dx), abs(dy)
            if height <= 1.6 * width + near:
                name = "left" if dx < 0 else "right"
                loose[name] |= bit
                if width < near:  # nearly level: loosely, it could be on either side
                    loose["right" if dx < 0 else "left"] |= bit
                elif width >= far and height <= 0.8 * width:
                    strict[name] |= bit
            if width <= 1.6 * height + near:
                name = "above" if dy < 0 else "below"
                loose[name] |= bit
                if height < near:
                    loose["below" if dy < 0 else "above"] |= bit
                elif height >= far and width <= 0.8 * height:
                    strict[name] |= bit
        for (back, front), part in self.hidden.items():
            if anchor in (back, front):
                name, bit = ("behind", 1 << back) if front == anchor else ("front", 1 << front)
                loose[name] |= bit
                if part >= 0.06:
                    strict[name] |= bit
        self._related[anchor] = tuple([(name, found, loose[name]) for name, found in strict.items() if found])
        return self._related[anchor]

    def touching(self, relation: str, anchor: int) -> int:
        """Objects that have even one pixel behind or in front of the anchor.

        That is a few more than `hidden` knows: squares and triangles reach out of their discs with their corners.
        """
        there = self.objects[anchor]
        if relation == "behind":
            return sum(1 << i for i, o in enumerate(self.objects[:anchor]) if _hidden(o, there))
        return sum(1 << i for i, o in enumerate(self.objects) if i > anchor and _hidden(there, o))

    def anchors(self, target: int) -> list[tuple[str, int, int]]:
        """The relations that are strictly true of the target: (relation, an object that attributes name, loose set)."""
        if target not in self._anchors:
            attributes = [o.attributes for o in self.objects]
            self._anchors[target] = [
                (relation, anchor, loose)
                for anchor, own in enumerate(attributes)
                if anchor != target and attributes.count(own) == 1
                for relation, strict, loose in self.related(anchor)
                if strict >> target & 1
            ]
        return self._anchors[target]


_EFFORT = tuple(  # for every subset of ATTRIBUTES (as bits): two or three words are said more often than one or four,
    (3.0, 1.0, 0.0, 0.4, 1.5)[bits.bit_count()] + 1.3 * (not bits & 8) + 0.5 * (not bits & 4)  # nouns and colours most
    for bits in range(16)
)
_FEWER = tuple(tuple(bits ^ 1 << i for i in range(4) if bits >> i & 1) for bits in range(16))
"""For every subset of ATTRIBUTES (as bits), those with one attribute less."""


def _subsets(draw: random.Random) -> list[int]:
    """All subsets of ATTRIBUTES as bits, in a random order that people's habits bias (_EFFORT)."""
    chance = draw.random
    effort = [usual + 1.2 * chance() for usual in _EFFORT]
    return sorted(range(16), key=effort.__getitem__)


def _minimal(table: Sequence[int], bits: int, loose: int, bit: int) -> bool:
    """True when the attributes name the object among `loose`, and none of them can be left out."""
    if table[bits] & loose != bit:
        return False
    for fewer in _FEWER[bits]:  # noqa: SIM110 (the loop is twice as fast as `all`, and this the hottest of all lines)
        if table[fewer] & loose == bit:
            return False
    return True


def _phrase(draw: random.Random, values: Sequence[str]) -> str:
    words = [draw.choice(_WORDS.get(value, (value,))) for value in values]
    if not values or values[-1] not in SHAPES:
        words.append(draw.choice(_GENERIC))
    return " ".join(words)


def _noun_phrase(draw: random.Random, thing: SceneObject, bits: int) -> str:
    return _phrase(draw, [value for i, value in enumerate(thing.attributes) if bits >> i & 1])


def _by_attributes(meaning: _Meaning, target: int, draw: random.Random) -> int | None:
    """A minimal subset of attributes (as bits) that only the target has."""
    table, bit = meaning.sharing(target), 1 << target
    if table[15] != bit:
        return None
    return next(bits for bits in _subsets(draw) if _minimal(table, bits, -1, bit))


def _say_location(draw: random.Random, kind: str, name: str, phrase: str) -> str:
    if kind == "second":
        axis_word = {"leftmost": "left", "rightmost": "right", "topmost": "top", "lowest": "bottom"}[name]
        return f"second {phrase} from the {axis_word}"
    if kind == "extreme":
        if name == "lowest":
            return f"{draw.choice(('lowest', 'bottommost'))} {phrase}"
        return f"{name} {phrase}"
    if name == "middle":
        return draw.choice((f"middle {phrase}", f"{phrase} in the middle", f"center {phrase}"))
    if " " in name:
        return draw.choice((f"{name} {phrase}", f"{phrase} {name}", f"{phrase} in the {name}"))
    preposition = "on" if name in ("left", "right") else "at"
    return draw.choice((f"{name} {phrase}", f"{phrase} {name}", f"{phrase} {preposition} the {name}"))


def _short_sentence(meaning: _Meaning, target: int, draw: random.Random) -> str | None:
    """RefCOCO's manner: a few attributes and a place."""
    table, bit = meaning.sharing(target), 1 << target
    zones = [("zone", name, loose) for name, (strict, loose) in meaning.zones().items() if strict & bit]
    orders = [("extreme", name, meaning.outermost(target, *way)) for name, way in _EXTREMES.items()]
    draw.shuffle(zones)
    draw.shuffle(orders)
    chance = draw.random()
    # In RefCOCO 45 % of the sentences name a region and 10 % an order: an order is for what no region singles out, and
    # not even always for that.
    ways = [orders, zones] if chance < 0.03 else [zones, orders] if chance < 0.4 else [zones]
    ways = [[place for place in places if table[15] & place[2] == bit] for places in ways]  # else true of others too
    if chance > 0.93:
        ways.insert(0, [("second", name, -1) for _, name, _ in orders])
    subsets = [bits for bits in _subsets(draw)[:8] if table[bits] != bit]  # else the place would add nothing
    for places in ways:
        for bits in subsets if places else ():
            for kind, name, loose in places:
                if kind == "second":
                    way = _EXTREMES[name]
                    found = meaning.second(table[bits], *way) == target
                    found = found and all(meaning.second(table[fewer], *way) != target for fewer in _FEWER[bits])
                else:
                    found = _minimal(table, bits, loose, bit)
                if found:
                    return _say_location(draw, kind, name, _noun_phrase(draw, meaning.objects[target], bits))
    return None


def _long_sentence(meaning: _Meaning, target: int, draw: random.Random) -> str | None:
    """G-Ref's manner: the object, and where it stands to one or two others."""
    table, bit = meaning.sharing(target), 1 << target
    anchors = list(meaning.anchors(target))
    draw.shuffle(anchors)
    if draw.random() < 0.5:
        anchors.sort(key=lambda a: a[0] not in ("behind", "front"))  # overlaps are rare: take them where they are
    chains = [(a,) for a in anchors[:6]] + [(a, b) for a in anchors[:3] for b in anchors[:3] if a[1] < b[1]]
    subsets = _subsets(draw)[:8]
    all_words = table[15]
    for chain in chains:
        loose = chain[0][2] & chain[-1][2]
        if all_words & loose != bit:
            continue  # true of another with all the words
        for bits in subsets:
            found = table[bits]
            if found & loose != bit or found == bit or not _minimal(table, bits, loose, bit):
                continue  # true of another, or the relation or an attribute adds nothing
            if len(chain) == 2 and any(table[bits] & one == bit for _, _, one in chain):
                continue  # one of the two relations would do
            touched = -1
            for relation, anchor, one in chain:
                touched &= one | meaning.touching(relation, anchor) if relation in ("behind", "front") else one
            if table[bits] & touched != bit:
                continue  # a corner of another lies there too
            tails = []
            for relation, anchor, _ in chain:
                named = _by_attributes(meaning, anchor, draw)
                assert named is not None  # only objects that attributes name are anchors
                tails.append(f"{RELATIONS[relation]} the {_noun_phrase(draw, meaning.objects[anchor], named)}")
            link = draw.choice(("", "that is ", "which is ")) if len(chain) == 1 else "that is "
            return f"the {_noun_phrase(draw, meaning.objects[target], bits)} {link}{' and '.join(tails)}"
    return None


def _sentence(meaning: _Meaning, target: int, style: str, draw: random.Random) -> str | None:
    if style == "scenesg":
        return _long_sentence(meaning, target, draw)
    if style == "scenes" and draw.random() < 0.8:
        return _short_sentence(meaning, target, draw)
    named = _by_attributes(meaning, target, draw)
    return None if named is None else _noun_phrase(draw, meaning.objects[target], named)


def make_scene(seed: int, split: str, index: int, *, style: str = "scenes", canvas: int = 128) -> Scene:
    """The scene of (seed, split, index): objects, and REFERENCES_PER_SCENE of them with one or two sentences each.

    Args:
        seed: any integer; scenes of different seeds have nothing in common.
        split: one of SPLITS.
        index: position within the split, from 0.
        style: one of STYLES.
        canvas: side of the square image in pixels, at least 64.

    Raises:
        UserError: for an unknown style or split, or a canvas on which objects could not be told apart.
    """
    if style not in STYLES:
        raise UserError(f"unknown scene style {style!r}: choose one of {', '.join(STYLES)}")
    if split not in SPLITS:
        known = ", ".join(one for one in SPLITS if one != "pretrain")
        raise UserError(f"scenes have no split {split!r}: choose one of {known}")
    if canvas < 64:
        raise UserError(f"a canvas of {canvas} pixels is too small to tell the shapes apart: use at least 64")
    draw = random.Random(f"{seed}/{split}/{index}/{style}")
    while True:
        objects, hidden = _layout(draw, split, canvas)
        order = [i for i, o in enumerate(objects) if split != "testB" or (o.colour, o.shape) in HELD_OUT]
        if len(order) < REFERENCES_PER_SCENE:
            continue
        draw.shuffle(order)
        meaning = _Meaning(objects, hidden, canvas)
        references = []
        for target in order:
            said = [_sentence(meaning, target, style, draw) for _ in range(2)]
            sentences = tuple(dict.fromkeys(s for s in said if s is not None))
            if sentences:
                references.append((target, sentences))
            if len(references) == REFERENCES_PER_SCENE:
                return Scene(canvas, tuple(objects), tuple(references), draw.getrandbits(64))


# ---------------------------------------------------------------------------------------------------------------------
# Captions, and what they claim: contrastive training needs to know of which other pictures a text is true as well


_FACTS = {name: 1 << i for i, name in enumerate((*SIZES, *FILLS, *COLOURS, *SHAPES, *_ZONES))}
_VALUE_OF = {word: value for values in _VALUES for value in values for word in _WORDS.get(value, (value,))}


class Phrase(NamedTuple):
    """A text about one object, and the attributes and regions (bits of one int) that it claims of it."""

    text: str
    claims: int

    def may_be(self, there: int) -> bool:
        """Whether it may be said of an object with these facts."""
        return self.claims & there == self.claims


def _regions(scene: Scene) -> dict[str, tuple[int, int]]:
    return _Meaning(scene.objects, {}, scene.canvas).zones()


def facts(scene: Scene) -> list[int]:
    """For every object its attributes and the regions it might be said to lie in. A phrase can only be true of a scene
    if all its claims are facts of one object."""
    zones = _regions(scene)
    return [
        sum([_FACTS[value] for value in thing.attributes])
        + sum([_FACTS[name] for name, (_, loose) in zones.items() if loose >> index & 1])
        for index, thing in enumerate(scene.objects)
    ]


def describe(scene: Scene, index: int, draw: random.Random, *, drop: float = 0.0) -> Phrase:
    """One object: size, fill, colour and shape, each left out with probability `drop`, and a region that it surely lies
    in (all it may be without a word on the region, where `drop` is above 0). Something is always said."""
    thing = scene.objects[index]
    zones = [name for name, (strict, _) in _regions(scene).items() if strict >> index & 1]
    values = [value for value in thing.attributes if draw.random() >= drop]
    if not zones and not values:
        values = [thing.shape]
    phrase, claims = _phrase(draw, values), sum([_FACTS[value] for value in values])
    if not zones or (values and draw.random() < drop):
        return Phrase(phrase, claims)
    zone = draw.choice(zones)
    return Phrase(_say_location(draw, "zone", zone, phrase), claims + _FACTS[zone])


def referring(sentence: str) -> Phrase:
    """A referring sentence and the attributes that it gives its object (no region or order: their truth takes more)."""
    head = sentence
    for words in RELATIONS.values():
        head = head.split(f" {words} ")[0]  # what follows is said of other objects
    values = {_VALUE_OF[word] for word in head.split() if word in _VALUE_OF}
    return Phrase(sentence, sum([_FACTS[value] for value in values]))


def caption(scene: Scene, draw: random.Random, *, most: int = 3) -> tuple[str, list[int]]:
    """A caption of the whole scene, as CLIP is trained on, and the claims of its parts: up to `most` of its objects,
    larger ones first by chance."""
    order = sorted(range(len(scene.objects)), key=lambda i: -scene.objects[i].radius * draw.uniform(0.5, 1.5))
    parts = [describe(scene, i, draw) for i in order[:most]]
    return ", ".join("a " + part.text for part in parts), [part.claims for part in parts]


def twin(scene: Scene, draw: random.Random) -> tuple[Scene, int]:
    """The same scene but for one object, and its index: some of its attributes are others, or it has moved. It has no
    references. All pixels that do not show the object are the same."""
    index = draw.randrange(len(scene.objects))
    thing, others = scene.objects[index], scene.objects[:index] + scene.objects[index + 1 :]

    def fits(x: int, y: int, radius: int) -> bool:
        inside = radius < min(x, y) and max(x, y) < scene.canvas - radius - 1
        return inside and all(math.hypot(x - o.x, y - o.y) >= 0.85 * (radius + o.radius) for o in others)

    changed = thing
    if draw.random() < 0.5:
        for _ in range(12):
            x, y = draw.randrange(scene.canvas), draw.randrange(scene.canvas)
            if fits(x, y, thing.radius):
                changed = replace(thing, x=x, y=y)
                break
    while changed == thing:
        values = dict(zip(ATTRIBUTES, thing.attributes, strict=True))
        for attribute, known in zip(ATTRIBUTES, _VALUES, strict=True):
            if draw.random() < 0.5:
                values[attribute] = draw.choice(known)
        radius = thing.radius
        if values["size"] != thing.size:
            radius = max(3, round(SIZES[values["size"]] * scene.canvas / 128))
            if not fits(thing.x, thing.y, radius):
                continue
        changed = replace(thing, radius=radius, **values)
    objects = (*scene.objects[:index], changed, *scene.objects[index + 1 :])
    return replace(scene, objects=objects, references=()), index


class SceneDataset:
    """Generated scenes as a referring data set (see `ReferringDataset`). Nothing is stored; items are drawn on demand.

    Args:
        name: the style: "scenes", "scenes+" or "scenesg".
        split: "train", "val", "testA" or "testB".
        references: how many references, in REFERENCES_PER_SCENE per scene (rounded up to whole scenes).
        seed: see `make_scene`.
        canvas: side of the images in pixels.
    """

    def __init__(self, name: str, split: str, references: int, *, seed: int = 0, canvas: int = 128) -> None:
        if references < 1:
            raise UserError(f"a data set of {references} references is empty: ask for at least 1")
        self.name, self.split, self.seed, self.canvas = name, split, seed, canvas
        self.scenes = math.ceil(references / REFERENCES_PER_SCENE)
        self._last: tuple[int, Scene] | None = None
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None
        self.scene(0)  # a wrong style, split or canvas is said here, not in a worker

    def __len__(self) -> int:
        return self.scenes * REFERENCES_PER_SCENE

    def scene(self, index: int) -> Scene:
        """The index-th scene."""
        last = self._last  # looked up once: another thread may replace it
        if last is None or last[0] != index:
            scene = make_scene(self.seed, self.split, index, style=self.name, canvas=self.canvas)
            last = self._last = (index, scene)
        return last[1]

    def _render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = self._drawn
        if drawn is None or drawn[0] != index:
            drawn = self._drawn = (index, *render(self.scene(index)))
        return drawn[1], drawn[2]

    def __getitem__(self, index: int) -> Reference:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which, nth = divmod(index, REFERENCES_PER_SCENE)
        _, sentences = self.scene(which).references[nth]
        ref_id = SPLITS.index(self.split) * 10**8 + index
        expressions = tuple(Expression(ref_id * 2 + k, text) for k, text in enumerate(sentences))
        return Reference(ref_id, SPLITS.index(self.split) * 10**8 + which, (ref_id,), self.split, expressions)

    def __iter__(self) -> Iterator[Reference]:
        return (self[i] for i in range(len(self)))

    def image(self, reference: Reference) -> np.ndarray:
        """(canvas, canvas, 3) uint8 RGB."""
        return self._render(reference.image_id % 10**8)[0].copy()

    def mask(self, reference: Reference) -> np.ndarray:
        """(canvas, canvas) bool: the part of the object that is seen."""
        which, nth = divmod(reference.ref_id % 10**8, REFERENCES_PER_SCENE)
        return self._render(which)[1] == self.scene(which).references[nth][0]

    def groups(self) -> Sequence[Sequence[int]]:
        """The references of each scene."""
        n = REFERENCES_PER_SCENE
        return [range(n * i, n * i + n) for i in range(self.scenes)]
