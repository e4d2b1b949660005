"""Input of `cmmasksd predict`: images by file, folder, pattern, manifest or standard input, and their sentences."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from cmmasksd.data.images import IMAGE_SUFFIXES, read_bytes
from cmmasksd.data.readers.rows import SUFFIXES, read_rows
from cmmasksd.data.samples import is_blank
from cmmasksd.errors import UserError, shown

STDOUT = Path("-")
"""Standard output in place of a file or folder, or standard input in place of an image."""
_MAX_TEXTS = 64_000_000  # bytes of a file of sentences


@dataclass(frozen=True, slots=True)
class Source:
    """An image and the sentences to segment it by.

    Attributes:
        name: name of the image in messages and results.
        image: path or content of the image file.
        texts: one sentence or several.
        id: id of the manifest's row; None without one.
    """

    name: str
    image: Path | bytes
    texts: tuple[str, ...]
    id: str | None = None


def find_sources(where: str | Path, texts: Sequence[str]) -> list[Source]:
    """Find the images that a path names, with their sentences.

    Args:
        where: an image or video file; a folder, whose images are sorted by name; a pattern such as "photos/*.jpg" or
            "photos/**/*.jpg", whose files are sorted by path; a manifest, which has sentences in every row; or "-", an
            image on standard input.
        texts: the sentences, unless `where` is a manifest.

    Raises:
        UserError: no image or no sentence is given, `texts` are given beside a manifest, or `where` is a URL.
    """
    where = Path(where)
    refuse_url(where)
    if where.suffix.lower() in SUFFIXES:
        if texts:
            raise UserError(f"{where} has a sentence in every row: leave out --text and --texts")
        rows = read_rows(where)
        if not rows:
            raise UserError(f"{where} has no row: add at least one image with a sentence")
        return [Source(str(row.image), row.image, row.expressions, row.id) for row in rows]
    if not texts:
        raise UserError("no sentence given: say what to look for with --text, or --texts FILE with one per line")
    if where == STDOUT:
        return [Source("-", read_bytes(sys.stdin.buffer), tuple(texts))]
    files = [where]
    if where.is_dir():
        files = sorted(file for file in where.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{where} holds no image ({', '.join(IMAGE_SUFFIXES)}): check the path")
    elif is_pattern(where):
        files = sorted(file for file in map(Path, glob(str(where), recursive=True)) if file.is_file())
        if not files:
            raise UserError(f"no file matches {where}: check the pattern")
    return [Source(str(file), file, tuple(texts)) for file in files]


def is_pattern(where: Path) -> bool:
    """Whether a path is a pattern of files, and not the name of one."""
    return has_magic(str(where)) and not where.exists()


def refuse_url(where: Path) -> None:
    """Raise a UserError for a URL. As a Path, its "//" has become "/"."""
    if re.match(r"[a-z][a-z0-9+.-]+:[/\\]|data:", str(where), re.IGNORECASE) and not os.path.exists(where):
        raise UserError(f"{shown(str(where))} is a URL, and URLs are not fetched: download the image and give its file")


def read_sentences(file: Path) -> list[str]:
    """The sentences of a text file, one per line.

    Raises:
        UserError: the file does not exist, is too large, is not UTF-8 or has no sentence.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a text file with one sentence per line")
    if file.stat().st_size > _MAX_TEXTS:
        raise UserError(f"{file} has more than {_MAX_TEXTS / 1e6:.0f} MB: give fewer sentences at a time")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8") from None
    texts = [line.strip() for line in lines if not is_blank(line)]
    if not texts:
        raise UserError(f"{file} has no sentence: write one per line")
    return texts
