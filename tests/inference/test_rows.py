"""Rows that survive a killed process; the whole command is killed in tests/cli/test_predict.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from cmmasksd.errors import UserError
from cmmasksd.inference.rows import json_rows, require_free

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
from cmmasksd.inference.rows import json_rows
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
