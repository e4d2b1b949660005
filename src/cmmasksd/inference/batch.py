"""Many images at once, as `cmmasksd predict` does it: where images and sentences come from, and how outputs are named.

The loop itself is in `cli/predict.py`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from cmmasksd.data.images import read_bytes
from cmmasksd.data.readers.rows import SUFFIXES, read_rows
from cmmasksd.data.samples import is_blank
from cmmasksd.errors import UserError, shown
from cmmasksd.inference.visualize import PALETTE

if TYPE_CHECKING:
    from cmmasksd.inference.predictor import Segmentation

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What is taken for an image in a folder."""


_MAX_TEXTS = 64_000_000  # bytes of a file of sentences


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
        UserError: there is no image, or no sentence, or sentences from two sides; or it is a URL.
    """
    refuse_url(where)
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


def refuse_url(where: Path) -> None:
    """Refuse what only looks like a path (a UserError). In a path, "//" has become "/"."""
    if re.match(r"[a-z][a-z0-9+.-]+:[/\\]|data:", str(where), re.IGNORECASE) and not os.path.exists(where):
        raise UserError(f"{shown(str(where))} is a URL, and URLs are not fetched: download the image and give its file")


class FileNames:
    """Names for output files that any system takes and of which none comes twice, on systems that ignore case too.

    They depend on the sources alone and not on which of them can be read, so that a resumed run gives the same names.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._stems: list[str] = []
        self._taken: set[str] = set()
        last: dict[str, int] = {}
        for source in sources:
            file = source.image if isinstance(source.image, Path) else Path("stdin")
            plain = unicodedata.normalize("NFC", file.stem)
            plain = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', "-", plain)
            plain = plain.encode()[:120].decode(errors="ignore")  # a name may have 255 bytes in all
            stem, last[plain] = self._free(plain, last.get(plain, 1))
            self._stems.append(stem)
            self._taken.add(stem.casefold())

    def stem(self, index: int, frame: int | None) -> str:
        """The start of the names of the files of a source, by its index, and a frame of it."""
        stem = self._stems[index]
        return stem if frame is None else self._free(f"{stem}_f{frame:04}", 1)[0]

    def _free(self, plain: str, nth: int) -> tuple[str, int]:
        stem = plain
        while stem.casefold() in self._taken:
            nth += 1
            stem = f"{plain}_{nth}"
        return stem, nth


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


Unit = tuple[int, int | None]
"""What is written at once: a group of neighbouring sources about one image, by its number, and the frame of it."""


def require_free(target: Path, resume: bool) -> None:
    """Refuse to write rows to what is not a file, or to a file that has some without `resume` (a UserError)."""
    if target.exists() and not target.is_file():
        raise UserError(f"{target} is not a file: give --json a file, or - for standard output")
    if not resume and target.is_file() and target.stat().st_size:
        raise UserError(f"{target} holds rows already: continue their run with --resume, or give --json another file")


@contextmanager
def json_rows(
    target: Path | None, run: Mapping[str, Any] | None = None, *, resume: bool = False
) -> Iterator[tuple[set[Unit], Callable[[Unit, list[dict[str, Any]]], None]]]:
    """Write rows to a file (None: nowhere; "-": standard output), each unit's as soon as they are there.

    FILE.resume beside the file holds `run` in its first line and then, for every unit, a line [group, frame, size of
    the file after it]. It is written after the rows, so that whatever kills the process, the rows of the units in it
    are whole, and what stands behind them in the file is cut off on resuming. The process holds a lock on it: two runs
    would write each row twice.

    Args:
        target: the file.
        run: what the rows are made from, as JSON values.
        resume: continue the file.

    Yields:
        The units that the file holds, and a function that adds a unit with its rows.

    Raises:
        UserError: the file cannot be continued, or not with this `run`, or another process is writing it.
    """
    if target is None or str(target) == "-":
        yield set(), lambda unit, rows: None if target is None else print(*map(json.dumps, rows), sep="\n", flush=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    state = target.with_name(f"{target.name}.resume")
    if resume and target.is_file() and target.stat().st_size and not state.is_file():
        raise UserError(f"{target} cannot be continued without {state.name} beside it: give --json another file")
    with ExitStack() as stack:
        log: BinaryIO = stack.enter_context(state.open("a+b"))
        if not _locked(log):
            raise UserError(f"another run is writing {target}: wait for its end or give --json another file")
        require_free(target, resume)  # again, now that nobody else writes it
        kept: list[tuple[int, int | None, int]] = []
        opened: list[BinaryIO] = []

        def write(unit: Unit, rows: list[dict[str, Any]]) -> None:
            if not opened:
                opened.append(stack.enter_context(target.open("ab")))
            file = opened[0]
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            log.write(json.dumps([*unit, file.tell()]).encode() + b"\n")
            log.flush()

        if target.is_file() and target.stat().st_size:
            kept, length = _read_state(log, state, target, run or {})
            log.truncate(length)
            opened.append(stack.enter_context(target.open("ab")))
            opened[0].truncate(kept[-1][-1] if kept else 0)
        else:
            log.truncate(0)
            log.write(json.dumps(run or {}).encode() + b"\n")
            log.flush()
        yield {(group, frame) for group, frame, _ in kept}, write


def _locked(file: BinaryIO) -> bool:
    """Lock a file until it is closed or the process ends, however it ends; false if another process holds the lock."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # a byte that is never written: others cannot read or write the locked one
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    return True


def _read_state(
    log: BinaryIO, state: Path, target: Path, run: Mapping[str, Any]
) -> tuple[list[tuple[int, int | None, int]], int]:
    """The units of a file of rows that are whole, with the size of the file after each; and how long their log is."""
    log.seek(0)
    lines = log.read().split(b"\n")[:-1]  # the last may be cut short
    try:
        first, *units = map(json.loads, lines)
        changed = [key for key, value in run.items() if first[key] != value]
        before = 0
        for group, frame, size in units:
            whole = [group, size] if frame is None else [group, frame, size]
            if any(type(value) is not int or value < 0 for value in whole) or size < before:
                raise ValueError
            before = size
        with target.open("rb") as rows:
            there = rows.seek(0, os.SEEK_END)  # fewer bytes than were written where the machine itself went down
            kept = [(group, frame, size) for group, frame, size in units if size <= there]
            if kept and kept[-1][-1]:
                rows.seek(kept[-1][-1] - 1)
                if rows.read(1) != b"\n":  # it would cut a row in two
                    raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{state} is damaged: give --json another file") from None
    if changed:
        raise UserError(
            f"{target} was begun with another {' and '.join(changed)}: continue it with the same, or give --json "
            "another file"
        )
    return kept, sum(len(line) + 1 for line in lines[: 1 + len(kept)])


def digest_of_model(folder: Path) -> str:
    """SHA-256 of the files of a model's folder, trained or exported, that decide what it predicts."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".onnx", ".data"):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def digest_of_sources(sources: Sequence[Source]) -> str:
    """SHA-256 of names and sentences in their order (not of the images' content)."""
    named = [[source.name, source.texts, source.id] for source in sources]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A path to write to that takes the file's place when all went well."""
    part = file.with_name(f".{file.name}.part")  # always the same: a resumed run replaces what a killed one left
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def read_sentences(file: Path) -> list[str]:
    """The sentences of a text file, one in every line.

    Raises:
        UserError: it is not there, is too large, is not UTF-8, or has none.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a text file with a sentence in every line")
    if file.stat().st_size > _MAX_TEXTS:
        raise UserError(f"{file} has more than {_MAX_TEXTS / 1e6:.0f} MB: give fewer sentences at a time")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with this encoding") from None
    texts = [line.strip() for line in lines if not is_blank(line)]
    if not texts:
        raise UserError(f"{file} has no sentence: write one in every line")
    return texts
