"""Sources and file names of `cmmasksd predict`; the command itself is tested in test_cli.py."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmmasksd.errors import UserError
from cmmasksd.inference.batch import FileNames, Source, find_sources, json_lines, read_sentences, slug


def source(name: str) -> Source:
    return Source(name, Path(name), ("x",))


def test_a_folder_gives_its_images_in_order(tmp_path: Path):
    for name in ("b.png", "a.JPG", "c.webp", "notes.txt", "d.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found = find_sources(tmp_path, ["one", "two"])
    assert [Path(one.name).name for one in found] == ["a.JPG", "b.png", "c.webp"]
    assert {one.texts for one in found} == {("one", "two")}


def test_a_manifest_brings_its_sentences(tmp_path: Path):
    (tmp_path / "m.csv").write_text("image,expressions,id\nsub/a.png,x|y,k\nb.png,z,\n")
    rows = [(one.image, one.texts, one.id) for one in find_sources(tmp_path / "m.csv", [])]
    assert rows == [(tmp_path / "sub/a.png", ("x", "y"), "k"), (tmp_path / "b.png", ("z",), None)]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no row"):
        find_sources(tmp_path / "empty.jsonl", [])


@given(st.lists(st.text(min_size=1, max_size=300).filter(lambda name: "/" not in name and name not in (".", ".."))))
def test_file_names_suit_every_system(names: list[str]):
    chosen = FileNames()
    stems = [chosen.stem(source(name), frame) for name in names for frame in (None, 1, 2)]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', stem)
        assert len(f".{stem}_10_{slug('a' * 99)}_overlay.png.{2**22}.part".encode()) <= 255


def test_file_names_are_those_of_the_images():
    chosen = FileNames()
    given = [("x/a.png", None), ("y/A.jpg", None), ("y/a b.jpg", None), ("v.gif", 1), ("v.gif", 12), ("-", None)]
    assert [chosen.stem(source(name), frame) for name, frame in given] == ["a", "A_2", "a b", "v_f0001", "v_f0012", "-"]
    assert chosen.stem(Source("-", b"", ("x",)), None) == "stdin"


def test_sentences_of_a_file(tmp_path: Path):
    (tmp_path / "s.txt").write_bytes("\ufeffthe cup\r\n\r\n  Täss'chen \n".encode())
    assert read_sentences(tmp_path / "s.txt") == ["the cup", "Täss'chen"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, OSError, UserError])
def test_lines_are_whole_or_as_they_were(tmp_path: Path, error: type[BaseException] | None):
    """An interrupt keeps what there is: the work of hours."""
    file = tmp_path / "new" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text("before")

    def work():
        with json_lines(file) as write:
            write({"a": "ü\n"})
            assert file.read_text() == "before"
            if error is not None:
                raise error("stop")

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    if error in (None, KeyboardInterrupt):
        assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": "ü\n"}]
    else:
        assert file.read_text() == "before"
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_without_images_and_no_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="holds no image"):
        find_sources(tmp_path, ["x"])
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no sentence given"):
        find_sources(tmp_path / "a.png", [])
