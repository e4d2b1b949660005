"""Two models scored on the same sentences: differences of their scores, with bootstrap intervals.

The bootstrap (Efron 1979) is paired: both models are scored on the same resampled sentences. By default it draws whole
images, because the sentences of one image share its difficulty; drawing single sentences as if they were independent
gives intervals that are too narrow.

Slices show where a difference comes from: sentences with location words or relations, short and long sentences, small
and large objects; for generated scenes also sentences that name a colour-shape pair never trained on. They follow from
the rows alone, so any two `expressions.jsonl` of one split can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cmmasksd.data.scenes import names_held_out
from cmmasksd.errors import UserError, shown
from cmmasksd.evaluation.protocols import METRIC_NAMES, ORIGINAL, PRECISION_TENTHS, ScoringProtocol
from cmmasksd.evaluation.results import RESULTS_FILE, ExpressionScore, read_expressions, read_results
from cmmasksd.evaluation.tables import align
from cmmasksd.files import write_text

LEVEL = 0.95
"""Confidence level of the intervals."""
FEWEST = 20
"""Minimum number of sentences in a slice: with fewer, its interval is meaningless."""
RESAMPLES_AT_ONCE = 250
"""Number of bootstrap resamples that are computed together; bounds the memory."""

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
        slice: name of the slice; "all" for all expressions.
        expressions: number of expressions in it.
        metric: one of METRIC_NAMES.
        a, b: the scores, fractions of 1.
        low, high: bounds of the LEVEL interval of b - a, fractions of 1.
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
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def slices_of(rows: Sequence[ExpressionScore]) -> dict[str, np.ndarray]:
    """Slice -> (K,) bool, the rows that belong to it. Object sizes are thirds of the split, by pixels of the truth."""
    sentences = [row.sentence.lower() for row in rows]
    words = np.array([len(sentence.split()) for sentence in sentences])
    slices = {"all": np.ones(len(rows), bool)}
    relation = np.array([bool(_RELATION.search(sentence)) for sentence in sentences])
    location = np.array([bool(_LOCATION.search(sentence)) for sentence in sentences]) & ~relation
    slices |= {"relation": relation, "location word": location, "neither": ~relation & ~location}
    slices |= {"1-2 words": words <= 2, "3-5 words": (words >= 3) & (words <= 5), "6 words or more": words >= 6}
    slices["unseen pair"] = np.array([names_held_out(sentence) for sentence in sentences])  # generated scenes only
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
        metrics: metrics to compare, a subset of METRIC_NAMES.
        resamples: number of bootstrap resamples.
        unit: what the bootstrap draws: whole images with all their sentences, or single sentences.
        seed: seed of the draws.
        slices: rows of A -> slice -> (K,) bool.

    Returns:
        One comparison per metric and slice; slices of fewer than FEWEST expressions are left out, except "all".

    Raises:
        UserError: `a` and `b` hold different expressions, or none.
    """
    a, b = _paired(a, b)
    units = np.array([row.image_id if unit == "image" else row.sent_id for row in a])
    columns = _columns(a, protocol), _columns(b, protocol)
    draw = np.random.default_rng(seed)
    comparisons = []
    for name, members in slices(a).items():
        count = int(members.sum())
        if count < FEWEST and name != "all":
            continue
        _, owner = np.unique(units[members], return_inverse=True)
        scores_a, scores_b = (
            protocol.scores((rows[index].intersection, rows[index].union) for index in np.flatnonzero(members))
            for rows in (a, b)
        )
        sums_a, sums_b = (_sums(table[members], owner) for table in columns)
        intervals = _intervals(sums_a, sums_b, protocol, metrics, resamples, draw)
        for metric, (low, high) in intervals.items():
            comparisons.append(Comparison(name, count, metric, scores_a[metric], scores_b[metric], low, high))
    return comparisons


def _intervals(
    sums_a: np.ndarray,
    sums_b: np.ndarray,
    protocol: ScoringProtocol,
    metrics: Sequence[str],
    resamples: int,
    draw: np.random.Generator,
) -> dict[str, tuple[float, float]]:
    """Metric -> bounds of the LEVEL interval of B - A, from the sums of each unit (see `_sums`)."""
    differences: dict[str, list[np.ndarray]] = {metric: [] for metric in metrics}
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        times = _draws(draw, min(RESAMPLES_AT_ONCE, resamples - start), len(sums_a))
        drawn_a, drawn_b = (_scores(times @ sums, protocol) for sums in (sums_a, sums_b))
        for metric in metrics:
            differences[metric].append(drawn_b[metric] - drawn_a[metric])
    bounds = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    quantiles = {metric: np.quantile(np.concatenate(parts), bounds) for metric, parts in differences.items()}
    return {metric: (float(low), float(high)) for metric, (low, high) in quantiles.items()}


def compare_results(
    a: str | Path,
    b: str | Path,
    *,
    metrics: Sequence[str] = METRIC_NAMES[:3],
    resamples: int = 10_000,
    unit: Literal["image", "expression"] = "image",
    seed: int = 0,
) -> list[Comparison]:
    """Compare two scored models by their files.

    Args:
        a, b: `expressions.jsonl` of each, or its folder. The protocol is that of the `results.json` beside it, or
            ORIGINAL where there is none.
        metrics, resamples, unit, seed: see `compare`.

    Raises:
        UserError: a file is not as scoring writes it, the protocols differ, or the expressions differ.
    """
    a, b = Path(a), Path(b)
    protocol = _protocol(a)
    if _protocol(b) != protocol:
        raise UserError(f"{a} and {b} were scored by different protocols: score both by the same")
    rows_a, rows_b = read_expressions(a), read_expressions(b)
    return compare(rows_a, rows_b, protocol, metrics=metrics, resamples=resamples, unit=unit, seed=seed)


def _protocol(path: Path) -> ScoringProtocol:
    """The protocol of a file of rows, or of its folder."""
    results = (path if path.is_dir() else path.parent) / RESULTS_FILE
    return ScoringProtocol(**read_results(results)["protocol"]) if results.is_file() else ORIGINAL


def _paired(
    a: Sequence[ExpressionScore], b: Sequence[ExpressionScore]
) -> tuple[list[ExpressionScore], list[ExpressionScore]]:
    """Both in the order of sent_id, after a check that they hold the same expressions of the same objects."""
    a, b = (sorted(rows, key=lambda row: row.sent_id) for rows in (a, b))
    if not a or not b:
        raise UserError("a file holds no expression, so nothing can be compared: score the split again")
    if unpaired := {row.sent_id for row in a} ^ {row.sent_id for row in b}:
        raise UserError(
            f"the two files must hold the same expressions, but {len(unpaired)} are only in one, such as sent_id"
            f" {min(unpaired)}: score both models on the same split"
        )
    for row_a, row_b in zip(a, b, strict=True):
        if (row_a.sentence, row_a.image_id, row_a.target) != (row_b.sentence, row_b.image_id, row_b.target):
            raise UserError(
                f"expression {row_a.sent_id} differs between the two files ({shown(row_a.sentence)}, {row_a.target}"
                f" pixels; {shown(row_b.sentence)}, {row_b.target} pixels): score both models on the same data"
            )
    return a, b


def _columns(rows: Sequence[ExpressionScore], protocol: ScoringProtocol) -> np.ndarray:
    """(K, 4 + X) float64: for each expression 1, intersection, union, IoU, and whether it reaches each X of P@X.

    Every score is a function of the sums of these.
    """
    columns = [
        [1, row.intersection, row.union, row.iou]
        + [protocol.reaches(row.intersection, row.union, tenths) for tenths in PRECISION_TENTHS]
        for row in rows
    ]
    return np.array(columns, float)


def _sums(columns: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(units, 4 + X): the sums of `_columns` over the expressions of each unit."""
    sums = np.zeros((int(owner.max()) + 1, columns.shape[1]))
    np.add.at(sums, owner, columns)
    return sums


def _scores(sums: np.ndarray, protocol: ScoringProtocol) -> dict[str, np.ndarray]:
    """METRIC_NAMES -> (R,): the scores of R resamples, as `ScoringProtocol.scores` computes them, from their sums."""
    count, intersection, union, iou, *reached = sums.T
    empty = np.full(len(sums), protocol.empty_iou)
    overall = np.divide(intersection, union, out=empty, where=union > 0)
    return dict(zip(METRIC_NAMES, [overall, iou / count, *(hits / count for hits in reached)], strict=True))


def _draws(draw: np.random.Generator, resamples: int, units: int) -> np.ndarray:
    """(resamples, units) float64: how often each unit is drawn; each row sums to `units`."""
    drawn = draw.integers(units, size=(resamples, units)) + units * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * units).reshape(resamples, units).astype(float)


def format_comparison(comparisons: Sequence[Comparison], names: tuple[str, str] = ("A", "B")) -> str:
    """A plain text table: percent, the difference in points, its interval, and a star where that excludes 0."""
    cells = [["slice", "expressions", "metric", *names, f"{names[1]} - {names[0]}", f"{LEVEL:.0%} interval", ""]]
    for row in comparisons:
        scores = [f"{100 * row.a:.2f}", f"{100 * row.b:.2f}", f"{100 * row.difference:+.2f}"]
        interval = f"[{100 * row.low:+.2f}, {100 * row.high:+.2f}]"
        cells.append([row.slice, str(row.expressions), row.metric, *scores, interval, "*" if row.clear else ""])
    return "\n".join(align(cells, left={0, 2, 7}))


def write_comparison(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write comparisons as JSON: a list of objects with the fields of Comparison and their difference."""
    rows = [asdict(row) | {"difference": row.difference} for row in comparisons]
    write_text(path, json.dumps(rows, indent=2) + "\n")
