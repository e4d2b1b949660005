"""How pixel counts become scores: the choices on which published RIS scores silently differ, as one stored record.

The scores of one model differ by points between papers because of the threshold, the comparison in P@X, the image size,
and the value of two empty masks. Here each choice is a field, and the protocol is written into every result file.

Two aggregates are called "IoU" in the literature and differ by one to four points, so both are always printed:
    oIoU  sum of intersections / sum of unions over the split ("overall", "cIoU"); large objects weigh more
    mIoU  mean of the per-expression IoU ("gIoU" in GRES); every expression weighs the same
    P@X   fraction of expressions whose IoU reaches X

This file is pure Python integers and floats, so that reading a result file needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cmmasksd.errors import UserError, shown

PRECISION_TENTHS = (5, 6, 7, 8, 9)
"""The X of P@X in tenths: integers, so that the comparison is exact."""

METRIC_NAMES = ("oIoU", "mIoU", *(f"P@0.{tenths}" for tenths in PRECISION_TENTHS))
"""The keys of every score dictionary and result file, in the order in which tables print them."""


@dataclass(frozen=True, slots=True)
class ScoringProtocol:
    """The rules under which a split is scored.

    Attributes:
        name: name of the protocol in tables.
        threshold: probability above which a pixel belongs to the prediction.
        comparison: P@X counts an expression when IoU >= X (LAVT's code and its descendants; our default) or IoU > X
            (CRIS and its descendants). They differ where the IoU is exactly X, which occurs for small objects.
        frame: where masks are compared. "original": at the image's own size, letterbox undone, never on a resized
            square.
        empty_iou: IoU of an empty prediction on an empty truth, 0 or 1. Our default is 1: the prediction is correct.
            (LAVT's code gives 0, torchmetrics' MeanIoU NaN.) Such a pair adds nothing to oIoU.
        expressions: "all": every sentence of every reference is scored once, in validation as in test.
    """

    name: str
    threshold: float = 0.5
    comparison: Literal[">=", ">"] = ">="
    frame: Literal["original"] = "original"
    empty_iou: float = 1.0
    expressions: Literal["all"] = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable():
            raise UserError(f"the protocol's name is {shown(self.name)}: give a short text")
        if not _is_number(self.threshold) or not 0.0 < self.threshold < 1.0:
            raise UserError(f"threshold is {shown(self.threshold)}: give a probability between 0 and 1, such as 0.5")
        if self.comparison not in (">=", ">"):
            raise UserError(f"comparison is {shown(self.comparison)}: P@X compares with '>=' or '>'")
        if self.frame != "original":
            raise UserError(f"frame is {shown(self.frame)}: masks are compared at the image's own size, 'original'")
        if not _is_number(self.empty_iou) or self.empty_iou not in (0.0, 1.0):
            raise UserError(f"empty_iou is {shown(self.empty_iou)}: an empty pair is wrong (0) or correct (1)")
        if self.expressions != "all":
            raise UserError(f"expressions is {shown(self.expressions)}: every sentence is scored, 'all'")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for the result file."""
        return asdict(self)

    def iou(self, intersection: int, union: int) -> float:
        """The IoU of one expression, as a fraction of 1; an empty union follows `empty_iou`."""
        return intersection / union if union else float(self.empty_iou)

    def reaches(self, intersection: int, union: int, tenths: int) -> bool:
        """Whether one expression's IoU reaches tenths/10, decided on integers: a float 0.7 is not seven tenths."""
        if not union:
            intersection, union = int(self.empty_iou), 1
        difference = 10 * intersection - tenths * union
        return difference >= 0 if self.comparison == ">=" else difference > 0

    def scores(self, counts: Iterable[tuple[int, int]]) -> dict[str, float]:
        """All aggregate scores of a split.

        Sums are of integers or by `math.fsum`, which rounds once, so the digits do not depend on the order of the
        expressions or the number of processes.

        Args:
            counts: (intersection, union) in pixels, one pair per expression.

        Returns:
            METRIC_NAMES -> fraction of 1. Where every pair is empty, oIoU is `empty_iou`.

        Raises:
            UserError: there is no expression.
        """
        counts = list(counts)
        if not counts:
            raise UserError("no expression was scored: the split is empty; check its name and the data folder")
        ious = [self.iou(intersection, union) for intersection, union in counts]
        scores = {
            "oIoU": self.iou(sum(intersection for intersection, _ in counts), sum(union for _, union in counts)),
            "mIoU": math.fsum(ious) / len(counts),
        }
        for tenths in PRECISION_TENTHS:
            reached = sum(self.reaches(intersection, union, tenths) for intersection, union in counts)
            scores[f"P@0.{tenths}"] = reached / len(counts)
        return scores


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


ORIGINAL = ScoringProtocol(name="original")
"""The default: threshold 0.5, P@X with >=, at the original size, every sentence, an empty pair is correct."""
