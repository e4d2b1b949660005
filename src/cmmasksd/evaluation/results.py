"""The result files of one scored split, and the text table over several.

    results.json        the scores (fractions of 1), the number of expressions, the protocol, and what was scored
    expressions.jsonl   one row per sentence with its pixel counts, from which every score can be computed again

oIoU and mIoU stand side by side everywhere. Writing checks that the scores follow from the rows, so that a file that
holds only one process's rows, or scores of another run, cannot come to be.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE
from cmmasksd.errors import UserError, shown
from cmmasksd.evaluation.protocols import METRIC_NAMES, ScoringProtocol
from cmmasksd.files import write_text

RESULTS_FILE = "results.json"
EXPRESSIONS_FILE = "expressions.jsonl"
_OWN_KEYS = ("split", *METRIC_NAMES, "expressions", "protocol")
_COUNTS = {"expressions": 10**9, "references": MAX_REFERENCES, "scene_size": MAX_SCENE_SIZE}
"""Whole numbers of a result file, and the largest that scoring writes."""
_MAX_BYTES = 1 << 28
"""A result file is not read any further: RefCOCO's largest split needs three megabytes."""


@dataclass(frozen=True, slots=True)
class ExpressionScore:
    """What one sentence scored.

    Attributes:
        ref_id: the reference.
        image_id: its image.
        sent_id: the expression; unique within the split.
        sentence: the text as the model was given it.
        intersection: pixels in both masks, at the original size.
        union: pixels in either mask.
        target: pixels of the object's own mask.
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


def write_results(
    out: Path,
    split: str,
    rows: Sequence[ExpressionScore],
    scores: Mapping[str, float],
    protocol: ScoringProtocol,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `results.json` and `expressions.jsonl` into a folder, each atomically and `results.json` last.

    Args:
        out: the folder; made if missing. One split per folder.
        split: "val", "testA", ...
        rows: every expression of the split, in any order; written sorted by reference and sentence.
        scores: METRIC_NAMES -> fraction of 1, as `ScoringProtocol.scores` gives them.
        protocol: the rules that gave the scores.
        extra: more JSON values for `results.json`, such as the data set, the model, the truncated expressions.

    Returns:
        The path of `results.json`.

    Raises:
        UserError: no rows.
        ValueError: the scores do not follow from the rows, a sentence occurs twice, or `extra` reuses a key.
    """
    extra = dict(extra or {})
    if taken := sorted(extra.keys() & set(_OWN_KEYS)):
        raise ValueError(f"extra may not set {taken}: these keys are the result file's own")
    if len({row.sent_id for row in rows}) != len(rows):
        raise ValueError("a sent_id occurs twice in the rows: every expression is scored once")
    expected = protocol.scores((row.intersection, row.union) for row in rows)
    if dict(scores) != expected or any(row.iou != protocol.iou(row.intersection, row.union) for row in rows):
        raise ValueError(f"the scores {dict(scores)} do not follow from the {len(rows)} rows, which give {expected}")

    rows = sorted(rows, key=lambda row: (row.ref_id, row.sent_id))
    results = {"split": split, **expected, "expressions": len(rows), "protocol": protocol.as_dict(), **extra}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / EXPRESSIONS_FILE, "".join(_line(row) for row in rows))
    write_text(out / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return out / RESULTS_FILE


def read_results(path: Path) -> dict[str, Any]:
    """Read a `results.json`, given the file or its folder.

    Raises:
        UserError: the file is missing, is not JSON, lacks a score, or holds a value that no scoring writes.
    """
    if path.is_dir():
        path = path / RESULTS_FILE
    results = _parse(_read(path), str(path))
    if missing := [key for key in _OWN_KEYS if key not in results]:
        raise UserError(f"{path} lacks {missing}: it was not written by `cmmasksd evaluate`; score the split again")
    for key, value in results.items():
        if key in METRIC_NAMES:
            sound = _is_share(value)
        elif key in ("split", "data"):
            sound = isinstance(value, str) and value.isprintable() and len(value) < 100
        elif key in ("model", "weights"):
            sound = isinstance(value, str)
        elif key in _COUNTS:
            sound = _is_int(value) and 0 < value <= _COUNTS[key]
        else:
            sound = key != "scene_seed" or _is_int(value)
        if not sound:
            raise UserError(f"{path}: {key} is {shown(value)}, which no scoring writes: score the split again")
    try:
        ScoringProtocol(**results["protocol"])
    except (TypeError, UserError) as error:  # TypeError: not a mapping, or a rule that we do not know
        reason = f": {error}" if isinstance(error, UserError) else ""
        raise UserError(
            f"{path} has the protocol {shown(results['protocol'])}, which is none of ours{reason}"
        ) from None
    return results


def read_expressions(path: Path) -> list[ExpressionScore]:
    """Read an `expressions.jsonl`, or one packed by gzip (`.jsonl.gz`), given the file or its folder.

    Raises:
        UserError: the file is missing, a line is not an expression's row, or an expression is there twice.
    """
    if path.is_dir():
        path = path / EXPRESSIONS_FILE
    rows: list[ExpressionScore] = []
    seen: set[int] = set()
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line:
            continue
        row = _parse(line, f"{path}, line {number},")
        row["iou"] = row.pop("IoU", None)
        if not _is_row(row):
            raise UserError(f"{path}, line {number}, is not an expression's row: score the split again")
        rows.append(ExpressionScore(**row))
        if rows[-1].sent_id in seen:
            raise UserError(f"{path}, line {number}, has sent_id {rows[-1].sent_id} again: score the split again")
        seen.add(rows[-1].sent_id)
    return rows


_ROW_KEYS = {field.name for field in fields(ExpressionScore)}


def _is_row(row: dict[str, Any]) -> bool:
    """Whether these are the fields of an ExpressionScore, of the right kinds."""
    return (
        row.keys() == _ROW_KEYS
        and all(_is_int(value) for key, value in row.items() if key not in ("sentence", "iou"))
        and isinstance(row["sentence"], str)
        and 0 <= row["intersection"] <= row["union"]
        and 0 <= row["target"] <= row["union"]
        and _is_share(row["iou"])
        and (not row["union"] or math.isclose(row["iou"], row["intersection"] / row["union"], abs_tol=1e-9))
    )


def _is_int(value: object) -> bool:
    """A whole number that numpy holds."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def format_table(results: Iterable[Mapping[str, Any]]) -> str:
    """A plain text table, one row per split, in percent with two decimals, oIoU and mIoU side by side.

    Args:
        results: as `read_results` gives them. Where they name their `data`, it stands before the split.

    Returns:
        The table, and below it the protocol of its rows, since scores of two protocols do not compare.
    """
    results = list(results)
    cells = [["split", *METRIC_NAMES, "expressions"]]
    cells += [[row_name(result), *percentages(result), str(result["expressions"])] for result in results]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(both))
        for both in (zip(row, widths, strict=True) for row in cells)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *protocol_lines(results)])


def row_name(result: Mapping[str, Any]) -> str:
    """What a table calls a result: its split, after its data set where that is a known name."""
    return f"{result['data']} {result['split']}" if isinstance(result.get("data"), str) else str(result["split"])


def percentages(result: Mapping[str, Any]) -> list[str]:
    """The scores in METRIC_NAMES' order, in percent with two decimals."""
    return [f"{100 * result[name]:.2f}" for name in METRIC_NAMES]


def protocol_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per protocol among the results; it names its rows where there is more than one."""
    rows_of: dict[str, list[str]] = {}
    for result in results:
        protocol = dict(result["protocol"])
        name = protocol.pop("name")
        line = f"protocol {name}: " + ", ".join(f"{key} {value}" for key, value in protocol.items())
        rows_of.setdefault(line, []).append(row_name(result))
    if len(rows_of) < 2:
        return list(rows_of)
    return [f"{line} ({', '.join(rows)})" for line, rows in rows_of.items()]


def _line(row: ExpressionScore) -> str:
    fields = asdict(row)
    fields["IoU"] = fields.pop("iou")
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def _read(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: `cmmasksd evaluate` writes it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): score the split again") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path} has more than {_MAX_BYTES >> 20} MB: it is not a result file of ours")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: score the split again") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{where} is not JSON ({error}): score the split again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a {type(value).__name__}, not an object: score the split again")
    return value
