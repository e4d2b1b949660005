"""`cmmasksd demo`: trains once, scores, and reports."""

import json
from functools import partial
from pathlib import Path

import pytest

from cli.commands import METRICS, main
from cmmasksd.cli import demo
from cmmasksd.config import ScoreConfig


def test_demo_twice(
    micro: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(demo, "ScoreConfig", partial(ScoreConfig, references=6))
    kept = ["metrics.jsonl", "best/model.safetensors", "last/state.pt", "val/results.json", "testB/results.json"]
    seen = []
    for resume in ([], ["--resume"]):
        assert main("demo", *micro, "--training.out", tmp_path, *resume) == 0
        shown = capsys.readouterr().out
        assert "scenes val" in shown
        assert "scenes testB" in shown
        assert "Photographs, segmented by the shipped model" in shown
        assert (tmp_path / "report.html").read_text().count('class="drawing"') == 3
        assert (tmp_path / "report.html").stat().st_size > 5000
        seen.append([(tmp_path / name).read_bytes() for name in kept])
        for split in ("val", "testB"):
            assert set(METRICS) <= set(json.loads((tmp_path / split / "results.json").read_text()))
    assert seen[0] == seen[1]  # the second time it only scores
    assert main("demo", *micro, "--training.out", tmp_path) == 2
    assert "already holds a run: resume it with --resume" in capsys.readouterr().err
    assert "scenes val" in (tmp_path / "report.html").read_text()  # the page of the run is as it was
