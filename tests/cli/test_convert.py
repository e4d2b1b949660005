"""`cmmasksd convert`, and training on a checkpoint of OpenAI as it is."""

from pathlib import Path

import pytest
import torch

from cli.commands import main, photo
from cmmasksd.model.loading import load_backbone, load_clip
from conftest import TINY_CONTEXT
from model.towers.openai_clip import OpenAIClip

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; OpenAI's files are in it


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_tokenizer) -> Path:
    OpenAIClip(len(tiny_tokenizer), TINY_CONTEXT, quick_gelu=True).save_archive(str(tmp_path / "clip.pt"))
    return tmp_path / "clip.pt"


def test_converting(checkpoint: Path, tiny_clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "clip"
    assert main("convert", checkpoint, "--out", out) == 2
    line = capsys.readouterr().err
    assert "lacks tokenizer.json" in line
    assert "openai/clip-vit-base-patch32" in line
    assert main("convert", checkpoint, "--tokenizer", tiny_clip_folder, "--out", out) == 0
    line = capsys.readouterr().out
    assert "image tower 3 layers x 128, 2 heads; text tower 2 layers x 64, 1 heads; patches of 8 in 32 x 32" in line
    assert "quick_gelu" in line
    gelu = ("--activation", "gelu", "--tokenizer", tiny_clip_folder, "--out", tmp_path / "gelu")
    assert main("convert", checkpoint, *gelu) == 0
    assert load_clip(tmp_path / "gelu").config.vision_config.hidden_act == "gelu"
    assert main("convert", checkpoint, "--out", out) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_converting_a_resnet(tiny_tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture):
    clip = OpenAIClip(len(tiny_tokenizer), TINY_CONTEXT, quick_gelu=True, resnet=True)
    torch.save(clip.state_dict(), tmp_path / "RN50.pt")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert main("convert", tmp_path / "RN50.pt", "--out", tmp_path / "clip") == 0
    line = capsys.readouterr().out
    assert "image tower ResNet with [2, 1, 2, 3] blocks, 4 wide; text tower 2 layers x 64, 1 heads" in line
    assert "patches of 16 in 96 x 96 pixels; joint space 48; quick_gelu" in line
    assert load_backbone(tmp_path / "clip").config.model_type == "clip_resnet"


def test_training_on_a_checkpoint(
    checkpoint: Path, tiny_tokenizer, micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The weights of a run on the file equal those of a run on its conversion."""
    tiny_tokenizer.save_pretrained(tmp_path)
    assert main("convert", checkpoint, "--out", tmp_path / "clip") == 0
    once = ("--training.epochs", 1)
    for backbone, out in ((checkpoint, "a"), (tmp_path / "clip", "b")):
        assert main("train", *micro, "--model.backbone", backbone, *once, "--training.out", tmp_path / out) == 0
    assert capsys.readouterr().out.count(f"{checkpoint} is converted to transformers' format, with quick_gelu") == 1
    a, b = ((tmp_path / out / "last" / "model.safetensors").read_bytes() for out in "ab")
    assert a == b


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "train"])
def test_the_hint(command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Where a trained model is expected, the error names what such a file is for."""
    photo(tmp_path / "a.png")
    options = {
        "predict": ("--model", checkpoint, "--image", tmp_path / "a.png", "--text", "red"),
        "evaluate": ("--model", checkpoint, "--data", "scenes", "--split", "val", "--out", tmp_path / "out"),
        "export": ("--model", checkpoint, "--out", tmp_path / "out"),
        "train": ("--model.weights", checkpoint, "--training.out", tmp_path / "out"),
    }
    assert main(command, *options[command]) == 2
    line = capsys.readouterr().err.strip()
    assert f"--model.backbone {checkpoint}" in line
    assert "cmmasksd convert" in line
    assert "\n" not in line


def test_pickled_code(tmp_path: Path, tiny_tokenizer, capsys: pytest.CaptureFixture):
    tiny_tokenizer.save_pretrained(tmp_path)
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    assert main("convert", tmp_path / "module.pt", "--out", tmp_path / "out") == 2
    assert "more than tensors" in capsys.readouterr().err
