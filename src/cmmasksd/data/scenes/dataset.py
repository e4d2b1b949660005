"""Generated scenes as a referring data set, drawn on demand from (seed, split, index, style, scene_size)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE
from cmmasksd.data.samples import Expression, Reference
from cmmasksd.data.scenes.drawing import render
from cmmasksd.data.scenes.language import make_expression
from cmmasksd.data.scenes.layout import lay_out
from cmmasksd.data.scenes.meaning import Meaning
from cmmasksd.data.scenes.vocabulary import HELD_OUT, REFERENCES_PER_SCENE, SPLITS, STYLES, Scene
from cmmasksd.errors import UserError


def make_scene(seed: int, split: str, index: int, *, style: str = "scenes", scene_size: int = 128) -> Scene:
    """Make a scene: objects, and REFERENCES_PER_SCENE of them with one or two expressions each.

    Args:
        seed: any integer; scenes of different seeds are independent.
        split: one of SPLITS.
        index: position within the split, from 0.
        style: one of STYLES.
        scene_size: side of the square image in pixels, at least 64.

    Raises:
        UserError: the style or split is unknown, or scene_size is out of bounds.
    """
    if style not in STYLES:
        raise UserError(f"unknown scene style {style!r}: choose one of {', '.join(STYLES)}")
    if split not in SPLITS:
        raise UserError(f"scenes have no split {split!r}: choose one of {', '.join(SPLITS[:-1])}")
    if scene_size > MAX_SCENE_SIZE:
        raise UserError(f"scenes of {scene_size} pixels are too large: use at most {MAX_SCENE_SIZE}")
    if scene_size < 64:
        raise UserError(f"scenes of {scene_size} pixels are too small to tell the shapes apart: use at least 64")
    draw = random.Random(f"{seed}/{split}/{index}/{style}")
    while True:
        objects, hidden = lay_out(draw, split, scene_size)
        order = [i for i, o in enumerate(objects) if split != "testB" or (o.colour, o.shape) in HELD_OUT]
        if len(order) < REFERENCES_PER_SCENE:
            continue
        draw.shuffle(order)
        meaning = Meaning(objects, hidden, scene_size)
        references = []
        for target in order:
            tries = [make_expression(meaning, target, style, draw) for _ in range(2)]
            expressions = tuple(dict.fromkeys(text for text in tries if text is not None))
            if expressions:
                references.append((target, expressions))
            if len(references) == REFERENCES_PER_SCENE:
                return Scene(scene_size, tuple(objects), tuple(references), draw.getrandbits(64))


class SceneDataset:
    """One split of generated scenes; implements `ReferringDataset`. Scenes are drawn on demand.

    Args:
        name: the style: "scenes", "scenes+" or "scenesg".
        split: "train", "val", "testA" or "testB".
        references: number of references, rounded up to whole scenes of REFERENCES_PER_SCENE.
        seed: see `make_scene`.
        scene_size: side of the images in pixels.
    """

    def __init__(self, name: str, split: str, references: int, *, seed: int = 0, scene_size: int = 128) -> None:
        if references < 1:
            raise UserError(f"a data set of {references} references is empty: ask for at least 1")
        if references > MAX_REFERENCES:
            raise UserError(f"a data set of {references} references is too large: ask for at most {MAX_REFERENCES}")
        self.name, self.split, self.seed, self.scene_size = name, split, seed, scene_size
        self.scenes = math.ceil(references / REFERENCES_PER_SCENE)
        self._last: tuple[int, Scene] | None = None
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None
        self.scene(0)  # refuses a wrong style, split or scene_size here, not in a worker

    def __len__(self) -> int:
        return self.scenes * REFERENCES_PER_SCENE

    def scene(self, index: int) -> Scene:
        """The index-th scene."""
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != index:
            scene = make_scene(self.seed, self.split, index, style=self.name, scene_size=self.scene_size)
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
        scene, nth = divmod(index, REFERENCES_PER_SCENE)
        _, texts = self.scene(scene).references[nth]
        first_id = SPLITS.index(self.split) * 10**8
        ref_id = first_id + index
        expressions = tuple(Expression(ref_id * 2 + k, text) for k, text in enumerate(texts))
        return Reference(ref_id, first_id + scene, (ref_id,), self.split, expressions)

    def image(self, reference: Reference) -> np.ndarray:
        """The reference's image, (scene_size, scene_size, 3) uint8 RGB."""
        return self._render(reference.image_id % 10**8)[0].copy()

    def mask(self, reference: Reference) -> np.ndarray:
        """The visible part of the reference's object, (scene_size, scene_size) bool."""
        scene, nth = divmod(reference.ref_id % 10**8, REFERENCES_PER_SCENE)
        return self._render(scene)[1] == self.scene(scene).references[nth][0]

    def groups(self) -> Sequence[Sequence[int]]:
        """Indices of the references of each scene; see `ReferringDataset`."""
        n = REFERENCES_PER_SCENE
        return [range(n * i, n * i + n) for i in range(self.scenes)]
