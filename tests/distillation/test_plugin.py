"""The objective trains a network that is not ours: transformers' CLIPSeg.

Its decoder reads three blocks of the image tower and its class token; no word ever reaches it, only the sentence.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.model.towers.base import Tokens
from cmmasksd.model.towers.clipseg import CLIPSegForImageSegmentation
from cmmasksd.model.trained import load_trained


@pytest.fixture
def network(tiny_clipseg_folder: Path) -> CLIPSegForImageSegmentation:
    torch.manual_seed(0)
    network: CLIPSegForImageSegmentation = load_trained(tiny_clipseg_folder)[0]
    network.decoder.init_weights()
    network.freeze_unused()
    return network.train()


def objective_for(network: CLIPSegForImageSegmentation, **settings: object) -> MaskedSelfDistillation:
    return MaskedSelfDistillation(network, DistillationConfig(**settings), network.patch_width)


@pytest.fixture
def batch(tiny_processor) -> tuple[Tensor, Tokens, Tensor]:
    """Two images of a bright square, and where it is."""
    images, masks = 0.3 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 32, 32)
    for row, (top, left) in enumerate(((0, 8), (16, 0))):
        masks[row, top : top + 16, left : left + 16] = 1
    images += 2 * masks[:, None]
    return images, tiny_processor.tokens(["the red square", "the square on the left"]), masks


def test_it_trains_and_its_loss_falls(network, batch):
    objective = objective_for(network)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    start, optimizer = objective.mask_token.detach().clone(), torch.optim.AdamW(trained, lr=3e-3)
    history = []
    for _ in range(30):
        losses = objective(*batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert history[0].keys() == {"loss", "seg", "lmvsd", "vmlsd"}
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["seg"] < 0.7 * history[0]["seg"]
    assert max(step["lmvsd"] for step in history) > 1e-4  # the branches have something to learn
    assert max(step["vmlsd"] for step in history) > 1e-6
    assert not torch.equal(objective.mask_token, start)
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in network.clip.parameters())


@pytest.mark.parametrize(
    "settings",
    [{}, {"vision": False}, {"language": False}, {"language_level": "feature"}, {"vision_guide": "sentence"}],
)
def test_its_main_branch_is_untouched(network, batch, settings):
    """The seg loss is that of CLIPSeg alone, whatever branches run beside it in the batched call."""
    network.eval()
    plain = objective_for(network, vision=False, language=False)(*batch)
    losses = objective_for(network, **settings)(*batch)
    assert losses["seg"].item() == pytest.approx(plain["seg"].item(), rel=1e-5)
    assert losses["loss"] > plain["loss"]
