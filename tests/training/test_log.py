"""The log: rows up to the resumed update, means since the last row."""

import json
import sys

import torch

from cmmasksd.training.log import Log, Meter


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = Log(tmp_path, "a: 1\n", updates=0)
    log.write({"step": 1, "loss": 0.5})
    log.close()
    assert log.board is None
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_log_keeps_the_rows_up_to_the_state(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    Log(tmp_path, "", updates=4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    Log(tmp_path, "", updates=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_meter_takes_means_and_starts_again():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "seg": torch.tensor(0.5)})
    meter.add({"loss": torch.tensor(3.0), "seg": torch.tensor(0.0)})
    row = meter.take(8)
    assert (row["loss"], row["seg"]) == (2.0, 0.25)
    meter.add({"loss": torch.tensor(7.0)})
    assert meter.take(1)["loss"] == 7.0
