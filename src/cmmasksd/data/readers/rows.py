"""Rows of a JSONL or CSV manifest, one object each, checked. `manifest` describes their keys."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmmasksd.data.readers.fields import parse_json
from cmmasksd.data.samples import require_expression
from cmmasksd.errors import UserError, shown
from cmmasksd.files import safe_path

SPLITS = ("train", "val", "test")
ALL = "all"
"""The split of all rows."""
SUFFIXES = (".jsonl", ".csv")
"""File suffixes of manifests."""
OWN_DATA = ".jsonl or .csv file, COCO, CVAT or Label Studio file with sentences, or folder of labelme files"
"""What `manifest` reads, for messages."""

_MASKS = ("mask", "polygon", "rle")
_KEYS = ("image", "expressions", "text", *_MASKS, "split", "id")


@dataclass(frozen=True, slots=True)
class Shapes:
    """labelme's shapes of one object, and the (height, width) that labelme states of their image, or None."""

    shapes: list[dict[str, Any]]
    size: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a manifest.

    Attributes:
        where: file and line, for messages.
        image: path of the image, which may not exist.
        expressions: at least one, none blank.
        mask: path of a PNG, a COCO segmentation, labelme shapes, or None where the row has no mask.
        split: train, val or test, if the row or its file names it.
        id: the row's id, if it has one.
    """

    where: str
    image: Path
    expressions: tuple[str, ...]
    mask: Path | list[Any] | dict[str, Any] | Shapes | None = None
    split: str | None = None
    id: str | None = None


def read_rows(file: Path, *, masks: bool = False) -> list[Row]:
    """Read a manifest.

    Args:
        file: a .jsonl or .csv file.
        masks: whether every row must have a mask; otherwise masks are ignored.

    Raises:
        UserError: something is wrong; it names file and line.
    """
    if not file.is_file():
        raise UserError(f"manifest {file} does not exist: check the path")
    read = {".jsonl": _jsonl, ".csv": _csv}.get(file.suffix.lower())
    if read is None:
        raise UserError(f"{file} is not a manifest: give a {OWN_DATA}")
    try:
        return [_row(record, where, file, masks) for where, record in read(file)]
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with this encoding") from None


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            record = parse_json(line, where, "write one object {...} per line")
            if not isinstance(record, dict):
                raise UserError(f"{where} holds {shown(record)}: write one object {{...}} per line")
            yield where, record


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        lines.seek(0)
        reader = csv.reader(lines, delimiter=max(",;\t", key=first.count), strict=True)
        rows = (cells for cells in reader if any(cell.strip() for cell in cells))
        try:
            header = [cell.strip() for cell in next(rows, [])]
            if len(set(header)) != len(header):
                raise UserError(f"{file}, line {reader.line_num} names a column twice: {shown(header)}")
            _check_keys(header, f"{file}, line {reader.line_num}")
            for cells in rows:
                where = f"{file}, line {reader.line_num}"
                if len(cells) != len(header):
                    raise UserError(
                        f"{where} has {len(cells)} cells and the header {len(header)}: put cells that hold the "
                        "separator into quotes"
                    )
                record: dict[str, Any] = {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}
                if "expressions" in record:
                    record["expressions"] = record["expressions"].split("|")
                for key in ("polygon", "rle"):
                    if key in record:
                        record[key] = parse_json(record[key], f"{where}: {key}", "write it as in a .jsonl file")
                yield where, record
        except csv.Error as error:
            raise UserError(
                f"{file}, line {reader.line_num} is not CSV ({error}): close its quotes, or write long values as .jsonl"
            ) from None


def _row(record: dict[str, Any], where: str, file: Path, masks: bool) -> Row:
    _check_keys(record, where)
    record = {key: value for key, value in record.items() if value is not None}
    if "image" not in record:
        raise UserError(f"{where} has no image: give the image's path, relative to {file.parent}")
    if ("text" in record) == ("expressions" in record):
        raise UserError(f"{where}: give its sentences as either 'expressions' or (only one) 'text'")
    split = record.get("split", file.stem if file.stem in SPLITS else None)
    if split is not None and split not in SPLITS:
        raise UserError(f"{where} has the split {shown(split)}: choose one of {', '.join(SPLITS)}")
    row_id = record.get("id")
    if row_id is not None and (isinstance(row_id, bool) or not isinstance(row_id, int | str)):
        raise UserError(f"{where} has the id {shown(row_id)}: give a whole number or text")
    return Row(
        where,
        safe_path(file.parent, record["image"], f"{where}: image"),
        read_expressions(record.get("text", record.get("expressions")), where),
        _mask(record, where, file) if masks else None,
        split,
        None if row_id is None else str(row_id),
    )


def _mask(record: dict[str, Any], where: str, file: Path) -> Path | list[Any] | dict[str, Any]:
    given = [key for key in _MASKS if key in record]
    if len(given) != 1:
        raise UserError(f"{where} has {' and '.join(given) or 'no mask'}: give one of {', '.join(_MASKS)}")
    mask = record[given[0]]
    if given[0] == "mask":
        return safe_path(file.parent, mask, f"{where}: mask")
    if not isinstance(mask, list if given[0] == "polygon" else dict):
        form = "[[x0, y0, x1, y1, ...], ...]" if given[0] == "polygon" else '{"size": ..., "counts": ...}'
        raise UserError(f"{where}: {given[0]} is {shown(mask)}: expected {form}")
    return mask


def read_expressions(value: object, where: str) -> tuple[str, ...]:
    """The sentences in a list of texts or one text, with white space evened out."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the sentences are {shown(value)}: expected a list of texts, or one text")
    for text in texts:
        require_expression(text, f"{where}: a sentence")
    return tuple(" ".join(text.split()) for text in texts)


def _check_keys(keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key not in _KEYS:
            raise UserError(f"{where} has the unknown key {shown(key)}: expected some of {', '.join(_KEYS)}")
