"""Sources and file names of `cmmasksd predict`; the command itself is tested in test_cli.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmmasksd.errors import UserError
from cmmasksd.inference.batch import (
    FileNames,
    Source,
    find_sources,
    json_rows,
    read_sentences,
    require_free,
    slug,
)


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
    chosen = FileNames([source(name) for name in names])
    stems = [chosen.stem(index, frame) for index in range(len(names)) for frame in (None, 1, 2)]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', stem)
        assert len(f".{stem}_10_{slug('a' * 99)}_overlay.png.part".encode()) <= 255


def test_file_names_are_those_of_the_images():
    names = ["x/a.png", "y/A.jpg", "y/a b.jpg", "v.gif", "v_f0002.png", "-"]
    chosen = FileNames([source(name) for name in names])
    stems = [chosen.stem(index, None) for index in range(len(names))]
    assert stems == ["a", "A_2", "a b", "v", "v_f0002", "-"]
    assert [chosen.stem(3, frame) for frame in (1, 2, 12)] == ["v_f0001", "v_f0002_2", "v_f0012"]
    assert FileNames([Source("-", b"", ("x",))]).stem(0, None) == "stdin"


def test_sentences_of_a_file(tmp_path: Path):
    (tmp_path / "s.txt").write_bytes("\ufeffthe cup\r\n\r\n  Täss'chen \n".encode())
    assert read_sentences(tmp_path / "s.txt") == ["the cup", "Täss'chen"]


ROWS = [{"a": "ü\n"}, {"a": 2}]
TEXT = '{"a": "\\u00fc\\n"}\n{"a": 2}\n'


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, OSError, UserError])
def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path, error: type[BaseException] | None):
    file = tmp_path / "new" / "rows.jsonl"

    def work():
        with json_rows(file, {"model": "m"}) as (done, write):
            assert done == set()
            assert not file.exists()  # until there is something to write
            write((0, None), ROWS)
            assert file.read_text() == TEXT
            if error is not None:
                raise error("stop")

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert file.read_text() == TEXT
    assert {one.name for one in file.parent.iterdir()} == {"rows.jsonl", "rows.jsonl.resume"}


def written(file: Path) -> None:
    """Two units, the second a frame."""
    with json_rows(file, {"model": "m", "--threshold": 0.5}) as (_, write):
        write((0, None), ROWS)
        write((1, 7), ROWS)


@pytest.mark.parametrize("tail", ["", '{"a": 2}\n', '{"a'])
@pytest.mark.parametrize(("lines", "done"), [(3, {(0, None), (1, 7)}), (2, {(0, None)}), (1, set())])
def test_what_is_behind_the_last_whole_unit_is_cut_off(tmp_path: Path, tail: str, lines: int, done: set):
    file = tmp_path / "rows.jsonl"
    written(file)
    state = tmp_path / "rows.jsonl.resume"
    kept = state.read_text().splitlines(keepends=True)[:lines]
    state.write_text("".join(kept) + "[1, 7")  # a line cut short
    with file.open("a") as content:
        content.write(tail)
    for _ in range(2):
        with json_rows(file, {"model": "m", "--threshold": 0.5}, resume=True) as (found, write):
            assert found == done
            assert file.read_text() == TEXT * len(done)
    with json_rows(file, {"model": "m", "--threshold": 0.5}, resume=True) as (found, write):
        write((2, None), ROWS)
    assert file.read_text() == TEXT * (len(done) + 1)
    with json_rows(file, {"model": "m", "--threshold": 0.5}, resume=True) as (found, write):
        assert found == done | {(2, None)}


def test_rows_of_another_run_are_refused(tmp_path: Path):
    file, state = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.resume"
    written(file)
    before = file.read_bytes(), state.read_bytes()

    def begin(run: dict, resume: bool) -> None:
        with json_rows(file, run, resume=resume):
            raise AssertionError("begun")

    run = {"model": "m", "--threshold": 0.5}
    with pytest.raises(UserError, match="--resume"):
        begin(run, False)
    for changed in ({"--threshold": 0.6}, {"model": "n"}):
        with pytest.raises(UserError, match=f"begun with another {next(iter(changed))}: "):
            begin(run | changed, True)
    assert (file.read_bytes(), state.read_bytes()) == before
    for content in (
        b"",
        b"\n",
        b"[]\n",
        b"{}\n",
        b"{",
        b"\xff\n",
        b"[" * 99999 + b"\n",
        before[1] + b"[1]\n",
        b"null\n",
        *(
            before[1] + line + b"\n"
            for line in (
                b"[Infinity, null, 5]",
                b"[0, null, 1e400]",
                b"[0, [1], 5]",
                b"[0, null, -5]",
                b"[0, null, true]",
                b"[true, null, 60]",
                b"[2, -1, 60]",
                b"[-1, null, 60]",
                b"[2, null, 60.0]",
                b'["2", null, 60]',
                b"[2, null, 5]",
                b"{}",
                b"[2, null, " + b"9" * 5000 + b"]",
            )
        ),
        before[1].splitlines(keepends=True)[0] + b"[0, null, 5]\n",  # within a row
    ):
        state.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            begin(run, True)
        assert file.read_bytes() == before[0]
    state.unlink()
    with pytest.raises(UserError, match=r"without rows\.jsonl\.resume"):
        begin(run, True)
    with pytest.raises(UserError, match="is not a file"):
        require_free(tmp_path, False)


HOLDER = """
import sys
from pathlib import Path
from cmmasksd.inference.batch import json_rows
with json_rows(Path(sys.argv[1]), {"model": "m"}) as (_, write):
    if sys.argv[2] == "rows":
        write((0, None), [{"a": 1}])
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("held", ["rows", "nothing"])
def test_two_runs_at_once_do_not_write_one_file(tmp_path: Path, held: str):
    """The second is refused, until the first is killed."""
    file, state = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.resume"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, file, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "open\n"
            before = state.stat().st_size
            with (
                pytest.raises(UserError, match=r"another run is writing .*rows\.jsonl: wait for its end"),
                json_rows(file, {"model": "m"}, resume=True),
            ):
                raise AssertionError("begun")
            assert state.stat().st_size == before
        finally:
            first.kill()
    for unit in (1, 2):
        with json_rows(file, {"model": "m"}, resume=True) as (done, write):
            write((unit, None), [{"a": unit}])
        assert done == {(nth, None) for nth in range(held == "nothing", unit)}
    assert file.read_text().splitlines()[-2:] == ['{"a": 1}', '{"a": 2}']


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
