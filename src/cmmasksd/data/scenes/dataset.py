"""Generated scenes as a referring data set: a function of (seed, split, index, style, canvas), and nothing stored."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np

from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE
from cmmasksd.data.samples import Expression, Reference
from cmmasksd.data.scenes.drawing import render
from cmmasksd.data.scenes.language import make_sentence
from cmmasksd.data.scenes.layout import lay_out
from cmmasksd.data.scenes.meaning import Meaning
from cmmasksd.data.scenes.vocabulary import HELD_OUT, REFERENCES_PER_SCENE, SPLITS, STYLES, Scene
from cmmasksd.errors import UserError


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
    if canvas > MAX_SCENE_SIZE:
        raise UserError(f"a canvas of {canvas} pixels is too large: use at most {MAX_SCENE_SIZE}")
    if canvas < 64:
        raise UserError(f"a canvas of {canvas} pixels is too small to tell the shapes apart: use at least 64")
    draw = random.Random(f"{seed}/{split}/{index}/{style}")
    while True:
        objects, hidden = lay_out(draw, split, canvas)
        order = [i for i, o in enumerate(objects) if split != "testB" or (o.colour, o.shape) in HELD_OUT]
        if len(order) < REFERENCES_PER_SCENE:
            continue
        draw.shuffle(order)
        meaning = Meaning(objects, hidden, canvas)
        references = []
        for target in order:
            said = [make_sentence(meaning, target, style, draw) for _ in range(2)]
            sentences = tuple(dict.fromkeys(s for s in said if s is not None))
            if sentences:
                references.append((target, sentences))
            if len(references) == REFERENCES_PER_SCENE:
                return Scene(canvas, tuple(objects), tuple(references), draw.getrandbits(64))


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
        if references > MAX_REFERENCES:
            raise UserError(f"a data set of {references} references is too large: ask for at most {MAX_REFERENCES}")
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
