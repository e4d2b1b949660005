"""A trained model and its scores, as training and scoring leave them."""

import shutil
from pathlib import Path

import pytest
import yaml

from cmmasksd.evaluation.protocols import ORIGINAL
from cmmasksd.evaluation.results import ExpressionScore, SplitScores, write_results
from cmmasksd.model.locating import weights_digest


@pytest.fixture
def trained(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A folder as training leaves it in `last`, with settings that name folders of the machine."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "runs" / "best")
    data = {"name": "refcoco", "root": "/home/me/refer", "train_split": "train", "val_split": "val"}
    distillation = {"vision": True, "language": False, "loss": "kl"}
    settings = {"data": data, "distillation": distillation, "training": {"out": "C:\\runs\\a"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for name in ("state.pt", "secrets.env", "modeling_evil.py"):
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def scored(trained: Path, tmp_path: Path) -> Path:
    """Results of that model."""
    counts = [(80, 100), (10, 40), (3, 4)]
    rows = [ExpressionScore(1, 1, n, "a cat", i, u, u, ORIGINAL.iou(i, u)) for n, (i, u) in enumerate(counts)]
    provenance = {"data": "refcoco", "weights": weights_digest(trained)}
    write_results(tmp_path / "val", SplitScores("val", rows, ORIGINAL, provenance))
    return tmp_path / "val"
