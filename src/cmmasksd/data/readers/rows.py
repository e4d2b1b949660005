"""The rows of a manifest: one object each, read from JSONL or CSV and checked. Their keys: see `manifest`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmmasksd.data.samples import require_expression
from cmmasksd.errors import UserError, shown
from cmmasksd.files import safe_path

SPLITS = ("train", "val", "test")
ALL = "all"
"""The split that holds every row."""
SUFFIXES = (".jsonl", ".csv")
"""Of manifests."""

_MASKS = ("mask", "polygon", "rle")
_KEYS = ("image", "expressions", "text", *_MASKS, "split", "id")


@dataclass(frozen=True, slots=True)
class Shapes:
    """labelme's shapes of one object, and the (height, width) of the picture they were drawn on, where it is said."""

    shapes: list[dict[str, Any]]
    size: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a manifest.

    Attributes:
        where: file and line, for messages.
        image: path of the picture; that it exists is not checked yet.
        expressions: at least one, none empty.
        mask: path of a PNG, a COCO segmentation, labelme shapes, or None where the row has no mask.
        split: as the row or its file names it.
        id: as the row gives it.
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
        masks: every row needs one; otherwise they are not read.

    Raises:
        UserError: naming file and line of the first mistake.
    """
    if not file.is_file():
        raise UserError(f"manifest {file} does not exist: check the path")
    read = {".jsonl": _jsonl, ".csv": _csv}.get(file.suffix.lower())
    if read is None:
        raise UserError(f"{file} is no manifest: give a .jsonl or .csv file (or a folder of labelme files)")
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
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}): write one object {{...}} per line") from None
            if not isinstance(record, dict):
                raise UserError(f"{where} holds {shown(record)}: write one object {{...}} per line")
            yield where, record


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        lines.seek(0)
        reader = csv.reader(lines, delimiter=max(",;\t", key=first.count), strict=True)
        header: list[str] = []
        try:
            for cells in reader:
                where = f"{file}, line {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if not header:
                    header = [cell.strip() for cell in cells]
                    if len(set(header)) != len(header):
                        raise UserError(f"{where} names a column twice: {shown(header)}")
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{where} has {len(cells)} cells and the header {len(header)}: put cells that hold the "
                        "separator into quotes"
                    )
                record: dict[str, Any] = {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}
                if unknown := [key for key in header if key not in _KEYS]:
                    raise _unknown(where, unknown[0])
                if "expressions" in record:
                    record["expressions"] = record["expressions"].split("|")
                for key in ("polygon", "rle"):
                    if key in record:
                        try:
                            record[key] = json.loads(record[key])
                        except (ValueError, RecursionError) as error:
                            raise UserError(f"{where}: {key} is not JSON ({error})") from None
                yield where, record
        except csv.Error as error:
            raise UserError(
                f"{file}, line {reader.line_num} is not CSV ({error}): close its quotes, or write long values as .jsonl"
            ) from None


def _row(record: dict[str, Any], where: str, file: Path, masks: bool) -> Row:
    for key in record:
        if key not in _KEYS:
            raise _unknown(where, key)
    record = {key: value for key, value in record.items() if value is not None}
    if "image" not in record:
        raise UserError(f"{where} has no image: give the picture's path, relative to {file.parent}")
    if ("text" in record) == ("expressions" in record):
        raise UserError(f"{where}: give its sentences as 'expressions' (or one as 'text'), not none and not both")
    texts = record["text"] if "text" in record else record["expressions"]
    given = [key for key in _MASKS if key in record]
    if masks and len(given) != 1:
        raise UserError(f"{where} has {' and '.join(given) or 'no mask'}: give one of {', '.join(_MASKS)}")
    mask = None
    if masks:
        mask = record[given[0]]
        if given[0] == "mask":
            mask = safe_path(file.parent, mask, f"{where}: mask")
        elif not isinstance(mask, list if given[0] == "polygon" else dict):
            form = "[[x0, y0, x1, y1, ...], ...]" if given[0] == "polygon" else '{"size": ..., "counts": ...}'
            raise UserError(f"{where}: {given[0]} is {shown(mask)}: expected {form}")
    split = record.get("split", file.stem if file.stem in SPLITS else None)
    if split is not None and split not in SPLITS:
        raise UserError(f"{where} has the split {shown(split)}: choose one of {', '.join(SPLITS)}")
    name = record.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise UserError(f"{where} has the id {shown(name)}: give a whole number or text")
    return Row(
        where,
        safe_path(file.parent, record["image"], f"{where}: image"),
        sentences(texts, where),
        mask,
        split,
        None if name is None else str(name),
    )


def sentences(given: object, where: str) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the sentences are {shown(given)}: expected a list of texts, or one text")
    for text in texts:
        require_expression(text, f"{where}: a sentence")
    return tuple(" ".join(text.split()) for text in texts)


def _unknown(where: str, key: object) -> UserError:
    return UserError(f"{where} has the unknown key {shown(key)}: expected some of {', '.join(_KEYS)}")
