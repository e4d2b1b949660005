"""Captions of scenes and phrases about objects, for contrastive training.

Each comes with its claims, which tell which other images it is true of as well.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import NamedTuple

from cmmasksd.data.scenes.language import phrase_of, say_location
from cmmasksd.data.scenes.meaning import RELATIONS, ZONES, Meaning
from cmmasksd.data.scenes.vocabulary import ATTRIBUTES, COLOURS, FILLS, SHAPES, SIZES, VALUES, WORDS, Scene

_FACTS = {name: 1 << i for i, name in enumerate((*SIZES, *FILLS, *COLOURS, *SHAPES, *ZONES))}
_VALUE_OF = {word: value for values in VALUES for value in values for word in WORDS.get(value, (value,))}


class Phrase(NamedTuple):
    """A text about one object, and the attributes and regions (bits of an int) that it claims."""

    text: str
    claims: int

    def may_be(self, facts: int) -> bool:
        """Whether it may be true of an object with these facts."""
        return self.claims & facts == self.claims


def _regions(scene: Scene) -> dict[str, tuple[int, int]]:
    return Meaning(scene.objects, {}, scene.scene_size).zones()


def facts(scene: Scene) -> list[int]:
    """Attributes and possible regions of every object. A phrase may be true of an object that has all its claims."""
    zones = _regions(scene)
    return [
        sum([_FACTS[value] for value in thing.attributes])
        + sum([_FACTS[name] for name, (_, loose) in zones.items() if loose >> index & 1])
        for index, thing in enumerate(scene.objects)
    ]


def describe(scene: Scene, index: int, draw: random.Random, *, drop: float = 0.0) -> Phrase:
    """A phrase about an object: size, fill, colour, shape and region.

    Args:
        scene: the scene.
        index: index of the object.
        draw: random numbers.
        drop: probability of leaving out each of them; one is always kept. An object on the border of regions has none.
    """
    thing = scene.objects[index]
    zones = [name for name, (strict, _) in _regions(scene).items() if strict >> index & 1]
    values = [value for value in thing.attributes if draw.random() >= drop]
    if not zones and not values:
        values = [thing.shape]
    phrase, claims = phrase_of(draw, values), sum([_FACTS[value] for value in values])
    if not zones or (values and draw.random() < drop):
        return Phrase(phrase, claims)
    zone = draw.choice(zones)
    return Phrase(say_location(draw, "zone", zone, phrase), claims + _FACTS[zone])


def referring(expression: str) -> Phrase:
    """A referring expression with the attributes of its object as claims (regions and orders are left out)."""
    head = expression
    for words in RELATIONS.values():
        head = head.split(f" {words} ")[0]  # the rest is about other objects
    values = {_VALUE_OF[word] for word in head.split() if word in _VALUE_OF}
    return Phrase(expression, sum([_FACTS[value] for value in values]))


def caption(scene: Scene, draw: random.Random, *, most: int = 3) -> tuple[str, list[int]]:
    """A caption of a scene, as CLIP is trained on, and the claims of its parts.

    It describes up to `most` objects; large ones tend to come first.
    """
    order = sorted(range(len(scene.objects)), key=lambda i: -scene.objects[i].radius * draw.uniform(0.5, 1.5))
    parts = [describe(scene, i, draw) for i in order[:most]]
    return ", ".join("a " + part.text for part in parts), [part.claims for part in parts]


def twin(scene: Scene, draw: random.Random) -> tuple[Scene, int]:
    """A scene that differs in one object (its attributes, or its place), and the index of that object.

    It has no references. All pixels that do not show the object are the same.
    """
    index = draw.randrange(len(scene.objects))
    thing, others = scene.objects[index], scene.objects[:index] + scene.objects[index + 1 :]

    def fits(x: int, y: int, radius: int) -> bool:
        inside = radius < min(x, y) and max(x, y) < scene.scene_size - radius - 1
        return inside and all(math.hypot(x - o.x, y - o.y) >= 0.85 * (radius + o.radius) for o in others)

    changed = thing
    if draw.random() < 0.5:
        for _ in range(12):
            x, y = draw.randrange(scene.scene_size), draw.randrange(scene.scene_size)
            if fits(x, y, thing.radius):
                changed = replace(thing, x=x, y=y)
                break
    while changed == thing:
        values = dict(zip(ATTRIBUTES, thing.attributes, strict=True))
        for attribute, known in zip(ATTRIBUTES, VALUES, strict=True):
            if draw.random() < 0.5:
                values[attribute] = draw.choice(known)
        radius = thing.radius
        if values["size"] != thing.size:
            radius = max(3, round(SIZES[values["size"]] * scene.scene_size / 128))
            if not fits(thing.x, thing.y, radius):
                continue
        changed = replace(thing, radius=radius, **values)
    objects = (*scene.objects[:index], changed, *scene.objects[index + 1 :])
    return replace(scene, objects=objects, references=()), index
