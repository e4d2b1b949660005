"""Where `cmmasksd predict` finds images and sentences, also those of strangers."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmmasksd.errors import UserError
from cmmasksd.inference.outputs import output_folder
from cmmasksd.inference.sources import find_sources, read_sentences


def test_a_folder_gives_its_images_in_order(tmp_path: Path):
    for name in ("b.png", "a.JPG", "c.webp", "notes.txt", "d.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found = find_sources(tmp_path, ["one", "two"])
    assert [Path(one.name).name for one in found] == ["a.JPG", "b.png", "c.webp"]
    assert {one.texts for one in found} == {("one", "two")}


def test_a_pattern_gives_its_files_in_order(tmp_path: Path):
    for name in ("b.jpg", "a.jpg", "c.png", "deep/d.jpg", "x[1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(pattern: str) -> list[str]:
        return [
            Path(source.name).relative_to(tmp_path).as_posix() for source in find_sources(tmp_path / pattern, ["x"])
        ]

    assert names("[ab].jpg") == ["a.jpg", "b.jpg"]
    assert names("**/*.jpg") == ["a.jpg", "b.jpg", "deep/d.jpg", "x[1].jpg"]
    assert names("x[1].jpg") == ["x[1].jpg"]  # a file's own name is not a pattern
    with pytest.raises(UserError, match="no file matches"):
        find_sources(tmp_path / "*.gif", ["x"])
    with pytest.raises(UserError, match="folder of images"):
        output_folder(tmp_path, None, tmp_path / "*.jpg", find_sources(tmp_path / "*.jpg", ["x"]))


def test_a_manifest_brings_its_sentences(tmp_path: Path):
    (tmp_path / "m.csv").write_text("image,expressions,id\nsub/a.png,x|y,k\nb.png,z,\n")
    rows = [(one.image, one.texts, one.id) for one in find_sources(tmp_path / "m.csv", [])]
    assert rows == [(tmp_path / "sub/a.png", ("x", "y"), "k"), (tmp_path / "b.png", ("z",), None)]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no row"):
        find_sources(tmp_path / "empty.jsonl", [])


def test_sentences_of_a_file(tmp_path: Path):
    (tmp_path / "s.txt").write_bytes("\ufeffthe cup\r\n\r\n  Täss'chen \n".encode())
    assert read_sentences(tmp_path / "s.txt") == ["the cup", "Täss'chen"]


def test_a_folder_without_images_and_no_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="holds no image"):
        find_sources(tmp_path, ["x"])
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no sentence given"):
        find_sources(tmp_path / "a.png", [])


WRONG = st.sampled_from(
    ["null", "[]", "{}", '""', "-1", str(2**70), "9" * 5000, "NaN", "true", '"\\ud800"', '"\\u001b[31m\\u0000\\n"',
     '"\\u001c"', '"' + "x" * 100_000 + '"', '["x", null]', '["x", "\\udcff"]', "[" * 99999 + "]" * 99999, "", "}",
     '"\xff"', '"../x.png"', '"/etc/passwd"']
)  # fmt: skip
bounded = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def require_one_line(message: str) -> None:
    assert message.isprintable()
    assert len(message) < 700


@bounded
@given(st.sampled_from(["row", "image", "expressions", "text", "id", "split"]), WRONG)
def test_a_manifest_from_a_stranger(tmp_path: Path, key: str, wrong: str):
    """With one wrong value it is read, or refused in one line."""
    row = {"image": '"a.png"', "text" if key == "text" else "expressions": '["x", "y"]', "id": "1", "split": '"val"'}
    line = "{" + ", ".join(f'"{name}": {wrong if name == key else value}' for name, value in row.items()) + "}"
    (tmp_path / "m.jsonl").write_bytes(
        b'{"image": "b.png", "text": "z"}\n' + (wrong if key == "row" else line).encode("latin-1")
    )
    try:
        found = find_sources(tmp_path / "m.jsonl", [])
    except UserError as error:
        require_one_line(str(error))
    else:
        for one in found:
            assert all(text.strip() and text.encode() for text in one.texts)
            assert len(one.name) <= 4096


@bounded
@given(st.binary(max_size=40))
def test_sentences_from_a_stranger(tmp_path: Path, content: bytes):
    (tmp_path / "s.txt").write_bytes(content)
    (tmp_path / "m.csv").write_bytes(b"image,expressions\na.png," + content)
    for read in (lambda: read_sentences(tmp_path / "s.txt"), lambda: find_sources(tmp_path / "m.csv", [])[0].texts):
        try:
            texts = read()
        except UserError as error:
            require_one_line(str(error))
        else:
            assert texts
            assert all(text.strip() for text in texts)


def test_a_file_of_sentences_is_bounded(tmp_path: Path):
    with (tmp_path / "s.txt").open("wb") as file:
        file.truncate(64_000_001)  # a hole: it takes no room on the disk
    with pytest.raises(UserError, match="more than 64 MB"):
        read_sentences(tmp_path / "s.txt")
