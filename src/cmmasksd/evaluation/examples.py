"""The expressions that a report shows: the best, the worst, and a random sample, predicted again.

The best and the worst show the range; the random sample, a seeded draw from all expressions, shows the typical quality.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cmmasksd.data.samples import ReferringDataset
from cmmasksd.errors import UserError
from cmmasksd.evaluation.protocols import ORIGINAL
from cmmasksd.evaluation.results import ExpressionScore

if TYPE_CHECKING:
    from cmmasksd.inference.predictor import Segmenter


MIN_BEST = 0.0005
"""IoU below which an expression is not among the best: it is shown as 0.0 %."""


@dataclass(frozen=True, slots=True)
class Example:
    """One expression with its image and masks.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        sentence: the sentence.
        truth: (H, W) bool, the true mask.
        prediction: (H, W) bool, the predicted mask.
        iou: IoU of the two, a fraction of 1.
        sent_id: id of the expression.
        image_id: id of its image.
    """

    image: np.ndarray
    sentence: str
    truth: np.ndarray
    prediction: np.ndarray
    iou: float
    sent_id: int
    image_id: int


def choose_examples(rows: Sequence[ExpressionScore], n: int, seed: int = 0) -> dict[str, list[int]]:
    """Choose the n best expressions whose IoU is not 0, the n worst, and n drawn from all.

    The choice depends on the rows and the seed, not on the order of the rows. Ties are broken at random: otherwise the
    many expressions with IoU 0 would be represented by the first image.

    Args:
        rows: the scored expressions of a split.
        n: maximum number of each kind; the kinds overlap where there are few rows.
        seed: seed of the draw.

    Returns:
        "best", "worst" and "random" -> sent_ids, the best and the worst of all first.
    """
    drawn = sorted(rows, key=lambda row: row.sent_id)
    random.Random(seed).shuffle(drawn)
    ascending = sorted(drawn, key=lambda row: row.iou)  # stable: ties keep the drawn order
    descending = sorted(drawn, key=lambda row: -row.iou)
    best = [row for row in descending if row.iou >= MIN_BEST]
    chosen = {"best": best, "worst": ascending, "random": drawn}
    return {kind: [row.sent_id for row in ordered[:n]] for kind, ordered in chosen.items()}


def collect_examples(
    data: ReferringDataset, segmenter: Segmenter, chosen: Mapping[str, Sequence[int]]
) -> dict[str, list[Example]]:
    """Predict the chosen expressions again.

    Args:
        data: the split that was scored.
        segmenter: the model that was scored, with the same threshold.
        chosen: kind -> sent_ids, see `choose_examples`.

    Returns:
        Kind -> examples, in the order of `chosen`.

    Raises:
        UserError: an expression is not in the split.
    """
    wanted = {sent_id for sent_ids in chosen.values() for sent_id in sent_ids}
    examples: dict[int, Example] = {}
    for index in range(len(data)):
        if len(examples) == len(wanted):
            break
        reference = data[index]
        expressions = [expression for expression in reference.expressions if expression.sent_id in wanted]
        if not expressions:
            continue
        image, truth = data.image(reference), data.mask(reference)
        segmentations = segmenter.segment(image, [expression.text for expression in expressions])
        for expression, segmentation in zip(expressions, segmentations, strict=True):
            mask = segmentation.mask
            iou = ORIGINAL.iou(int((mask & truth).sum()), int((mask | truth).sum()))
            examples[expression.sent_id] = Example(
                image, expression.text, truth, mask, iou, expression.sent_id, reference.image_id
            )
    if missing := wanted - examples.keys():
        raise UserError(
            f"{data.name} {data.split} has no expression {min(missing)}: score the model on this data first"
        )
    return {kind: [examples[sent_id] for sent_id in sent_ids] for kind, sent_ids in chosen.items()}
