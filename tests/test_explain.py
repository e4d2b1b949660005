"""Explaining: what is drawn is what the objective does, and folders that cannot be explained say why."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.explain import HIDDEN, Explanation, explain, load_objective
from cmmasksd.training.checkpoint import WEIGHTS, save_model

DIM = 40  # the tiny model's joint space
TEXTS = ["the reddish square on the left", "circle"]


def image(height=48, width=90):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def build(model, **how):
    torch.manual_seed(0)
    return MaskedSelfDistillation(model, DistillationConfig(**how), DIM).eval()


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path):
    """A model as training leaves it."""
    objective = build(tiny_model, vision_ratio=0.4)
    config = json.dumps({"distillation": {"vision_ratio": 0.4}})
    save_model(tmp_path / "best", tiny_model, tiny_processor, config, masked=objective.own_weights())
    return tmp_path / "best"


def test_what_is_shown_is_what_the_objective_does(tiny_model, tiny_processor):
    objective = build(tiny_model, vision_ratio=0.4)
    first, second = explain(objective, tiny_processor, image(), TEXTS)
    canvas, placement = tiny_processor.image(image())
    tokens = tiny_processor.tokens(TEXTS)
    views = objective.views(tiny_processor.pixel_values(canvas[None]), tokens, torch.zeros(2, dtype=torch.long))
    logits = objective.decode(views)
    assert [first.text, second.text] == TEXTS
    assert np.array_equal(first.image, canvas.permute(1, 2, 0).numpy())
    assert np.array_equal(second.hidden_patches.ravel(), views.hidden_patches[1].numpy())
    assert first.hidden_patches.sum() == round(0.4 * first.hidden_patches.size)
    # the best-matched patches are those that are hidden by default
    assert first.correlation[first.hidden_patches].min() >= first.correlation[~first.hidden_patches].max()
    assert first.probabilities.keys() == {"main", "lmvsd", "vmlsd"}
    for name, maps in logits.items():
        assert first.probabilities[name].shape == placement.canvas
        assert first.probabilities[name].mean() == pytest.approx(maps[0].sigmoid().mean().item(), abs=0.02)
    assert [word for word, _ in first.words] == TEXTS[0].split()
    assert [hidden for _, hidden in first.words].count(True) == 2  # of six words
    assert [hidden for _, hidden in second.words] == [False]


@pytest.mark.parametrize(
    ("how", "branches"),
    [
        ({"vision": False}, {"main", "vmlsd"}),
        ({"language": False}, {"main", "lmvsd"}),
        ({"joint": True, "vision_level": "blank"}, {"main", "joint"}),
        ({"share_weights": False}, {"main", "lmvsd", "vmlsd"}),
    ],
)
def test_every_choice_of_branches(tiny_model, tiny_processor, how, branches):
    (found,) = explain(build(tiny_model, **how), tiny_processor, image(), TEXTS[:1])
    assert found.probabilities.keys() == branches
    assert (found.hidden_patches is None) == (how.get("vision") is False)
    assert found.figure().width > 300


def test_the_picture_shows_every_panel(tiny_model, tiny_processor):
    found = explain(build(tiny_model), tiny_processor, image(), TEXTS)[0]
    page = np.asarray(found.figure())
    assert page.shape[1] > 6 * 120
    narrow = Explanation(
        found.text, found.words, found.image, found.correlation, None, {"main": found.probabilities["main"]}
    )
    assert np.asarray(narrow.figure()).shape[1] < page.shape[1]
    assert HIDDEN in " ".join(HIDDEN if hidden else word for word, hidden in found.words)


def test_a_saved_model_explains_as_the_one_that_was_trained(folder, tiny_model, tiny_processor):
    trained, loaded = build(tiny_model, vision_ratio=0.4), load_objective(folder, tiny_model)
    assert loaded.settings.vision_ratio == 0.4
    assert torch.equal(loaded.mask_token, trained.mask_token)
    (a,), (b,) = (explain(objective, tiny_processor, image(), TEXTS[:1]) for objective in (trained, loaded))
    assert all(np.array_equal(a.probabilities[name], b.probabilities[name]) for name in a.probabilities)


def test_folders_that_cannot_be_explained(folder, tiny_model, tmp_path):
    def damaged(name):
        return shutil.copytree(folder, tmp_path / name)

    with pytest.raises(UserError, match=r"there is no .*config\.yaml: give a folder that training wrote"):
        load_objective(tmp_path, tiny_model)
    plain = damaged("plain")
    (plain / "config.yaml").write_text("distillation: {vision: false, language: false}")
    (plain / WEIGHTS).unlink()
    with pytest.raises(UserError, match="trained without masked branches"):
        load_objective(plain, tiny_model)
    unknown = damaged("unknown")
    (unknown / "config.yaml").write_text("distillation: {visoin: false}")
    with pytest.raises(UserError, match="visoin"):
        load_objective(unknown, tiny_model)
    for text in ("[", "other: 1", "7", "\xff"):
        (unknown / "config.yaml").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="cannot be read"):
            load_objective(unknown, tiny_model)
    missing = damaged("missing")
    (missing / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"does not fit its config\.yaml: .*mask_token"):
        load_objective(missing, tiny_model)
    wrong = damaged("wrong")
    save_file({"mask_token": torch.zeros(3)}, wrong / WEIGHTS)
    with pytest.raises(UserError, match=r"cannot be read .*size mismatch"):
        load_objective(wrong, tiny_model)
    (wrong / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        load_objective(wrong, tiny_model)


def test_a_plain_run_leaves_no_weights_of_masked_branches(tiny_model, tiny_processor, tmp_path):
    objective = build(tiny_model, vision=False, language=False)
    assert objective.own_weights() == {}
    save_model(tmp_path / "plain", tiny_model, tiny_processor, "{}", masked=objective.own_weights())
    assert not (tmp_path / "plain" / WEIGHTS).exists()
    assert set(build(tiny_model).own_weights()) == {"mask_token"}


def test_the_weights_are_small_and_tensors_only(folder):
    weights = load_file(folder / WEIGHTS)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {"mask_token": (DIM,)}
