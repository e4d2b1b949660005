"""Files and folders that are complete or absent; paths that stay inside their folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cmmasksd.errors import UserError
from cmmasksd.files import recover_folder, safe_path, sha256, whole_file, whole_folder, write_text


def test_a_file_keeps_its_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(path)
    assert path.read_text() == "old"
    with whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def _interrupted(path: Path) -> None:
    with whole_file(path) as part:
        part.write_text("half of the n")
        raise KeyboardInterrupt


def test_text_is_utf8_with_its_own_line_ends_and_no_lone_surrogate(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "ä\n\r\n\ud800")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa4\n\r\n\\ud800"


def test_a_folder_keeps_its_files_until_the_new_ones_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "above" / "model"
    with whole_folder(path) as new:
        (new / "old").touch()
    with pytest.raises(OSError, match="full"):
        _on_a_full_disk(path)
    assert [file.name for file in path.iterdir()] == ["old"]
    with whole_folder(path) as new:
        (new / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [file.name for file in path.parent.iterdir()] == ["model"]


def _on_a_full_disk(path: Path) -> None:
    with whole_folder(path) as new:
        (new / "half").touch()
        raise OSError("the disk is full")


def test_what_a_killed_process_left_is_replaced_or_recovered(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("model.new", "model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").touch()
    recover_folder(path)  # killed between the renames: the previous folder comes back
    assert [file.name for file in path.iterdir()] == ["left"]
    recover_folder(path)
    with whole_folder(path) as new:
        assert not list(new.iterdir())
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize(
    "name", ["../a", "x/../../a", "/a", "\\\\server\\a", "C:\\a", "C:a", "", ".", "a\0", "x" * 256, "\ud800"]
)
def test_a_name_that_leaves_the_folder_is_not_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"^image 7: file .* is not a path inside {tmp_path}"):
        safe_path(tmp_path, name, "image 7: file")


def test_a_name_inside_the_folder_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path)
    for name in ("x/a", "x\\a", "y/../x/a"):
        assert safe_path(tmp_path / "data", name, "image") == tmp_path / "data/x/a"
    with pytest.raises(UserError, match="image 'link/a' is a link to a place outside"):
        safe_path(tmp_path / "data", "link/a", "image")
    assert safe_path(tmp_path / "data", "link/a", "image", outward_links=True) == tmp_path / "data/link/a"
    with pytest.raises(UserError, match="image is missing: expected a path"):
        safe_path(tmp_path, None, "image")
