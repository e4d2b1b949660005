"""`cmmasksd explain`: one figure per sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.commands import main


def test_explain(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    given = ["--model", run / "best", "--image", tmp_path / "a.png", "--out", tmp_path / "out"]
    assert main("explain", *given, "--text", "the red circle", "--text", "left star") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    names = {"a_1_the-red-circle_explained.png", "a_2_left-star_explained.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
