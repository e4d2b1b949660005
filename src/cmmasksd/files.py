"""Files and folders that are complete or absent, and paths that stay inside their folder.

A file or folder is written under another name beside its target and renamed at the end, so a reader sees the old one or
all of the new one. That name depends on the target alone: a repeated run replaces what a killed one left.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath

from cmmasksd.errors import UserError, shown


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


def safe_path(folder: Path, name: object, what: str, *, outward_links: bool = False) -> Path:
    """The path of a file that another file names, which a stranger may have written.

    Args:
        folder: where the file must lie, or below.
        name: its path relative to the folder, with / or \\, on any operating system.
        what: the name's own name in the message, such as "image 7: file_name".
        outward_links: whether it may be a link to a place outside, as in the Hugging Face cache.

    Raises:
        UserError: the name is not a path, or leaves the folder.
    """
    if not isinstance(name, str):
        raise UserError(f"{what} is {'missing' if name is None else shown(name)}: expected a path")
    path = posixpath.normpath(name.replace("\\", "/"))
    leaves = path.startswith("/") or PureWindowsPath(path).anchor or path.split("/")[0] == ".."
    if leaves or path == "." or not _can_be_path(path):
        raise UserError(
            f"{what} {shown(name)} is not a path inside {folder}: put the file there and name it from there"
        )
    if not (outward_links or Path(os.path.realpath(folder / path)).is_relative_to(os.path.realpath(folder))):
        raise UserError(f"{what} {shown(name)} is a link to a place outside {folder}: put the file itself there")
    return folder / path


def _can_be_path(name: str) -> bool:
    """Whether text can be a path: not too long, without control characters or lone surrogates.

    U+DC80 to U+DCFF are allowed: Python decodes the bytes of a name that is not UTF-8 to them.
    """
    if re.search("[\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]", name):
        return False
    parts = [len(part.encode("utf-8", "surrogateescape")) for part in name.split("/")]
    return max(parts) <= 255 and sum(parts) <= 2000
