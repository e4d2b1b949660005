"""The rate of every parameter group at every stage (a peer's CLIP trained ten times too fast), and what is decayed."""

import itertools

import pytest
import torch

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.training.optim import parameter_groups, rate_scale, set_rates

HOW = {"lr": 1e-3, "clip_lr_scale": 0.1, "weight_decay": 0.05}


@pytest.fixture(scope="module")
def objective():
    model = CMMaskSDModel.from_backbone(
        "tiny", decoder_width=32, decoder_layers=1, decoder_heads=2, decoder_mlp=32, head_width=16
    )
    model.clip.logit_scale.requires_grad_(False)
    return MaskedSelfDistillation(model, DistillationConfig(share_weights=False), model.config.encoder.joint_width)


def test_every_trainable_parameter_is_in_exactly_one_group(objective):
    grouped = [p for group in parameter_groups(objective, **HOW) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in objective.parameters() if p.requires_grad}
    assert all(p is not objective.model.clip.logit_scale for p in grouped)


def test_what_is_decayed(objective):
    groups = parameter_groups(objective, **HOW)
    assert sorted(group["name"] for group in groups) == ["clip", "clip_no_decay", "new", "new_no_decay"]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.Embedding)
    for module in objective.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            plain = isinstance(module, norms) or name == "bias" or parameter.ndim == 1
            if isinstance(module, torch.nn.Linear | torch.nn.MultiheadAttention | torch.nn.Conv2d) and not plain:
                embeds = parameter is objective.model.clip.vision_model.embeddings.patch_embedding.weight
                assert decay[id(parameter)] == (0.0 if embeds else 0.05), name
            elif plain:
                assert decay[id(parameter)] == 0.0, name
    assert decay[id(objective.mask_token)] == 0.0
    assert decay[id(objective.model.clip.vision_model.embeddings.class_embedding)] == 0.0
    assert decay[id(objective.model.clip.text_model.embeddings.token_embedding.weight)] == 0.0


def test_clip_trains_at_its_fraction_at_every_stage(objective):
    groups = parameter_groups(objective, **HOW)
    clip = {id(p) for p in objective.model.clip.parameters()}
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    total, warmup = 101, 11
    expected = {0: 1 / 11, 10: 1.0, 11: 1.0, 55: 0.505 + 0.495 * 0.01745, 100: 0.01}
    for update, scale in expected.items():
        set_rates(optimizer, rate_scale(update, total, warmup=warmup, final=0.01))
        for group in optimizer.param_groups:
            backbone = {id(p) in clip for p in group["params"]}
            assert len(backbone) == 1
            peak = 1e-4 if backbone.pop() else 1e-3
            assert group["lr"] == pytest.approx(peak * scale, rel=1e-3), (group["name"], update)


def test_groups_carry_their_own_rate_before_the_first_update(objective):
    optimizer = torch.optim.AdamW(parameter_groups(objective, **HOW), lr=1e-3)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"clip": 1e-4, "clip_no_decay": 1e-4, "new": 1e-3, "new_no_decay": 1e-3}
    )


def test_the_backbone_alone_is_told_from_the_rest():
    module = torch.nn.ModuleDict({"clip": torch.nn.Linear(2, 2), "clipped": torch.nn.Linear(2, 2)})
    peaks = {group["name"]: group["peak_lr"] for group in parameter_groups(module, **HOW)}
    assert peaks == pytest.approx({"clip": 1e-4, "clip_no_decay": 1e-4, "new": 1e-3, "new_no_decay": 1e-3})


def test_schedule_rises_then_falls_to_its_end():
    scales = [rate_scale(update, 60, warmup=10, final=0.2) for update in range(60)]
    assert scales[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert scales[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(scales[10:]))
    assert scales[-1] == pytest.approx(0.2)
    assert rate_scale(10 + 49 // 2, 60, warmup=10, final=0.2) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 5), (3, 3), (2, 1)])
def test_schedule_of_very_short_runs(total, warmup):
    scales = [rate_scale(update, total, warmup=warmup, final=0.01) for update in range(total)]
    assert all(0 < scale <= 1 for scale in scales)
