"""From a referring data set to batches: which references, which of their sentences, in which order.

Unusual here:

- Everything random is a function of (seed, epoch, reference). No worker holds state, so a run can be resumed at any
  batch, and the sentences do not depend on the number of workers or processes.
- References of one image can be trained together (`per_image`): the image is encoded once for all of them.
- A batch is cut from one global order, process r taking the r-th part: nothing is padded, nothing is seen twice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cmmasksd.config import TrainingConfig
from cmmasksd.data.expressions.drawing import DrawnDataset
from cmmasksd.data.samples import ReferringDataset
from cmmasksd.data.workers import outlive_sigterm
from cmmasksd.errors import UserError
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers.base import Tokens


@dataclass(frozen=True, slots=True)
class Draw:
    """References of one image to load together. The epoch decides their sentences."""

    epoch: int
    references: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """A training batch. M images, B references.

    Attributes:
        images: (M, 3, h, w) uint8, one for each `Draw`.
        tokens: B sentences.
        targets: (B, h / stride, w / stride) float in [0, 1].
        image_index: (B,) int64, the image of each reference.
    """

    images: Tensor
    tokens: Tokens
    targets: Tensor
    image_index: Tensor


def split_batch(training: TrainingConfig, processes: int) -> tuple[int, int]:
    """References per step and process, and steps per update.

    Raises:
        UserError: the processes cannot share `batch` evenly.
    """

    def step(batch: int) -> int:
        """References per step and process; 0: they do not fit."""
        share = batch // processes
        size = min(training.batch_size or share, share)
        return size if size and batch % (processes * size) == 0 else 0

    assert training.batch is not None
    if size := step(training.batch):
        return size, training.batch // (processes * size)
    below = next((batch for batch in range(training.batch - 1, 0, -1) if step(batch)), None)
    above = next(batch for batch in count(training.batch + 1) if step(batch))
    size = min(training.batch_size or training.batch, max(1, training.batch // processes))
    raise UserError(
        f"training.batch {training.batch} cannot be divided into steps of {size} references on "
        f"{named_count(processes)}: use {f'{below} or ' if below else ''}{above}"
    )


def named_count(processes: int) -> str:
    """ "1 process", "2 processes", …"""
    return "1 process" if processes == 1 else f"{processes} processes"


class TrainingBatches(Sampler[list[Draw]]):
    """The batches of one epoch, for one process.

    Args:
        groups: references that share an image (see `ReferringDataset.groups`).
        batch_size: references per batch and process. A single process with fewer references takes all of them.
        per_image: maximum number of references of an image that are drawn together.
        seed: seed of the order.
        rank, world: index of this process, and number of processes.

    Raises:
        UserError: there are no references, or fewer than one batch per process.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        batch_size: int,
        *,
        per_image: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.groups, self.per_image, self.seed, self.rank, self.world = groups, per_image, seed, rank, world
        self.total = sum(len(group) for group in groups)
        if not self.total:
            raise UserError("there is no reference to train on: the split is empty; check its name and the data folder")
        self.batch_size = batch_size if world > 1 else min(batch_size, self.total)
        self.epoch, self.start = 0, 0
        if self.total < self.batch_size * world:
            raise UserError(
                f"{self.total} references are fewer than one batch of {batch_size} on {world} processes: "
                "lower training.batch"
            )

    def __len__(self) -> int:
        return self.total // (self.batch_size * self.world)

    def at(self, epoch: int, start: int = 0) -> TrainingBatches:
        """Choose the epoch and the batch to start from (to resume within an epoch)."""
        self.epoch, self.start = epoch, start
        return self

    def __iter__(self) -> Iterator[list[Draw]]:
        draw = random.Random(f"{self.seed}/order/{self.epoch}")
        chunks = []
        for group in self.groups:
            order = list(group)
            draw.shuffle(order)
            chunks += [order[i : i + self.per_image] for i in range(0, len(order), self.per_image)]
        draw.shuffle(chunks)
        owner = [(chunk, reference) for chunk, references in enumerate(chunks) for reference in references]
        size = self.batch_size
        for step in range(self.start, len(self)):
            begin = (step * self.world + self.rank) * size
            together: dict[int, list[int]] = {}
            for chunk, reference in owner[begin : begin + size]:
                together.setdefault(chunk, []).append(reference)
            yield [Draw(self.epoch, tuple(references)) for references in together.values()]


COLOUR_WORDS = re.compile(
    r"\b(black|white|gr[ae]y|silver|gold|red|orange|yellow|green|cyan|turquoise|blue|purple|violet|pink|brown|beige|"
    r"blond|maroon|navy|colou?r)",
    re.IGNORECASE,
)


class TrainingItems(Dataset):
    """Loads a `Draw`: one image, one random sentence for each of its references, and their targets.

    Args:
        data: the split.
        processor: makes pixels, targets and tokens.
        stride: pixels of the canvas per logit.
        seed: seed of the sentences, and of which images lose their colours.
        greyscale: see `DataConfig`.
    """

    def __init__(
        self,
        data: ReferringDataset | DrawnDataset,
        processor: CMMaskSDProcessor,
        *,
        stride: float,
        seed: int = 0,
        greyscale: float = 0.0,
    ) -> None:
        self.data, self.processor, self.stride, self.seed, self.greyscale = data, processor, stride, seed, greyscale

    def __getitem__(self, draw: Draw) -> tuple[Tensor, list[str], list[Tensor]]:
        pixels, expressions = self._drawn(draw)
        image, placement = self.processor.image(pixels)
        texts = [text for text, _ in expressions]
        targets = [self.processor.target(mask, placement, self.stride) for _, mask in expressions]
        if self.greyscale and not any(COLOUR_WORDS.search(text) for text in texts):
            chance = random.Random(f"{self.seed}/grey/{draw.epoch}/{draw.references}")
            if chance.random() < self.greyscale:
                image = fade(image, max(0.0, chance.uniform(-1, 1)))
        return image, texts, targets

    def _drawn(self, draw: Draw) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
        """An image, and a sentence and a mask for each of its references."""
        if isinstance(self.data, DrawnDataset):
            return self.data.draw(draw.references, random.Random(f"{self.seed}/draw/{draw.epoch}/{draw.references}"))
        expressions = []
        for index in draw.references:
            reference = self.data[index]
            chance = random.Random(f"{self.seed}/sentence/{draw.epoch}/{index}")
            expressions.append((chance.choice(reference.expressions).text, self.data.mask(reference)))
        return self.data.image(self.data[draw.references[0]]), expressions

    def collate(self, items: list[tuple[Tensor, list[str], list[Tensor]]]) -> Batch:
        """Items to a batch."""
        images, texts, targets = zip(*items, strict=True)
        return Batch(
            torch.stack(images),
            self.processor.tokens([text for per_image in texts for text in per_image]),
            torch.stack([target for per_image in targets for target in per_image]),
            torch.arange(len(items)).repeat_interleave(torch.tensor([len(per_image) for per_image in texts])),
        )


def fade(image: Tensor, keep: float) -> Tensor:
    """A (3, h, w) uint8 RGB image with a fraction of its colours, 0 (grey) to 1 (all); same lightness (Rec. 601)."""
    colour = image.float()
    grey = (colour * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return (grey + (colour - grey) * keep).round().clamp(0, 255).to(image.dtype)


def training_loader(items: TrainingItems, batches: TrainingBatches, workers: int) -> DataLoader:
    """A loader that leaves torch's global random state alone (so that a resumed run draws the same masks)."""
    return DataLoader(
        items,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=items.collate,
        worker_init_fn=outlive_sigterm,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
