"""The scores of one split, and the two files that hold them.

    results.json        the scores (fractions of 1), the number of expressions, the protocol, and what was scored
    expressions.jsonl   one row per sentence with its pixel counts, from which every score can be computed again

The scores are always computed from the rows, so the two files never disagree.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE
from cmmasksd.errors import UserError, shown
from cmmasksd.evaluation.protocols import METRIC_NAMES, ScoringProtocol
from cmmasksd.files import write_text

RESULTS_FILE = "results.json"
EXPRESSIONS_FILE = "expressions.jsonl"
MAX_BYTES = 1 << 28
"""Largest result file that is read: RefCOCO's largest split needs three megabytes."""
_SCORE_KEYS = ("split", *METRIC_NAMES, "expressions", "protocol")
_COUNTS = {"expressions": 10**9, "references": MAX_REFERENCES, "scene_size": MAX_SCENE_SIZE}
"""Whole numbers of a result file -> the largest that scoring writes."""


@dataclass(frozen=True, slots=True)
class ExpressionScore:
    """The score of one sentence.

    Attributes:
        ref_id: id of the reference.
        image_id: id of its image.
        sent_id: id of the expression, unique within the split.
        sentence: the text as the model was given it.
        intersection: pixels in both masks, at the original size.
        union: pixels in either mask.
        target: pixels of the true mask.
        iou: `protocol.iou(intersection, union)`, a fraction of 1; "IoU" in the file.
    """

    ref_id: int
    image_id: int
    sent_id: int
    sentence: str
    intersection: int
    union: int
    target: int
    iou: float

    def as_json(self) -> str:
        """The row as a line of `expressions.jsonl`."""
        values = asdict(self)
        values["IoU"] = values.pop("iou")
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ExpressionScore:
        """The row of a JSON object that `as_json` wrote.

        Raises:
            TypeError: a field is missing or unknown.
            ValueError: a value has another type or contradicts the others.
        """
        values = dict(values)
        values["iou"] = values.pop("IoU", None)
        row = cls(**values)
        counts = (row.ref_id, row.image_id, row.sent_id, row.intersection, row.union, row.target)
        if (
            not all(map(_is_int, counts))
            or not isinstance(row.sentence, str)
            or not 0 <= row.intersection <= row.union
            or not 0 <= row.target <= row.union
            or not _is_fraction(row.iou)
            or (row.union and not math.isclose(row.iou, row.intersection / row.union, abs_tol=1e-9))
        ):
            raise ValueError("the values are not those of an expression")
        return row


@dataclass(slots=True)
class SplitScores:
    """The scores of one split.

    Args:
        split: "val", "testA", …
        rows: every expression of the split, in any order.
        protocol: the rules of scoring.
        provenance: what was scored, as JSON values: data set, model, digest of its weights, truncated expressions.

    Attributes:
        scores: METRIC_NAMES -> fraction of 1, computed from the rows.

    Raises:
        UserError: there are no rows, or a sentence occurs twice.
    """

    split: str
    rows: Sequence[ExpressionScore]
    protocol: ScoringProtocol
    provenance: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = sorted(self.rows, key=lambda row: row.sent_id)
        for row, following in zip(self.rows, self.rows[1:], strict=False):
            if row.sent_id == following.sent_id:
                raise UserError(f"expression {row.sent_id} was scored twice: each needs an id of its own")
        self.scores = self.protocol.scores((row.intersection, row.union) for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            "split": self.split,
            **self.scores,
            "expressions": len(self.rows),
            "protocol": self.protocol.as_dict(),
            **self.provenance,
        }


def write_results(out: Path, result: SplitScores) -> Path:
    """Write `results.json` and `expressions.jsonl` into a folder, each at once and `results.json` last.

    Args:
        out: the folder; made if missing. One split per folder.
        result: the scores; rows are written sorted by reference and sentence.

    Returns:
        The path of `results.json`.

    Raises:
        ValueError: a row's IoU does not follow from its counts, or the provenance reuses a key of the scores.
    """
    if taken := sorted(result.provenance.keys() & set(_SCORE_KEYS)):
        raise ValueError(f"the provenance may not set {taken}: these keys hold the scores")
    for row in result.rows:
        if row.iou != result.protocol.iou(row.intersection, row.union):
            raise ValueError(f"the IoU of {row} does not follow from its counts")
    rows = sorted(result.rows, key=lambda row: (row.ref_id, row.sent_id))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / EXPRESSIONS_FILE, "".join(f"{row.as_json()}\n" for row in rows))
    write_text(out / RESULTS_FILE, json.dumps(result.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return out / RESULTS_FILE


def read_results(path: Path) -> dict[str, Any]:
    """Read a `results.json`, given the file or its folder.

    Raises:
        UserError: the file is missing, is not JSON, lacks a score, or holds a value that no scoring writes.
    """
    if path.is_dir():
        path = path / RESULTS_FILE
    results = _parse(_read(path), str(path))
    if missing := [key for key in _SCORE_KEYS if key not in results]:
        raise UserError(f"{path} lacks {missing}: it was not written by `cmmasksd evaluate`; score the split again")
    for key, value in results.items():
        if not _is_sound(key, value):
            raise UserError(f"{path}: {key} is {shown(value)}, which no scoring writes: score the split again")
    try:
        ScoringProtocol(**results["protocol"])
    except (TypeError, UserError) as error:  # TypeError: not a mapping, or an unknown rule
        reason = f": {error}" if isinstance(error, UserError) else ""
        raise UserError(f"{path} has an unknown protocol, {shown(results['protocol'])}{reason}") from None
    return results


def _is_sound(key: str, value: object) -> bool:
    """Whether scoring writes such a value under a key; unknown keys may hold anything."""
    if key in METRIC_NAMES:
        return _is_fraction(value)
    if key in ("split", "data"):
        return isinstance(value, str) and value.isprintable() and len(value) < 100
    if key in ("model", "weights"):
        return isinstance(value, str)
    if key in _COUNTS:
        return _is_int(value) and 0 < value <= _COUNTS[key]
    return key != "scene_seed" or _is_int(value)


def read_expressions(path: Path) -> list[ExpressionScore]:
    """Read an `expressions.jsonl`, or one packed by gzip (`.jsonl.gz`), given the file or its folder.

    Raises:
        UserError: the file is missing, a line is not an expression's row, or an expression occurs twice.
    """
    if path.is_dir():
        path = path / EXPRESSIONS_FILE
    rows: dict[int, ExpressionScore] = {}
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line:
            continue
        values = _parse(line, f"{path}, line {number},")
        try:
            row = ExpressionScore.from_json(values)
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {number}, is not an expression's row: score the split again") from None
        if row.sent_id in rows:
            raise UserError(f"{path}, line {number}, repeats sent_id {row.sent_id}: score the split again")
        rows[row.sent_id] = row
    return list(rows.values())


def _is_int(value: object) -> TypeGuard[int]:
    """A whole number that numpy holds."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _read(path: Path) -> str:
    """The text of a result file, at most MAX_BYTES."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: `cmmasksd evaluate` writes it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): score the split again") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES >> 20} MB: it is not a result file of cmmasksd")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: score the split again") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text; `where` names the text in errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{where} is not JSON ({error}): score the split again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a {type(value).__name__}, not an object: score the split again")
    return value
