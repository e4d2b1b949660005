"""Models that ship with the package, by name."""

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmmasksd.assets import SHIPPED, located
from cmmasksd.cli import build_parser
from cmmasksd.cli.options import run_config
from cmmasksd.model.modeling import CMMaskSDModel


def test_a_shipped_name_is_a_folder_of_the_package():
    assert (Path(located("tiny")) / "config.json").is_file()


@pytest.mark.parametrize("name", ["./scenes", "runs/demo/best", "openai/clip-vit-base-patch16", Path("scenes")])
def test_any_other_name_stays_as_it_is(name):
    assert located(name) == name


def test_no_shipped_model_is_larger_than_20_mb():
    for name in SHIPPED:
        folder = Path(located(name))
        assert sum(file.stat().st_size for file in folder.glob("*")) < 20e6


def test_the_card_of_a_shipped_model_names_its_weights():
    for name in SHIPPED:
        folder = Path(located(name))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert digest in (folder / "README.md").read_text()


def tool(name):
    """A module of tools/."""
    folder = Path(__file__).parents[1] / "tools"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # as for a script there
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_trained_model_is_made_the_shipped_one(tiny_model_folder, tmp_path, monkeypatch):
    """float16 that answers as before, nothing of training beside it, and a card with the scores of what is stored."""
    ship = tool("ship")
    trained, out = shutil.copytree(tiny_model_folder, tmp_path / "last"), tmp_path / "scenes-model"
    (trained / "state.pt").write_bytes(b"moments")
    (trained / "config.yaml").write_text(f"model: {{weights: {tmp_path}/before, size: [64, 64]}}\n")
    branches = tmp_path / "earlier"
    branches.mkdir()
    (branches / "distillation.safetensors").write_bytes(b"mask token")
    monkeypatch.setattr(ship, "located", lambda name: str(out))
    monkeypatch.setattr(
        sys, "argv", ["ship.py", "scenes", str(trained), "--branches", str(branches), "--references", "6"]
    )
    ship.main()
    assert not (out / "state.pt").exists()
    assert (out / "distillation.safetensors").read_bytes() == b"mask token"
    stored = load_file(out / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = CMMaskSDModel.from_pretrained(out).state_dict()
    for name, value in load_file(trained / "model.safetensors").items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-3)
    card = (out / "README.md").read_text()
    assert "{{" not in card
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() in card
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert "weights: before" in (out / "config.yaml").read_text()
    assert card.count("| val | ") == card.count("| testB | ") == 1


def test_the_settings_of_the_shipped_model_can_be_trained_with():
    parser = build_parser()
    settings = parser.parse_args(["train", "--config", str(Path(located("scenes")) / "config.yaml")])
    config = run_config(parser.instantiate(settings).train)
    assert (config.training.batch, config.data.scene_seed, config.training.lr) == (48, 8000, 4e-4)


def test_the_mean_of_models(tiny_model_folder, tmp_path, monkeypatch):
    """Every weight is the mean; the rest of the folder is the first model's, without its training's state."""
    folders = [shutil.copytree(tiny_model_folder, tmp_path / name) for name in "ab"]
    weights = load_file(folders[0] / "model.safetensors")
    save_file({name: value + 3 for name, value in weights.items()}, folders[1] / "model.safetensors", {"format": "pt"})
    (folders[0] / "state.pt").write_bytes(b"moments")
    out = tmp_path / "mean"
    monkeypatch.setattr(sys, "argv", ["mean.py", str(out), *map(str, folders)])
    tool("mean").main()
    mean = load_file(out / "model.safetensors")
    assert mean.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(mean[name], value + 1.5)
    assert {file.name for file in out.iterdir()} == {file.name for file in tiny_model_folder.iterdir()} - {"state.pt"}
