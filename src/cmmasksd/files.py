"""Files and folders that are complete or absent: whoever reads them sees the old ones or all of the new ones.

Each is written under another name beside its place and renamed into it at the end. Those names depend on the target
alone, so that a run that is repeated replaces what a killed one left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; its file takes the place of `path` when the block ends without an exception."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file at once."""
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file at once. A lone surrogate is written as its \\uXXXX escape, which JSON reads back."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write to; it takes the place of `path` when the block ends without an exception.

    A process that is killed between the two renames at the end leaves the previous folder as `<name>.old`: see
    `recover_folder`.
    """
    new, old = path.with_name(f"{path.name}.new"), _old(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Put the previous folder back where `whole_folder` was killed between its two renames."""
    if not path.exists() and _old(path).exists():
        with suppress(FileNotFoundError):  # another process was faster
            _old(path).rename(path)


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
