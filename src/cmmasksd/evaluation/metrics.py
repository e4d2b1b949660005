"""Intersections and unions, counted exactly and gathered over any number of processes.

We deviate from the usual running sums: every expression keeps its own integer (id, intersection, union) row, a few
hundred kilobytes for the largest split. That way the scores have the same digits for any order and any number of
processes, and an expression counted twice is noticed: a distributed sampler pads its last batch, and on RefCOCO val
with 8 GPUs such duplicates have gone into published means.

torchmetrics' own `MeanIoU` averages in the background class by default, which prints 0.74 where RIS mIoU is 0.49.
The formulas of the scores are in `protocols.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cmmasksd.errors import UserError
from cmmasksd.evaluation.protocols import ORIGINAL, ScoringProtocol


def count(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Pixels in both masks, and pixels in either.

    Args:
        prediction: (H, W) bool, at the image's original size.
        truth: (H, W) bool.

    Returns:
        intersection, union.

    Raises:
        UserError: the masks have different shapes or are not two-dimensional.
        TypeError: a mask is not boolean (0/1/2 integers would count wrongly under `&`).
    """
    if prediction.dtype != np.bool_ or truth.dtype != np.bool_:
        raise TypeError(f"masks must be bool, not {prediction.dtype} and {truth.dtype}: threshold them first")
    if prediction.shape != truth.shape or truth.ndim != 2:
        raise UserError(
            f"prediction is {prediction.shape} and truth {truth.shape}: masks are compared at the image's original"
            " size (H, W); resize the prediction back first"
        )
    intersection = int(np.count_nonzero(prediction & truth))
    return intersection, int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth)) - intersection


class ReferringMetric(Metric):
    """oIoU, mIoU and P@0.5 to P@0.9 of a split, exact for any number of processes.

    Args:
        protocol: the scoring rules.

    Any other keyword goes to `torchmetrics.Metric`. The state lives on the metric's device: with the NCCL backend,
    move the metric to the GPU (`metric.to(device)`) before the first update.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    rows: list[Tensor]

    def __init__(self, protocol: ScoringProtocol = ORIGINAL, **kwargs) -> None:
        super().__init__(**kwargs)
        self.protocol = protocol
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self._append_empty_block()

    def reset(self) -> None:
        """Forget every expression."""
        super().reset()
        self._append_empty_block()

    def _append_empty_block(self) -> None:
        # A process that saw no expression must still gather a (0, 3) int64 block: torchmetrics would send a (0,) float
        # in its place, which hangs or corrupts the gather.
        self.rows.append(torch.empty(0, 3, dtype=torch.int64, device=self.device))

    def update(
        self,
        expression_ids: Sequence[int] | Tensor,
        intersections: Sequence[int] | Tensor,
        unions: Sequence[int] | Tensor,
    ) -> None:
        """Add K expressions.

        Args:
            expression_ids: (K,) integers, unique within the split (`sent_id`).
            intersections: (K,) integers, pixels; see `count`.
            unions: (K,) integers, pixels.

        Raises:
            TypeError: a value is not an integer.
            ValueError: not 0 <= intersection <= union.
        """
        columns = [torch.as_tensor(column) for column in (expression_ids, intersections, unions)]
        if any(column.numel() and (column.is_floating_point() or column.is_complex()) for column in columns):
            raise TypeError(f"ids and counts must be integers, not {[str(column.dtype) for column in columns]}")
        block = torch.stack([column.to(self.device, torch.int64) for column in columns], dim=1)  # (K, 3)
        wrong = block[(block[:, 1] < 0) | (block[:, 1] > block[:, 2])]
        if len(wrong):
            raise ValueError(f"0 <= intersection <= union fails at (id, intersection, union) = {wrong[0].tolist()}")
        self.rows.append(block)

    def compute(self) -> dict[str, float]:
        """The scores over all processes.

        Returns:
            METRIC_NAMES -> fraction of 1, as Python floats (a float32 tensor would drop digits).

        Raises:
            UserError: no expression was scored, or one was counted twice.
        """
        return self.protocol.scores((intersection, union) for _, intersection, union in _unique_rows(self.rows))

    def counts(self) -> list[tuple[int, int, int]]:
        """The (expression id, intersection, union) of every expression of all processes, sorted by id.

        In a distributed run every process must call it, as with `compute`.

        Raises:
            UserError: an expression was counted twice.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            rows = self.rows
        return _unique_rows(rows)


def _unique_rows(rows: list[Tensor] | Tensor) -> list[tuple[int, int, int]]:
    """The rows sorted by id; an id that occurs twice is an error, even with equal counts: it would weigh double."""
    table = sorted(map(tuple, dim_zero_cat(rows).tolist()))
    for (first, *_), (second, *_) in itertools.pairwise(table):
        if first == second:
            raise UserError(
                f"expression {first} was scored twice: each needs its own id, and a distributed sampler must not pad"
                " (share the expressions out unevenly instead)"
            )
    return table
