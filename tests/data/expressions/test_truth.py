"""Thousands of sentences of random layouts against a second reading of them, from text and pixels alone.

The second reading knows no margins: "left" is the left half, "largest" has the most pixels. What is strictly true of an
object is true of it here, and what nobody could say of another is false of that one.
"""

import random
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmasksd.data.expressions import Instance, describe
from cmmasksd.data.expressions.claims import true_claims
from cmmasksd.data.expressions.generate import describe_nothing
from cmmasksd.data.expressions.meaning import Meaning
from data.expressions.layouts import COLOURS, HEIGHT, WIDTH, random_scene

NOUNS = {
    "dog": {"dog"},
    "cat": {"cat"},
    "kitty": {"cat"},
    "bird": {"bird"},
    "animal": {"dog", "cat", "bird"},
    "person": {"person"},
    "somebody": {"person"},
    "someone": {"person"},
    "couch": {"couch"},
    "sofa": {"couch"},
    "gizmo": {"gizmo"},
    "cup": {"cup"},
}
CLASSES = ["dog", "cat", "bird", "person", "couch", "gizmo", "cup"]
ENDS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "highest": (1, 1)}
ENDS |= {"lowest": (1, -1), "bottommost": (1, -1), "upper": (1, 1), "lower": (1, -1)}
FROM = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}


class Reading:
    """Which objects of a scene a sentence names, by the plainest meaning of its words."""

    def __init__(self, scene: list[Instance], image: np.ndarray) -> None:
        self.scene, self.image = scene, image
        self.everything = set(range(len(scene)))
        self.centre, self.box, self.area = [], [], []
        for x in scene:
            rows, columns = np.nonzero(x.mask)
            self.box.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            self.centre.append(((columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2))
            self.area.append(len(rows))

    def zone(self, words: str, objects: set[int]) -> set[int]:
        remaining = set(objects)
        for part in words.split():
            axis, sign = FROM[part]
            half = (WIDTH, HEIGHT)[axis] / 2
            remaining = {i for i in remaining if (self.centre[i][axis] - half) * sign < 0}
        return remaining

    def middle(self, objects: set[int]) -> set[int]:
        return {
            i
            for i in objects
            if abs(self.centre[i][0] / WIDTH - 0.5) < 0.2 and abs(self.centre[i][1] / HEIGHT - 0.5) < 0.2
        }

    def end(self, objects: set[int], axis: int, sign: int) -> set[int]:
        return {min(objects, key=lambda i: self.centre[i][axis] * sign)}

    def colour(self, name: str, objects: set[int]) -> set[int]:
        return {i for i in objects if (self.image[self.scene[i].mask] == COLOURS[name]).all(axis=1).mean() > 0.5}

    def noun(self, text: str) -> set[int]:
        return {i for i in self.everything if self.scene[i].category in NOUNS[text]}

    def relation(self, words: str, anchor: int, objects: set[int]) -> set[int]:
        (x, y), (x0, y0, x1, y1) = self.centre[anchor], self.box[anchor]
        if words == "next to":
            near = 0.25 * max(WIDTH, HEIGHT)
            return {
                i
                for i in objects
                if max(x0 - self.box[i][2], self.box[i][0] - x1, y0 - self.box[i][3], self.box[i][1] - y1) <= near
            }
        if words == "on":
            return {
                i
                for i in objects
                if max(x0 - self.box[i][2], self.box[i][0] - x1, y0 - self.box[i][3], self.box[i][1] - y1) <= 1
            }
        axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[words]
        return {i for i in objects if (self.centre[i][axis] - (x, y)[axis]) * sign < 0}

    def objects(self, text: str) -> set[int]:
        text = text.removeprefix("the ")
        words = "|".join(sorted(NOUNS, key=len, reverse=True))
        match = re.fullmatch(rf"(.*?)\b({words})\b(.*)", text)
        assert match, text
        before, noun, after = match[1].split(), match[2], match[3].strip()
        named = kind = self.noun(noun)
        if relation := re.search(
            rf"(?:(to the left of|left of|on the left of)|(to the right of|right of|on the right of)|(above)|(below)"
            rf"|(next to|beside)|(on)) the ({words})$",
            after,
        ):
            value = ("left", "right", "above", "below", "next to", "on")[
                next(n for n, group in enumerate(relation.groups()) if group)
            ]
            (anchor,) = self.noun(relation[7])
            named = self.relation(value, anchor, named - {anchor})
            after = after[: relation.start()].strip()
        if match := re.match(r"(?:in|dressed in) (red|green|blue|white)\b", after):
            named, after = self.colour(match[1], named), after[match.end() :].strip()
        for colour in COLOURS:
            if colour in before:
                before.remove(colour)
                named = self.colour(colour, named)
        if match := re.fullmatch(r"(nearest|closest to) the (.*) corner", after):
            corner = [WIDTH * ("right" in match[2]), HEIGHT * ("bottom" in match[2])]
            named = {min(named, key=lambda i: np.hypot(*np.subtract(self.centre[i], corner)))}
        elif match := re.fullmatch(r"in the (.* .*) corner", after):
            named = self.zone(match[1], named)
        elif match := re.fullmatch(r"from the (left|right|top|bottom)", after):
            axis, sign = FROM[match[1]]
            place = ["first", "second", "third", "fourth"].index(before.pop(0))
            named = {sorted(kind, key=lambda i: self.centre[i][axis] * sign)[place]}
        elif after == "in the middle of the three":
            assert len(kind) == 3
            named = {sorted(kind, key=lambda i: self.centre[i][0])[1]}
        elif after in ("in the middle", "in the center") or before == ["middle"]:
            ordered = sorted(kind, key=lambda i: self.centre[i][0])
            by_zone = self.middle(named)
            named = by_zone or ({ordered[1]} if len(ordered) == 3 else set())
            before = []
        elif match := re.fullmatch(
            r"(?:at|on|in)(?: the)? ((?:top |bottom )?(?:left|right)|top|bottom)(?: side| part)?", after
        ):
            named = self.zone(match[1], named)
        else:
            assert not after, text
        place = " ".join(before)
        if place in ENDS:
            named = self.end(named, *ENDS[place]) if named else named
        elif place in ("largest", "biggest", "smallest"):
            named = {max(named, key=lambda i: self.area[i] * (-1 if place == "smallest" else 1))} if named else named
        elif place in ("left", "right") and len(kind) == 2:
            named = self.end(named, *FROM[place]) if named else named
        elif place:
            named = self.zone(place, named)
        return named


@cache
def sentences(seed: int, *, certain: bool) -> list[tuple[Reading, int, str]]:
    rng = random.Random(seed)
    classes = rng.sample(CLASSES, rng.randint(1, 3))
    scene, image = random_scene(rng, classes, certain=certain)
    reading = Reading(scene, image)
    made = []
    for description in describe(scene, rng, image=image, per_object=3, keep=0.5):
        assert description.target is not None
        made.append((reading, description.target, description.text))
    return made


@pytest.mark.parametrize("certain", [True, False], ids=["objects", "with crowds, unverified and tiny ones"])
def test_every_sentence_is_true_of_its_object_and_of_no_other(certain: bool):
    count = 0
    for seed in range(1000):
        for reading, target, text in sentences(seed, certain=certain):
            assert reading.objects(text) == {target}, (seed, text)
            count += 1
    assert count > 2000


def test_all_kinds_of_words_occur():
    texts = " / ".join(text for seed in range(1000) for *_, text in sentences(seed, certain=True))
    for words in (
        *("left ", "on the right", "at the top", "bottom ", "in the middle", "in the top left corner"),
        *("leftmost", "rightmost", "topmost", "bottommost", "second", "third", "in the middle of the three"),
        *("upper", "lower", "largest", "smallest", "corner", "red ", "in blue", "to the left of the", "right of the"),
        *("above the", "below the", "next to the", "on the couch", "somebody", "animal", "gizmo"),
    ):
        assert words in texts, words


def test_what_names_nothing_names_nothing():
    count = 0
    counts = dict.fromkeys(CLASSES, 5)
    for seed in range(1000):
        rng = random.Random(seed)
        scene, image = random_scene(rng, rng.sample(CLASSES, rng.randint(1, 3)), certain=seed % 2 == 0)
        description = describe_nothing(Meaning(scene, image), counts, rng) if scene else None
        if description is not None:
            assert description.target is None
            if not any(
                colour in description.text
                for colour in ("black", "gray", "brown", "orange", "yellow", "purple", "pink")
            ):
                assert Reading(scene, image).objects(description.text) == set(), (seed, description.text)
            count += 1
    assert count > 600


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_mirrored_image_swaps_left_and_right(seed: int):
    rng = random.Random(seed)
    scene, image = random_scene(rng, ["dog", "gizmo"], certain=True)
    mirrored = [replace(x, mask=x.mask[:, ::-1]) for x in scene]
    swap = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}

    def claims(meaning: Meaning, index: int, swapped: bool) -> set[tuple[str, str, int]]:
        return {
            (
                claim.kind,
                " ".join(swap.get(word, word) for word in claim.value.split()) if swapped else claim.value,
                claim.loose & (1 << len(scene)) - 1,
            )
            for claim in true_claims(meaning, index, meaning.nouns(index)[0])
        }

    original, mirror = Meaning(scene, image), Meaning(mirrored, image[:, ::-1])
    assert original.nameable == mirror.nameable
    for index in range(len(scene)):
        if original.nameable >> index & 1:
            assert claims(original, index, True) == claims(mirror, index, False)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 3))
def test_the_size_in_pixels_does_not_matter_to_positions(seed: int, scale: int):
    scene, _ = random_scene(random.Random(seed), ["dog", "gizmo"], certain=True)
    larger = [replace(x, mask=x.mask.repeat(scale, 0).repeat(scale, 1)) for x in scene]
    original, enlarged = Meaning(scene), Meaning(larger)
    assert original.nameable == enlarged.nameable
    assert original.zones() == enlarged.zones()


def test_the_same_seed_says_the_same():
    scene, image = random_scene(random.Random(3), ["dog", "cat"], certain=True)
    first, second = (describe(scene, random.Random(1), image=image, per_object=2) for _ in range(2))
    assert first == second
    assert describe(scene, random.Random(2), image=image, per_object=2) != first
