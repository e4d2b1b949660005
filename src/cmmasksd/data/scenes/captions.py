"""Captions of whole scenes and phrases about single objects, with what each claims: contrastive training needs to know
of which other images a text is true as well."""

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
    """A text about one object, and the attributes and regions (bits of one int) that it claims of it."""

    text: str
    claims: int

    def may_be(self, there: int) -> bool:
        """Whether it may be said of an object with these facts."""
        return self.claims & there == self.claims


def _regions(scene: Scene) -> dict[str, tuple[int, int]]:
    return Meaning(scene.objects, {}, scene.canvas).zones()


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
    phrase, claims = phrase_of(draw, values), sum([_FACTS[value] for value in values])
    if not zones or (values and draw.random() < drop):
        return Phrase(phrase, claims)
    zone = draw.choice(zones)
    return Phrase(say_location(draw, "zone", zone, phrase), claims + _FACTS[zone])


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
        for attribute, known in zip(ATTRIBUTES, VALUES, strict=True):
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
