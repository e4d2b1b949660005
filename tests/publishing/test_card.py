"""The model card: what the hub reads of it, and its text."""

import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from cmmasksd.errors import UserError
from cmmasksd.evaluation.results import read_results
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.publishing.card import model_card

MANY_SCORES = "| refcoco | val | 3 | 64.58 | 60.00 | 66.67 | 66.67 | 66.67 | 33.33 | 0.00 |"


def test_the_card_is_one_that_the_hub_reads(trained: Path, scored: Path):
    data = ModelCard(model_card(trained, "someone/cats", [read_results(scored)])).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "cmmasksd", "image-segmentation")
    assert data.model_name == "cats"
    assert data.eval_results is not None
    scores = {result.metric_type: result for result in data.eval_results}
    assert scores["oIoU"].metric_value == pytest.approx(100 * 93 / 144, abs=0.005)
    assert scores["mIoU"].metric_value == pytest.approx(100 * (0.8 + 0.25 + 0.75) / 3, abs=0.005)
    assert scores["P@0.7"].metric_value == pytest.approx(66.67)
    assert (scores["oIoU"].dataset_name, scores["oIoU"].dataset_split) == ("refcoco val", "val")
    assert scores["oIoU"].dataset_args is not None
    assert scores["oIoU"].dataset_args["threshold"] == 0.5


def test_the_text(trained: Path, scored: Path):
    """Every value in its place, and no gap where a template found none."""
    result = read_results(scored)
    strict = result | {"split": "testA", "protocol": result["protocol"] | {"threshold": 0.6}}
    text = ModelCard(model_card(trained, "cats", [result, strict], licence="cc-by-4.0")).text
    weights = sum(p.numel() for p in CMMaskSDModel.from_pretrained(trained).parameters())
    assert text.startswith("\n# cats\n\nReferring image segmentation: ")
    assert 'Segmenter.from_pretrained("cats")\n' in text
    assert f"|---|---|---|---|---|---|---|---|---|---|\n{MANY_SCORES}\n{MANY_SCORES.replace('val', 'testA')}\n" in text
    rules = "comparison >=, frame original, empty_iou 1.0, expressions all"
    assert f"\nScored under protocol original: threshold 0.5, {rules} (refcoco val).\n" in text
    assert f"\nScored under protocol original: threshold 0.6, {rules} (refcoco testA).\n" in text
    assert "\n\n`refcoco`, trained on `train`; the best checkpoint was chosen on `val`. " in text
    assert (
        "\n\n| | |\n|---|---|\n"
        f"| weights | {weights / 1e6:.1f} M, F32 |\n"
        "| input | 32×32 pixels (`warp`), at most 24 tokens |\n"
        "| CLIP | patches of 8 pixels, joint width 40 |\n"
        "| decoder | 2 layers of width 32 |\n"
        "| masked branches during training | LMVSD, loss `kl` |\n"
        "\nEvery setting is in `config.yaml`.\n"
    ) in text
    assert "\n- A sentence is cut after 24 tokens. " in text
    assert "generated scenes" not in text
    assert text.endswith(
        "\n\nThe weights: cc-by-4.0. CM-MaskSD is the work of its authors; cmmasksd is independent of them.\n"
    )
    assert "\n\n\n" not in text


def test_a_model_of_generated_scenes(trained: Path, scored: Path):
    data = {"name": "scenes+", "train_references": 1500, "scene_seed": 3, "val_split": "val"}
    (trained / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    text = ModelCard(model_card(trained, "cats", [read_results(scored)])).text
    assert "(style `scenes+`, 1500 references, seed 3); the best checkpoint was chosen on their `val`." in text
    assert "\nScores on generated scenes cannot be compared with published scores.\n\n## Data" in text
    assert "\n\n- It was trained on generated scenes of coloured shapes and does not work on photographs.\n- " in text


def test_a_card_without_scores_or_settings(tiny_model_folder: Path):
    card = model_card(tiny_model_folder, "x")
    assert "\n\nNone were given when this card was written.\n\n" in card
    assert "\n\nThe model's folder does not record it.\n\n" in card
    assert not any(absent in card for absent in ("model-index", "model_name", "config.yaml", "masked branches"))
    assert "\n\n\n" not in card


def test_one_split_by_two_protocols(trained: Path, scored: Path):
    result = read_results(scored)
    strict = result | {"protocol": result["protocol"] | {"threshold": 0.6}}
    with pytest.raises(UserError, match="refcoco val was scored by two protocols"):
        model_card(trained, "x", [result, strict])


@pytest.mark.parametrize("settings", ["[1]", "data: 3", "a: [", "\xff"])
def test_damaged_settings(settings: str, tiny_model_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "config.yaml").write_text(settings, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.yaml (holds no settings|cannot be read)"):
        model_card(folder, "x")
