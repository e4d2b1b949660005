"""Result files and logs from strangers, of the right shape but for one value: they are read, or refused in one line."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cmmasksd import cli
from cmmasksd.errors import UserError
from cmmasksd.evaluation.protocols import ORIGINAL
from cmmasksd.evaluation.report import read_log, write_report
from cmmasksd.evaluation.results import ExpressionScore, SplitScores, read_expressions, read_results, write_results
from cmmasksd.evaluation.tables import format_table

ROWS = [ExpressionScore(1, 9, nth, f"dog {nth}", nth, 10, 5, nth / 10) for nth in range(4)]
EXTRA = {"data": "scenes", "model": "m", "weights": "ab", "references": 4, "scene_seed": 0, "scene_size": 64}
LOG = [
    {"step": 1, "loss": 0.5, "seg": 0.1, "epoch": 0},
    {"step": 2, "loss": 0.4},
    {"step": 2, "oIoU": 0.1, "mIoU": 0.2},
]

DEEP = "[" * 100_000 + "]" * 100_000
WRONG = st.sampled_from(
    ["null", "[]", "{}", '""', "-1", "1.5", str(2**70), "9" * 5000, "1e400", "NaN", "-Infinity", "true", "1e308",
     "5e-324", '"\\ud800"', '"\\u001b[31m\\u0000\\n\\u2028"', '"' + "x" * 100_000 + '"', "[[[[[]]]]]", DEEP, "", "}",
     '"\xff"']
)  # fmt: skip
bounded = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values, the outermost too."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def spoilt(value: Any, path: tuple, wrong: str) -> bytes:
    """JSON of a value with `wrong` in one place."""
    if not path:
        return wrong.encode("latin-1")
    changed = part = copy.deepcopy(value)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = "\x00here\x00"
    return json.dumps(changed).replace(json.dumps("\x00here\x00"), wrong).encode("latin-1")


def require_one_line(message: str) -> None:
    assert message.isprintable()
    assert len(message) < 700


def read_or_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except UserError as error:
        require_one_line(str(error))


def wrote(folder: Path) -> tuple[dict, list[dict]]:
    """Result files of a folder, and what they hold."""
    write_results(folder, SplitScores("val", ROWS, ORIGINAL, EXTRA))
    rows = (folder / "expressions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), [json.loads(row) for row in rows]


@pytest.mark.parametrize("name", ["results.json", "expressions.jsonl"])
@bounded
@given(st.data())
def test_result_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject):
    """Read, printed, and compared with sound files."""
    results, rows = wrote(tmp_path / "a")
    wrote(tmp_path / "b")
    given_value = results if name == "results.json" else rows[2]
    content = spoilt(given_value, data.draw(st.sampled_from(list(places(given_value)))), data.draw(WRONG))
    if name == "expressions.jsonl":
        lines = [json.dumps(row).encode() for row in rows]
        content = b"\n".join([*lines[:2], content, *lines[3:]])
    (tmp_path / "b" / name).write_bytes(content)

    def show() -> None:
        results = [read_results(tmp_path / "b")]
        format_table(results).encode("utf-8")
        write_report(tmp_path / "page.html", title="fuzz", results=results, examples={})

    read_or_refused(show)
    read_or_refused(lambda: read_expressions(tmp_path / "b"))
    code = cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--resamples", "100"])
    out, err = capsys.readouterr()
    assert code in (0, 2)
    assert (code == 0) == bool(out)
    if code:
        assert err.startswith("cmmasksd compare: ")
        assert err.count("\n") == 1
        require_one_line(err.rstrip("\n"))


@bounded
@given(st.sampled_from(list(places(LOG))), WRONG)
@example((0, "step"), "1e99")
@example((0, "loss"), "1e99")
def test_a_log(tmp_path: Path, path: tuple, wrong: str):
    rows = [json.dumps(row).encode() for row in LOG]
    if path:
        rows[path[0]] = spoilt(LOG[path[0]], path[1:], wrong)
    else:
        rows = [wrong.encode("latin-1")]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(rows))

    def show() -> None:
        curves = read_log(tmp_path / "log.jsonl")
        write_report(tmp_path / "page.html", title="fuzz", results=[], examples={}, curves=curves)

    read_or_refused(show)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"no gzip", b"\x1f\x8b\x08\x00" + b"\xff" * 60])
def test_a_damaged_archive(tmp_path: Path, content: bytes):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    read_or_refused(lambda: read_expressions(tmp_path / "a.jsonl.gz"))
