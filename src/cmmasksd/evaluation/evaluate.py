"""Score a model on a split: every sentence of every reference, at the image's own size.

The scores do not depend on the number of processes, to the last digit: images form fixed blocks, and each process takes
whole blocks. So nothing is padded, nothing is counted twice, and each number is computed from the same batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cmmasksd.data.samples import ReferringDataset
from cmmasksd.data.workers import loaded, outlive_sigterm
from cmmasksd.errors import UserError
from cmmasksd.evaluation.items import ScoringItem, ScoringItems
from cmmasksd.evaluation.protocols import ORIGINAL, ScoringProtocol
from cmmasksd.evaluation.results import ExpressionScore, SplitScores
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.trained import TrainedModel

if TYPE_CHECKING:
    from accelerate import Accelerator

BLOCK = 8
"""Number of images that are encoded together."""
SENTENCES = 64
"""Number of sentences about one image that are encoded and decoded in one call; bounds the memory."""
RESTORE_PIXELS = 1 << 24
"""Number of mask pixels restored to the image's own size in one call (at least one mask); bounds the memory."""


def make_accelerator(trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The device and the processes of this run, for training and for scoring.

    Args:
        trackers: experiment trackers, by accelerate's names.
        folder: where those trackers write that write files.

    Raises:
        UserError: the launcher started more processes than accelerate joins, so each would do all of the work.
    """
    from accelerate import Accelerator

    # Without an accelerator device, accelerate joins the processes of torchrun only where it is told to use the CPU.
    # It keeps its precision for the whole process, so training casts by itself.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(accelerator.num_processes):
        raise UserError(
            f"{launched} processes were launched (WORLD_SIZE), but accelerate joins {accelerator.num_processes} on "
            f"{accelerator.device.type}: start one process, or set ACCELERATE_USE_CPU=true to train on the CPU"
        )
    return accelerator


def evaluate(
    model: TrainedModel,
    processor: CMMaskSDProcessor,
    data: ReferringDataset,
    *,
    protocol: ScoringProtocol = ORIGINAL,
    accelerator: Accelerator | None = None,
    workers: int = 0,
    references: int = 0,
    progress: bool = True,
) -> SplitScores:
    """Score a model on a data set.

    Args:
        model: the model; it is scored in evaluation mode and left in its own.
        processor: its processor.
        data: the split.
        protocol: threshold and rules.
        accelerator: shares the work among its processes; None: this process alone.
        workers: number of processes that read images.
        references: score whole images until there are at least this many references (0: all).
        progress: show a bar.

    Returns:
        The scores of all sentences of all processes. Their provenance counts the "truncated_expressions": sentences
        that exceed the maximum number of tokens.

    Raises:
        UserError: the split is empty, or two sentences have the same id.
    """
    from tqdm import tqdm

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    items = ScoringItems(data, processor, _first(data.groups(), references))
    rows: list[ExpressionScore] = []
    truncated = 0
    visible = progress and rank == 0
    training = model.training
    model.eval()
    with tqdm(total=len(items), desc=f"evaluate {data.name} {data.split}", unit="image", disable=not visible) as bar:
        for block in loaded(_loader(items, rank, world, workers)):
            rows += _score_block(model, processor, block, protocol)
            truncated += sum(int(item.tokens.truncated.sum()) for item in block)
            bar.update(min(len(block) * world, bar.total - bar.n))
            if visible:
                bar.set_postfix(mIoU=f"{sum(row.iou for row in rows) / len(rows):.3f}")
    model.train(training)
    if world > 1:
        from accelerate.utils import gather_object

        rows = gather_object(rows)
        truncated = sum(gather_object([truncated]))
    return SplitScores(data.split, rows, protocol, {"truncated_expressions": truncated})


def _first(groups: Sequence[Sequence[int]], references: int) -> list[Sequence[int]]:
    """The first images that together have at least so many references; all for 0."""
    before = accumulate(map(len, groups), initial=0)
    return [group for group, count in zip(groups, before, strict=False) if not references or count < references]


def _loader(items: ScoringItems, rank: int, world: int, workers: int) -> DataLoader:
    """A loader of this process's blocks of images."""
    blocks = [list(range(start, min(start + BLOCK, len(items)))) for start in range(0, len(items), BLOCK)]
    return DataLoader(
        items,
        batch_sampler=blocks[rank::world],
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=outlive_sigterm,
        generator=torch.Generator().manual_seed(0),
    )


@torch.no_grad()
def _score_block(
    model: TrainedModel, processor: CMMaskSDProcessor, block: list[ScoringItem], protocol: ScoringProtocol
) -> Iterator[ExpressionScore]:
    """Encode the block's images once, decode every sentence, count pixels at the original size.

    How sentences are batched depends on their image alone, so that the digits do not depend on the processes.
    """
    device = model.device
    images = model.encode_image(processor.pixel_values(torch.stack([item.image for item in block]).to(device)))
    for position, item in enumerate(block):
        height, width = item.placement.original
        at_once = max(1, RESTORE_PIXELS // (height * width))
        for start in range(0, len(item.sentences), SENTENCES):
            tokens = item.tokens.select(slice(start, start + SENTENCES)).to(device)
            index = torch.full((len(tokens),), position, device=device)
            logits = model.decode(images.select(index), model.encode_text(tokens))
            for offset in range(0, len(tokens), at_once):
                predicted = processor.masks(logits[offset : offset + at_once], item.placement, protocol.threshold)
                yield from _count(item, start + offset, predicted, protocol)


def _count(item: ScoringItem, first: int, predicted: Tensor, protocol: ScoringProtocol) -> Iterator[ExpressionScore]:
    """Compare the masks of the k sentences from `first` on, (k, H, W) bool, with the truth."""
    last = first + len(predicted)
    truth = torch.stack([item.mask(sentence) for sentence in range(first, last)]).to(predicted.device)
    intersections = (predicted & truth).sum((1, 2)).tolist()
    unions = (predicted | truth).sum((1, 2)).tolist()
    targets = truth.sum((1, 2)).tolist()
    for sentence, i, u, target in zip(item.sentences[first:last], intersections, unions, targets, strict=True):
        yield ExpressionScore(*sentence, i, u, target, protocol.iou(i, u))
