"""`cmmasksd compare`: a table, a file, and scores that cannot be compared."""

import json
from pathlib import Path

import pytest

from cli.commands import SCENES, main


def test_compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, threshold in (("a", 0.5), ("b", 0.5), ("strict", 0.9)):
        given = ["--data", "scenes", "--split", "val", "--out", tmp_path / name, "--threshold", threshold, *SCENES]
        assert main("evaluate", "--model", run / ("best" if name == "a" else "last"), *given) == 0
    capsys.readouterr()
    given = ["--resamples", "200", "--metrics", "oIoU", "P@0.5", "--out", tmp_path / "difference.json"]
    assert main("compare", tmp_path / "a", tmp_path / "b" / "expressions.jsonl", *given) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:5] == ["slice", "expressions", "metric", "A", "B"]
    assert table[-1] == "paired bootstrap over images, 200 resamples"
    rows = json.loads((tmp_path / "difference.json").read_text())
    assert [row["metric"] for row in rows[:2]] == ["oIoU", "P@0.5"]
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert (rows[0]["a"], rows[0]["b"]) == pytest.approx([result["oIoU"] for result in results])
    assert rows[0]["low"] <= rows[0]["difference"] <= rows[0]["high"]

    assert main("compare", tmp_path / "a", tmp_path / "strict") == 2
    assert "different protocols" in capsys.readouterr().err
