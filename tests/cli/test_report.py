"""`cmmasksd report`: files of others are refused in one line."""

import json
from pathlib import Path

import pytest

from cli.commands import METRICS, main


@pytest.mark.parametrize("key", ["data", "log"])
def test_report_of_foreign_files(key: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = {"split": "val", **dict.fromkeys(METRICS, 0.5), "expressions": 1, "protocol": {"threshold": 0.5}}
    results |= {} if key == "data" else {"data": "scenes"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "expressions.jsonl").write_text("")
    (tmp_path / "log.jsonl").write_text("not JSON\n")
    given = ["--model", run / "best", "--results", tmp_path, "--metrics", tmp_path / "log.jsonl"]
    assert main("report", *given, "--out", tmp_path / "page.html") == 2
    assert capsys.readouterr().err.count("\n") == 1
