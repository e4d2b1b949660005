"""The file of JSON rows that `cmmasksd predict --json` writes and resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cmmasksd.errors import UserError
from cmmasksd.files import sha256
from cmmasksd.inference.predict import Prediction, Unit
from cmmasksd.inference.sources import STDOUT, Source
from cmmasksd.model.locating import model_folder

RowWriter = Callable[[Unit, list[dict[str, Any]]], None]


def json_row(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON values: image (and id, frame), text, score, presence, present, area, box, size, rle.

    `box` is (x0, y0, x1, y1) in pixels, half-open; null for an empty mask.
    """
    segmentation = prediction.segmentation
    row: dict[str, Any] = {"image": prediction.source.name}
    if prediction.source.id is not None:
        row["id"] = prediction.source.id
    if prediction.frame is not None:
        row["frame"] = prediction.frame
    return row | {
        "text": segmentation.text,
        "score": round(segmentation.score, 6),
        "presence": round(segmentation.presence, 6),
        "present": segmentation.present,
        "area": segmentation.area,
        "box": segmentation.box,
        "size": list(segmentation.mask.shape),
        "rle": segmentation.rle,
    }


def fingerprint(model: Path, sources: Sequence[Source], **options: Any) -> dict[str, Any]:
    """Everything that the rows of a run depend on, as JSON values; a run is resumed only with the same values.

    Args:
        model: folder of the model.
        sources: images and sentences; their names count, not the content of the images.
        options: values of further command-line options.
    """
    return {
        "model": _model_digest(model),
        **{f"--{name}": value for name, value in options.items()},
        "list of images and sentences": _sources_digest(sources),
    }


def require_free(target: Path | None, resume: bool) -> None:
    """Check that rows can be written to a path.

    Raises:
        UserError: the path is not a file, holds rows although `resume` is false, or is missing although it is true.
    """
    if target in (None, STDOUT):
        if resume:
            raise UserError("--resume resumes the rows of a file: name it with --json")
        return
    if target.exists() and not target.is_file():
        raise UserError(f"{target} is not a file: give --json a file, or - for standard output")
    if not resume and target.is_file() and target.stat().st_size:
        raise UserError(f"{target} already holds rows: resume its run with --resume, or give --json another file")


@contextmanager
def row_writer(
    target: Path | None, model: str, sources: Sequence[Source], *, resume: bool, **options: Any
) -> Iterator[tuple[Collection[Unit], RowWriter]]:
    """See `json_rows`; rows may also go to standard output (STDOUT) or nowhere (None).

    Args:
        model: folder or hub id of the model.
        sources, options: see `fingerprint`.
    """
    if target is None:
        yield (), lambda unit, rows: None
    elif target == STDOUT:
        yield (), lambda unit, rows: print(*map(json.dumps, rows), sep="\n", flush=True)
    else:
        with json_rows(target, fingerprint(model_folder(model), sources, **options), resume=resume) as rows:
            yield rows


@contextmanager
def json_rows(target: Path, run: Mapping[str, Any], *, resume: bool = False) -> Iterator[tuple[set[Unit], RowWriter]]:
    """Append rows to a file, one unit at a time, so that a killed run resumes without losing or repeating a row.

    A second file, FILE.resume, holds `run` in its first line and then one line per unit, [group, frame, size of FILE
    after it]. That line is written after the rows, so the rows of every unit in FILE.resume are complete; anything
    after them in FILE is cut off on resuming. A lock on FILE.resume keeps other processes from writing.

    Args:
        target: the file.
        run: everything that the rows depend on, see `fingerprint`.
        resume: keep the rows that the file holds.

    Yields:
        The units that the file holds, and a function that appends the rows of a unit.

    Raises:
        UserError: the file cannot be resumed, was started with another `run`, or is being written by another process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    state = target.with_name(f"{target.name}.resume")
    if resume and target.is_file() and target.stat().st_size and not state.is_file():
        raise UserError(f"{target} cannot be resumed without {state.name} beside it: give --json another file")
    with ExitStack() as stack:
        log: BinaryIO = stack.enter_context(state.open("a+b"))
        if not _locked(log):
            raise UserError(f"another run is writing {target}: wait for its end or give --json another file")
        require_free(target, resume)  # again, now that no other process writes it
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
            kept, length = _read_state(log, state, target, run)
            log.truncate(length)
            opened.append(stack.enter_context(target.open("ab")))
            opened[0].truncate(kept[-1][-1] if kept else 0)
        else:
            log.truncate(0)
            log.write(json.dumps(run).encode() + b"\n")
            log.flush()
        yield {(group, frame) for group, frame, _ in kept}, write


def _locked(file: BinaryIO) -> bool:
    """Lock a file until it is closed or the process ends; false if another process holds the lock."""
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
    """The complete units, each with the size of the rows file after it, and the length of their lines in the log."""
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
            present = rows.seek(0, os.SEEK_END)  # less than was written if the machine itself went down
            kept = [(group, frame, size) for group, frame, size in units if size <= present]
            if kept and kept[-1][-1]:
                rows.seek(kept[-1][-1] - 1)
                if rows.read(1) != b"\n":  # it would cut a row in two
                    raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{state} is damaged: give --json another file") from None
    if changed:
        raise UserError(
            f"{target} was begun with another {' and '.join(changed)}: resume it with the same, or give --json "
            "another file"
        )
    return kept, sum(len(line) + 1 for line in lines[: 1 + len(kept)])


def _model_digest(folder: Path) -> str:
    """SHA-256 of the files in a model's folder (of training or of an export) that determine its predictions."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".onnx", ".data"):
            digest.update(file.name.encode() + bytes.fromhex(sha256(file)))
    return digest.hexdigest()


def _sources_digest(sources: Sequence[Source]) -> str:
    """SHA-256 of names, sentences and ids in their order."""
    return hashlib.sha256(
        json.dumps([[source.name, source.texts, source.id] for source in sources]).encode()
    ).hexdigest()
