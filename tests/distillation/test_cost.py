"""What the method costs at its real size, ViT-B/16 at 480 x 480: counted on shapes alone, nothing is computed.

The budget: decoder and head at most 34 GFLOP (2 per multiply-add), a training step with both branches at most 1.35
plain steps, the added parameters negligible. CRIS's head would break the first two.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.model.configuration import CMMaskSDConfig
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.towers.base import Tokens

LENGTH = 22


@pytest.fixture(scope="module")
def model() -> CMMaskSDModel:
    with torch.device("meta"):
        clip = CLIPConfig(vision_config={"patch_size": 16})  # the rest of the defaults are ViT-B's
        model = CMMaskSDModel(
            CMMaskSDConfig(clip_config=clip, decoder_width=512, decoder_heads=8, decoder_mlp=1024, head_width=256)
        )
    # transformers asks of the padding's values before it chooses the fused kernel, and there are none here
    model.clip.text_model.config._attn_implementation = "eager"
    return model


@pytest.fixture(autouse=True)
def _meta(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: nullcontext())  # which the meta device lacks
    with torch.device("meta"):
        yield


def sentences(count: int = 1) -> Tokens:
    ids = torch.zeros(count, LENGTH, dtype=torch.int64)
    return Tokens(ids, ids, ids, ids[:, 0].bool())


def gflop(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def test_it_is_vit_b_16(model):
    assert sum(p.numel() for p in model.clip.parameters()) == pytest.approx(149.6e6, rel=0.01)
    assert model.encode_image(torch.empty(1, 3, 480, 480)).patches.shape == (1, 900, 512)
    assert model.stride == 4


def test_forward_pass(model):
    image, text = model.encode_image(torch.empty(1, 3, 480, 480)), model.encode_text(sentences())
    assert gflop(lambda: model.encode_image(torch.empty(1, 3, 480, 480))) == pytest.approx(184.7, abs=1)
    assert gflop(lambda: model.encode_text(sentences())) < 2
    decode = gflop(lambda: model.decode(image, text))
    assert 25 < decode <= 34
    # eight sentences of one image: the text and the decoder eight times, the image once
    tokens = sentences(8)
    eight = gflop(lambda: model(torch.empty(1, 3, 480, 480), tokens.input_ids, tokens.attention_mask, tokens.word_ids))
    assert eight == pytest.approx(185 + 8 * (decode + 1.7), rel=0.01)


def step(model: CMMaskSDModel, **settings: object) -> float:
    """GFLOP of a forward and a backward pass."""
    objective = MaskedSelfDistillation(model, DistillationConfig(**settings), 512)
    inputs = torch.empty(1, 3, 480, 480), sentences(), torch.empty(1, 120, 120)
    return gflop(lambda: objective(*inputs)["loss"].backward())


def test_training_step(model):
    plain = step(model, vision=False, language=False)
    assert 1.15 < step(model) / plain <= 1.35
    assert step(model, vision=False) / plain < 1.2
    assert step(model, language=False) / plain < 1.2
    # dropping patches pays a second pass of the encoder, over the half of the patches that stays
    assert 1.5 < step(model, vision_level="input") / plain < 1.8


def test_added_parameters_are_negligible(model):
    own = sum(p.numel() for p in model.parameters())
    for settings in ({}, {"vision_level": "input", "correlation": "values"}):
        objective = MaskedSelfDistillation(model, DistillationConfig(**settings), 512)
        added = sum(p.numel() for p in objective.parameters()) - own
        assert 0 < added < 0.001 * own
