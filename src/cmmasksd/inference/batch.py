"""Many images at once, as `cmmasksd predict` does it: where images and sentences come from, and how outputs are named.

The loop itself is in `cli.py`.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cmmasksd.data.images import read_bytes
from cmmasksd.data.manifest import SUFFIXES, read_rows
from cmmasksd.errors import UserError
from cmmasksd.inference.visualize import PALETTE

if TYPE_CHECKING:
    from cmmasksd.inference.predictor import Segmentation

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What is taken for an image in a folder."""


@dataclass(frozen=True, slots=True)
class Source:
    """An image file (or its bytes) and what to look for in it.

    Attributes:
        name: as messages and results call it.
        image: its path, or its content.
        texts: at least one sentence.
        id: of the manifest's row, where it has one.
    """

    name: str
    image: Path | bytes
    texts: tuple[str, ...]
    id: str | None = None


def find_sources(where: Path, texts: Sequence[str]) -> list[Source]:
    """What `--image` means: an image file, a folder of images (sorted by name), a manifest with its own sentences, or
    "-": an image on standard input.

    Raises:
        UserError: there is no image, or no sentence, or sentences from two sides.
    """
    if where.suffix.lower() in SUFFIXES:
        if texts:
            raise UserError(f"{where} has a sentence in every row: leave out --text and --texts")
        rows = read_rows(where)
        if not rows:
            raise UserError(f"{where} has no row: give it at least one image with a sentence")
        return [Source(str(row.image), row.image, row.expressions, row.id) for row in rows]
    if not texts:
        raise UserError("no sentence given: say what to look for with --text, or --texts FILE with one per line")
    if str(where) == "-":
        return [Source("-", read_bytes(sys.stdin.buffer), tuple(texts))]
    files = [where]
    if where.is_dir():
        files = sorted(file for file in where.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{where} holds no image ({', '.join(IMAGE_SUFFIXES)}): check the path")
    return [Source(str(file), file, tuple(texts)) for file in files]


class FileNames:
    """Names for output files that any system takes and of which none comes twice, on systems that ignore case too."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}

    def stem(self, source: Source, frame: int | None) -> str:
        """The start of the names of one image's files."""
        file = source.image if isinstance(source.image, Path) else Path("stdin")
        plain = unicodedata.normalize("NFC", file.stem if frame is None else f"{file.stem}_f{frame:04}")
        plain = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', "-", plain)
        plain = plain.encode()[:120].decode(errors="ignore")  # a name may have 255 bytes in all
        stem, nth = plain, self._last.get(plain, 1)
        while stem.casefold() in self._taken:
            nth += 1
            stem = f"{plain}_{nth}"
        self._taken.add(stem.casefold())
        self._last[plain] = nth
        return stem


def slug(text: str) -> str:
    """A sentence as a part of a file name, without "_"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "sentence"


def json_row(source: Source, frame: int | None, found: Segmentation) -> dict[str, Any]:
    """What one sentence found, ready for JSON: image (and id, frame), text, score, area, box, size, rle."""
    row: dict[str, Any] = {"image": source.name}
    if source.id is not None:
        row["id"] = source.id
    if frame is not None:
        row["frame"] = frame
    return row | {
        "text": found.text,
        "score": round(found.score, 6),
        "area": found.area,
        "box": found.box,
        "size": list(found.mask.shape),
        "rle": found.rle,
    }


def save_pictures(one: Segmentation, nth: int, stem: str, folder: Path | None) -> str:
    """Write mask and overlay of an image's nth sentence into a folder (None: nowhere; "-": only the mask, to stdout).

    Returns:
        The names of the files, as the end of a line about them.
    """
    if folder is None:
        return ""
    mask = Image.fromarray(one.mask.astype(np.uint8) * 255)
    if str(folder) == "-":
        content = io.BytesIO()
        mask.save(content, "PNG")
        sys.stdout.buffer.write(content.getvalue())
        sys.stdout.buffer.flush()
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"mask": mask, "overlay": Image.fromarray(one.overlay(PALETTE[nth % len(PALETTE)]))}
    files = [folder / f"{stem}_{nth + 1}_{slug(one.text)}_{kind}.png" for kind in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        with _whole(file) as part:
            picture.save(part, "PNG")
    return f" -> {files[0]}, {files[1]}"


@contextmanager
def json_lines(target: Path | None) -> Iterator[Callable[[dict[str, Any]], object]]:
    """A function that writes a row to a file (None: nowhere; "-": standard output).

    A file that is there is replaced when all is done; an interrupt leaves it the rows there are.
    """
    if target is None:
        yield lambda row: None
    elif str(target) == "-":
        yield lambda row: print(json.dumps(row), flush=True)
    else:
        interrupt = None
        target.parent.mkdir(parents=True, exist_ok=True)
        with _whole(target) as part, part.open("w", encoding="utf-8", newline="\n") as file:
            try:
                yield lambda row: file.write(json.dumps(row) + "\n")
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A path to write to that takes the file's place when all went well."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def read_sentences(file: Path) -> list[str]:
    """The sentences of a text file, one in every line.

    Raises:
        UserError: it is not there, is not UTF-8, or has none.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a text file with a sentence in every line")
    try:
        texts = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with this encoding") from None
    if not texts:
        raise UserError(f"{file} has no sentence: write one in every line")
    return texts
