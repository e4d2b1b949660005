"""The log: rows up to the resumed update, means since the last row, and trackers that get the same rows."""

import accelerate.tracking
import pytest
import torch
from accelerate.utils import LoggerType

from cmmasksd.errors import UserError
from cmmasksd.training.log import Log, Meter, known_trackers


def test_log_keeps_the_rows_up_to_the_state(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    Log(tmp_path, "", updates=4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    Log(tmp_path, "", updates=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_meter_takes_means_and_starts_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "seg": torch.tensor(0.5)}, 4)
    meter.add({"loss": torch.tensor(3.0), "seg": torch.tensor(0.0)}, 4)
    now[0] = 2.0
    assert meter.take("references_per_s") == {"loss": 2.0, "seg": 0.25, "references_per_s": 4.0}
    meter.add({"loss": torch.tensor(7.0)}, 1)
    now[0] = 4.0
    assert meter.take("references_per_s") == {"loss": 7.0, "references_per_s": 0.5}


def test_trackers_are_known_and_installed(monkeypatch):
    assert known_trackers(None) == known_trackers(["tensorboard"]) == ["tensorboard"]
    assert known_trackers([]) == []
    with pytest.raises(UserError, match=r"names 'tensorbord', which is not a tracker: use .*, mlflow, .*, wandb$"):
        known_trackers(["tensorboard", "tensorbord"])
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.MLFLOW])
    assert known_trackers(None) == []
    with pytest.raises(UserError, match=r"names wandb, which is not installed: pip install wandb$"):
        known_trackers(["mlflow", "wandb"])
