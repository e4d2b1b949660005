"""Scores as text: plain tables and their lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cmmasksd.evaluation.protocols import METRIC_NAMES


def format_table(results: Iterable[Mapping[str, Any]]) -> str:
    """A plain text table, one row per split, in percent with two decimals.

    Args:
        results: as `read_results` gives them.

    Returns:
        The table, and below it the protocol of its rows, since scores of two protocols cannot be compared.
    """
    results = list(results)
    header = ["split", *METRIC_NAMES, "expressions"]
    rows = [[row_name(result), *percentages(result), str(result["expressions"])] for result in results]
    head, *body = align([header, *rows], left={0})
    rule = "  ".join("-" * max(len(row[column]) for row in [header, *rows]) for column in range(len(header)))
    return "\n".join([head, rule, *body, *protocol_lines(results)])


def align(cells: Sequence[Sequence[str]], left: Iterable[int]) -> list[str]:
    """Rows of cells as lines with aligned columns.

    Args:
        cells: rows of equal length.
        left: indices of the left-aligned columns; the others are right-aligned.
    """
    left = set(left)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def row_name(result: Mapping[str, Any]) -> str:
    """Name of a result in a table: its data set, where known, and its split."""
    return f"{result['data']} {result['split']}" if isinstance(result.get("data"), str) else str(result["split"])


def percentages(result: Mapping[str, Any]) -> list[str]:
    """The scores in METRIC_NAMES' order, in percent with two decimals."""
    return [f"{100 * result[name]:.2f}" for name in METRIC_NAMES]


def protocol_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per protocol of the results, with the names of its rows where there are several protocols."""
    rows: dict[str, list[str]] = {}
    for result in results:
        protocol = dict(result["protocol"])
        name = protocol.pop("name")
        line = f"protocol {name}: " + ", ".join(f"{key} {value}" for key, value in protocol.items())
        rows.setdefault(line, []).append(row_name(result))
    if len(rows) < 2:
        return list(rows)
    return [f"{line} ({', '.join(names)})" for line, names in rows.items()]
