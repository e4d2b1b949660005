"""Score a split: every sentence of every reference, at the image's own size, with the same digits on any number of
processes.

Images are taken in blocks that do not depend on the number of processes; whole blocks are shared out. So nothing is
padded, nothing counted twice, and every number is computed from the same batch whoever computes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from cmmasksd.data.samples import ReferringDataset
from cmmasksd.data.workers import loaded, outlive_sigterm
from cmmasksd.errors import UserError
from cmmasksd.evaluation.items import ScoringItem, ScoringItems
from cmmasksd.evaluation.protocols import ORIGINAL, ScoringProtocol
from cmmasksd.evaluation.results import ExpressionScore

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

BLOCK = 8
"""Images that are encoded together."""
SENTENCES = 64
"""Sentences about one image that are encoded and decoded in one call; bounds the memory."""
RESTORE_PIXELS = 1 << 24
"""Pixels of masks that are restored to the image's own size together; bounds the memory. At least one mask is."""


def make_accelerator(precision: str | None = None) -> Accelerator:
    """The device and the processes of this run, for training and scoring alike.

    Args:
        precision: "no" or "bf16"; None: as `accelerate launch` says, else "no".

    Raises:
        UserError: when the launcher started more processes than accelerate joins: each would do the whole work alone.
    """
    from accelerate import Accelerator

    # Without an accelerator device, accelerate joins the processes of torchrun only where it is told to use the CPU.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(accelerator.num_processes):
        raise UserError(
            f"{launched} processes were launched (WORLD_SIZE), but accelerate joins {accelerator.num_processes} on "
            f"{accelerator.device.type}: start one process, or set ACCELERATE_USE_CPU=true to train on the CPU"
        )
    return accelerator


def evaluate(
    model: CMMaskSDModel,
    processor: CMMaskSDProcessor,
    data: ReferringDataset,
    *,
    protocol: ScoringProtocol = ORIGINAL,
    accelerator: Accelerator | None = None,
    workers: int = 0,
    references: int = 0,
    progress: bool = True,
) -> tuple[list[ExpressionScore], dict[str, float], int]:
    """Score a data set.

    Args:
        model, processor: see `from_pretrained`.
        data: the split.
        protocol: threshold and rules.
        accelerator: for the device, and to share the work among its processes; None: this process, the model's device.
        workers: processes that read images.
        references: score the images of at least so many references only (0: all).
        progress: show a bar.

    Returns:
        rows: one per sentence, of all processes, sorted by sentence id.
        scores: oIoU, mIoU, P@0.5 … P@0.9 as fractions of 1, computed from the rows.
        truncated: sentences that lost words to the limit of tokens.

    Raises:
        UserError: the split is empty, or two sentences have one id.
    """
    from tqdm import tqdm

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    groups = list(data.groups())
    if references:
        have, keep = 0, []
        for group in groups:
            if have >= references:
                break
            have += len(group)
            keep.append(group)
        groups = keep
    blocks = [range(at, min(at + BLOCK, len(groups))) for at in range(0, len(groups), BLOCK)]
    loader = DataLoader(
        ScoringItems(data, processor, groups),
        batch_sampler=[list(block) for block in blocks[rank::world]],
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=outlive_sigterm,
        generator=torch.Generator().manual_seed(0),
    )
    rows: list[ExpressionScore] = []
    truncated = 0
    was_training = model.training
    model.eval()
    shown = progress and rank == 0
    with tqdm(total=len(groups), desc=f"evaluate {data.name} {data.split}", unit="image", disable=not shown) as bar:
        for block in loaded(loader):
            rows += _score_block(model, processor, block, protocol)
            truncated += sum(int(item.tokens.truncated.sum()) for item in block)
            bar.update(min(len(block) * world, bar.total - bar.n))
            if shown:
                bar.set_postfix(mIoU=f"{sum(r.iou for r in rows) / len(rows):.3f}")
    model.train(was_training)
    if world > 1:
        from accelerate.utils import gather_object

        rows = gather_object(rows)
        truncated = sum(gather_object([truncated]))
    rows.sort(key=lambda row: row.sent_id)
    for row, following in pairwise(rows):
        if row.sent_id == following.sent_id:
            raise UserError(f"expression {row.sent_id} was scored twice: each needs an id of its own")
    return rows, protocol.scores((row.intersection, row.union) for row in rows), truncated


@torch.no_grad()
def _score_block(
    model: CMMaskSDModel, processor: CMMaskSDProcessor, block: list[ScoringItem], protocol: ScoringProtocol
) -> Iterator[ExpressionScore]:
    """Encode the block's images once, decode every sentence, count pixels at the original size.

    How sentences are taken together depends on their image alone, so that the digits do not depend on the processes.
    """
    device = model.device
    images = model.encode_image(processor.pixel_values(torch.stack([item.image for item in block]).to(device)))
    for nth, item in enumerate(block):
        height, width = item.placement.original
        together = max(1, RESTORE_PIXELS // (height * width))
        for start in range(0, len(item.sentences), SENTENCES):
            tokens = item.tokens.select(slice(start, start + SENTENCES)).to(device)
            index = torch.full((len(tokens),), nth, device=device)
            logits = model.decode(images.select(index), model.encode_text(tokens))
            for at in range(0, len(tokens), together):
                part = slice(start + at, start + min(at + together, len(tokens)))
                predicted = processor.masks(logits[at : at + together], item.placement, protocol.threshold)  # (k, H, W)
                truth = torch.stack([item.mask(which) for which in range(part.start, part.stop)]).to(device)
                intersections = (predicted & truth).sum((1, 2)).tolist()
                unions = (predicted | truth).sum((1, 2)).tolist()
                targets = truth.sum((1, 2)).tolist()
                for said, i, u, pixels in zip(item.sentences[part], intersections, unions, targets, strict=True):
                    yield ExpressionScore(*said, i, u, pixels, protocol.iou(i, u))
