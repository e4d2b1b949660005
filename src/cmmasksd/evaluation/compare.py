"""Is B better than A? Two models scored on the same sentences, compared sentence by sentence.

The difference of two scores means little without an interval, and the sentences of one image share its difficulty. So
the bootstrap (Efron 1979) is paired, both models on the same resampled sentences, and by default it draws whole images:
drawing single sentences as if they were independent gives intervals that are too narrow.

Slices say where a difference comes from: sentences with location words, with relations, short and long ones, small and
large objects; of generated scenes also sentences that name a colour-shape pair never trained on. They are read from the
rows alone, so any two `expressions.jsonl` of one split compare, ours or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cmmasksd.data.scenes import names_held_out
from cmmasksd.errors import UserError, shown
from cmmasksd.evaluation.protocols import METRIC_NAMES, PRECISION_TENTHS, ScoringProtocol
from cmmasksd.evaluation.results import ExpressionScore

LEVEL = 0.95
"""Of the intervals."""
FEWEST = 20
"""Sentences that a slice needs to be shown: below that its interval says nothing."""

_LOCATION = re.compile(
    r"\b(left|right|top|bottom|middle|center|centre|upper|lower|side|corner|leftmost|rightmost|topmost|lowest|"
    r"bottommost|first|second|third|1st|2nd|3rd|far|front|back|closest|lft|rt)\b"
)
_RELATION = re.compile(
    r"\b(above|below|behind|in front of|next to|beside|between|under|near|(left|right) of|on top of|closest to)\b"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of A and B on the same expressions, and the interval of their difference.

    Attributes:
        slice: which expressions; "all" or the name of a slice.
        expressions: how many.
        metric: one of METRIC_NAMES.
        a, b: the scores, fractions of 1.
        low, high: the bounds of the LEVEL interval of b - a, fractions of 1.
    """

    slice: str
    expressions: int
    metric: str
    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def slices_of(rows: Sequence[ExpressionScore]) -> dict[str, np.ndarray]:
    """Slice -> (K,) bool, which rows belong to it. Object sizes are thirds of the split, by the pixels of the truth."""
    texts = [row.sentence.lower() for row in rows]
    words = np.array([len(text.split()) for text in texts])
    slices = {"all": np.ones(len(rows), bool)}
    relation = np.array([bool(_RELATION.search(text)) for text in texts])
    location = np.array([bool(_LOCATION.search(text)) for text in texts]) & ~relation
    slices |= {"relation": relation, "location word": location, "neither": ~relation & ~location}
    slices |= {"1-2 words": words <= 2, "3-5 words": (words >= 3) & (words <= 5), "6 words or more": words >= 6}
    slices["unseen pair"] = np.array([names_held_out(text) for text in texts])  # of generated scenes
    sizes = np.array([row.target for row in rows])
    small, large = np.quantile(sizes, [1 / 3, 2 / 3])
    slices |= {
        "small objects": sizes <= small,
        "medium objects": (sizes > small) & (sizes <= large),
        "large objects": sizes > large,
    }
    return slices


def compare(
    a: Sequence[ExpressionScore],
    b: Sequence[ExpressionScore],
    protocol: ScoringProtocol,
    *,
    metrics: Sequence[str] = METRIC_NAMES[:3],
    resamples: int = 10_000,
    unit: Literal["image", "expression"] = "image",
    seed: int = 0,
    slices: Callable[[Sequence[ExpressionScore]], Mapping[str, np.ndarray]] = slices_of,
) -> list[Comparison]:
    """Compare two models on one split.

    Args:
        a, b: rows of the same expressions, in any order.
        protocol: the rules that both were scored by.
        metrics: of METRIC_NAMES.
        resamples: of the bootstrap.
        unit: what is drawn: whole images with their sentences, or single sentences.
        seed: of the draws.
        slices: rows of A -> slice -> (K,) bool.

    Returns:
        One comparison per slice (of at least FEWEST expressions, or all) and metric.

    Raises:
        UserError: the two are not of the same expressions, or there are none.
    """
    a, b = _paired(a, b)
    images = np.array([row.image_id if unit == "image" else row.sent_id for row in a])
    draw = np.random.default_rng(seed)
    counted = [_columns(rows, protocol) for rows in (a, b)]
    found = []
    for name, chosen in slices(a).items():
        count = int(chosen.sum())
        if count < FEWEST and name != "all":
            continue
        _, owner = np.unique(images[chosen], return_inverse=True)
        sums = [_sums(columns[chosen], owner) for columns in counted]
        whole = [_scores(part.sum(0, keepdims=True), protocol) for part in sums]
        differences = {metric: [] for metric in metrics}
        units = len(sums[0])
        for at in range(0, resamples, 250):
            times = _draws(draw, min(250, resamples - at), units)
            drawn = [_scores(times @ part, protocol) for part in sums]
            for metric in metrics:
                differences[metric].append(drawn[1][metric] - drawn[0][metric])
        for metric in metrics:
            low, high = np.quantile(np.concatenate(differences[metric]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            score_a, score_b = (float(scored[metric][0]) for scored in whole)
            found.append(Comparison(name, count, metric, score_a, score_b, float(low), float(high)))
    return found


def _paired(
    a: Sequence[ExpressionScore], b: Sequence[ExpressionScore]
) -> tuple[list[ExpressionScore], list[ExpressionScore]]:
    """Both in the order of sent_id; the same expressions of the same objects, or an error that says what differs."""
    a, b = (sorted(rows, key=lambda row: row.sent_id) for rows in (a, b))
    if not a or not b:
        raise UserError("there is nothing to compare: a file holds no expression")
    if other := {row.sent_id for row in a} ^ {row.sent_id for row in b}:
        raise UserError(
            f"the two files are not of the same expressions: {len(other)} are in one only, such as sent_id"
            f" {min(other)}; score both models on the same split"
        )
    for one, same in zip(a, b, strict=True):
        if (one.sentence, one.image_id, one.target) != (same.sentence, same.image_id, same.target):
            raise UserError(
                f"expression {one.sent_id} differs between the two files ({shown(one.sentence)} of {one.target}"
                f" pixels, {shown(same.sentence)} of {same.target}): score both models on the same data"
            )
    return a, b


def _columns(rows: Sequence[ExpressionScore], protocol: ScoringProtocol) -> np.ndarray:
    """(K, 4 + X) float64: of each expression 1, intersection, union, IoU, and whether it reaches each X of P@X. Every
    score is a function of the sums of these."""
    columns = [
        [1, row.intersection, row.union, row.iou]
        + [protocol.reaches(row.intersection, row.union, tenths) for tenths in PRECISION_TENTHS]
        for row in rows
    ]
    return np.array(columns, float)


def _sums(columns: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(units, 4 + X): the sums of `_columns` over each resampled unit."""
    sums = np.zeros((int(owner.max()) + 1, columns.shape[1]))
    np.add.at(sums, owner, columns)
    return sums


def _scores(sums: np.ndarray, protocol: ScoringProtocol) -> dict[str, np.ndarray]:
    """METRIC_NAMES -> (R,) from R rows of sums."""
    count, intersection, union, iou, *reached = sums.T
    empty = np.full(len(sums), protocol.empty_iou)
    overall = np.divide(intersection, union, out=empty, where=union > 0)
    return dict(zip(METRIC_NAMES, [overall, iou / count, *(hits / count for hits in reached)], strict=True))


def _draws(draw: np.random.Generator, resamples: int, units: int) -> np.ndarray:
    """(resamples, units) float64: how often each unit is drawn; each row sums to `units`."""
    drawn = draw.integers(units, size=(resamples, units)) + units * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * units).reshape(resamples, units).astype(float)


def format_comparison(comparisons: Sequence[Comparison], names: tuple[str, str] = ("A", "B")) -> str:
    """A plain text table: percent, the difference in points, its interval, and a star where that leaves out 0."""
    cells = [["slice", "expressions", "metric", *names, f"{names[1]} - {names[0]}", f"{LEVEL:.0%} interval", ""]]
    for one in comparisons:
        scores = [f"{100 * one.a:.2f}", f"{100 * one.b:.2f}", f"{100 * one.difference:+.2f}"]
        interval = f"[{100 * one.low:+.2f}, {100 * one.high:+.2f}]"
        cells.append([one.slice, str(one.expressions), one.metric, *scores, interval, "*" if one.clear else ""])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, 2, 7) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)
