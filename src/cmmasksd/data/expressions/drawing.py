"""Annotated photographs to train on: each draw changes the photograph first and then makes its sentences.

A draw may mirror the photograph, crop it, and paste an object of another photograph of the same file into it, which
makes "the left dog" where there was one dog. Sentences are made from what is there in the end, and colours are measured
before the light is changed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from cmmasksd.config import AugmentConfig
from cmmasksd.data.expressions.generate import describe_all, describe_nothing
from cmmasksd.data.expressions.instances import Instance, InstanceFile
from cmmasksd.data.expressions.meaning import Meaning
from cmmasksd.data.expressions.shapes import measure_shape
from cmmasksd.data.expressions.words import WORN
from cmmasksd.data.images import read_image
from cmmasksd.data.readers.annotated import AnnotatedImage
from cmmasksd.data.samples import Expression, Reference
from cmmasksd.errors import UserError

TOGETHER = 4
"""References of an image are multiples of this."""
_MOST = 12
_TRIES = 8
"""Photographs to try where nothing can be named, and places to try for a pasted object."""


class Drawn(NamedTuple):
    """A photograph, (H, W, 3) uint8 RGB, and sentences with their masks, (H, W) bool; empty where nothing is named."""

    image: np.ndarray
    expressions: list[tuple[str, np.ndarray]]


class Donor(NamedTuple):
    """An object that may be pasted: photograph, and place of the object among its annotations."""

    image: int
    annotation: int


class DrawnDataset:
    """The photographs of a split, each of which counts as many references as it has objects, within limits.

    Implements the part of `ReferringDataset` that training needs; sentences exist only in what `draw` returns.

    Args:
        split: name of the split.
        photographs: its images, each with its file.
        settings: how photographs change.
    """

    name = "instances"

    def __init__(
        self, split: str, photographs: Sequence[tuple[InstanceFile, AnnotatedImage]], settings: AugmentConfig
    ) -> None:
        self.split, self.settings = split, settings
        self._photographs = [
            (file, image)
            for file, image in photographs
            if any(annotation.segmentation is not None and not annotation.crowd for annotation in image.annotations)
        ]
        self._groups: list[list[int]] = []
        self._photograph_of: list[int] = []
        self._donors: dict[InstanceFile, dict[str, list[Donor]]] = {file: {} for file, _ in photographs}
        for index, (file, image) in enumerate(self._photographs):
            chunks = round(len(image.annotations) / TOGETHER)
            count = min(max(TOGETHER, TOGETHER * chunks), _MOST)
            self._groups.append(list(range(len(self), len(self) + count)))
            self._photograph_of += [index] * count
            for place, annotation in enumerate(image.annotations):
                if annotation.verified and not annotation.crowd and annotation.segmentation is not None:
                    self._donors[file].setdefault(annotation.category, []).append(Donor(index, place))
        for file, by_class in self._donors.items():
            if (WORN - {"tie"}) & by_class.keys():  # where persons are cut into garments, nothing is a whole object
                self._donors[file] = {}

    def __len__(self) -> int:
        return len(self._photograph_of)

    def __getitem__(self, index: int) -> Reference:
        """A reference, whose sentence stands for those of its draws."""
        photograph = self._photograph_of[index]
        return Reference(index, photograph, (index,), self.split, (Expression(index, "object"),))

    def groups(self) -> list[list[int]]:
        """Indices of the references that share an image."""
        return self._groups

    def draw(self, references: Sequence[int], rng: random.Random) -> Drawn:
        """As many sentences as there are references, or fewer where the image has no more.

        Args:
            references: indices of one image.
            rng: the only source of chance.

        Raises:
            UserError: an image or annotation is damaged, or nothing on many photographs can be named.
        """
        for _ in range(_TRIES):
            drawn = self._draw(references, rng)
            if drawn.expressions:
                return drawn
            references = [rng.randrange(len(self))]  # of another photograph
        raise UserError(
            f"nothing on {_TRIES} photographs can be named: `cmmasksd data expressions` says why, such as too small"
        )

    def _draw(self, references: Sequence[int], rng: random.Random) -> Drawn:
        index = self._photograph_of[references[0]]
        file, photograph = self._photographs[index]
        image, instances = self._read(index), file.instances(photograph)
        settings = self.settings
        if rng.random() < settings.paste:
            image, instances = self._paste(file, image, instances, rng)
        if rng.random() < settings.crop:
            image, instances = crop(image, instances, rng)
        if rng.random() < settings.flip:
            image, instances = mirror(image, instances)
        meaning = Meaning(instances, image, size=image.shape[:2])
        descriptions = describe_all(meaning, rng, keep=0.3)
        if len(descriptions) < len(references):
            descriptions = describe_all(meaning, rng, per_object=3, keep=0.5)
        rng.shuffle(descriptions)
        expressions = []
        for description in descriptions[: len(references)]:
            assert description.target is not None
            expressions.append((description.text, instances[description.target].mask))
        if expressions and rng.random() < settings.no_target:
            nothing = describe_nothing(meaning, file.categories, rng)
            if nothing is not None:
                expressions = [*expressions[: len(references) - 1], (nothing.text, np.zeros(image.shape[:2], bool))]
        return Drawn(_relit(image, settings.light, rng), expressions)

    def _read(self, index: int) -> np.ndarray:
        file, photograph = self._photographs[index]
        if photograph.path is None:
            raise UserError(f"{file.path} has no image files beside it: put them into its folder or into images")
        return read_image(photograph.path, exif=file.is_upright(photograph))

    def _paste(
        self, file: InstanceFile, image: np.ndarray, instances: list[Instance], rng: random.Random
    ) -> tuple[np.ndarray, list[Instance]]:
        """Put an object of another photograph in front, where it leaves most of every other in view."""
        by_class = self._donors[file]
        if not by_class:
            return image, instances
        present = sorted({instance.category for instance in instances} & by_class.keys())
        name = rng.choice(present) if present and rng.random() < 0.75 else rng.choice(sorted(by_class))
        donor = rng.choice(by_class[name])
        source, photograph = self._photographs[donor.image]
        annotation = photograph.annotations[donor.annotation]
        mask = source.mask(photograph, annotation)
        shape = None if mask is None else measure_shape(mask)
        if mask is None or shape is None:
            return image, instances
        x0, y0, x1, y1 = shape.box
        whole = x0 > 1 and y0 > 1 and x1 < mask.shape[1] - 1 and y1 < mask.shape[0] - 1
        if not whole or shape.area < 0.01 * mask.size:
            return image, instances
        height, width = image.shape[:2]
        same = [instance.mask.sum() for instance in instances if instance.category == name]
        area = rng.choice(same) * rng.uniform(0.6, 1.5) if same else height * width * rng.uniform(0.02, 0.2)
        scale = min((area / shape.area) ** 0.5, 0.7 * height / (y1 - y0), 0.7 * width / (x1 - x0), 2.0)
        size = max(4, round((x1 - x0) * scale)), max(4, round((y1 - y0) * scale))
        cut = Image.fromarray(mask[y0:y1, x0:x1].astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
        colours = Image.fromarray(self._read(donor.image)[y0:y1, x0:x1]).resize(size, Image.Resampling.BICUBIC)
        alpha = np.asarray(cut.filter(ImageFilter.GaussianBlur(0.7)), np.float32)[..., None] / 255
        pasted, patch = np.asarray(cut) > 127, np.asarray(colours, np.float32)
        if rng.random() < 0.5:
            pasted, patch, alpha = pasted[:, ::-1], patch[:, ::-1], alpha[:, ::-1]
        for _ in range(_TRIES):
            left, top = rng.randint(0, width - size[0]), rng.randint(0, height - size[1])
            where = slice(top, top + size[1]), slice(left, left + size[0])
            if all((i.mask[where] & pasted).sum() <= 0.35 * i.mask.sum() for i in instances):
                break
        else:
            return image, instances
        changed = image.copy()
        changed[where] = np.rint(patch * alpha + changed[where] * (1 - alpha))
        mine = np.zeros((height, width), bool)
        mine[where] = pasted
        below = [replace(i, mask=i.mask & ~mine, order=None) for i in instances]
        return changed, [*(i for i in below if i.mask.any()), Instance(name, mine)] if mine.any() else below


def mirror(image: np.ndarray, instances: Sequence[Instance]) -> tuple[np.ndarray, list[Instance]]:
    """Left and right exchanged."""
    return image[:, ::-1], [replace(instance, mask=instance.mask[:, ::-1]) for instance in instances]


def crop(image: np.ndarray, instances: Sequence[Instance], rng: random.Random) -> tuple[np.ndarray, list[Instance]]:
    """A random part of at least 0.6 of each side. Objects of which less than half remains are named no more."""
    height, width = image.shape[:2]
    rows, columns = (max(1, round(side * rng.uniform(0.6, 1.0))) for side in (height, width))
    top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
    where = slice(top, top + rows), slice(left, left + columns)
    kept = []
    for instance in instances:
        mask = instance.mask[where]
        if mask.any():
            cut = mask.sum() < 0.5 * instance.mask.sum()
            kept.append(replace(instance, mask=mask, crowd=instance.crowd or bool(cut)))
    return image[where], kept


def _relit(image: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    """Other brightness and contrast, by factors of at most 1 ± strength."""
    if not strength:
        return np.ascontiguousarray(image)
    brightness, contrast = rng.uniform(1 - strength, 1 + strength), rng.uniform(1 - strength, 1 + strength)
    grey = float(image.mean())
    table = np.clip((np.arange(256) - grey) * contrast + grey * brightness, 0, 255).astype(np.uint8)
    return table[image]
