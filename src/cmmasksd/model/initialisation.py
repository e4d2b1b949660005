"""Fresh weights of the decoder and the mask head."""

from __future__ import annotations

import torch
from torch import nn

from cmmasksd.model.decoder import Attention, FusionDecoder
from cmmasksd.model.mask_head import MaskHead


@torch.no_grad()
def init_layer(layer: nn.Module) -> None:
    """Initialise one layer by itself."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    elif isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        nn.init.ones_(layer.weight)
    if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_decoder(fusion: FusionDecoder, head: MaskHead) -> None:
    """Initialise what depends on more than one layer, once every layer has been initialised by itself."""
    # one kernel for all sentences, and masks that are rare
    nn.init.normal_(head.kernel.weight, std=0.1 * head.kernel.in_features**-0.5)
    nn.init.normal_(head.kernel.bias)
    nn.init.constant_(head.kernel.bias[-1:], -2.0)
    # patches and words lie in one space: attention begins as their similarity
    fusion.word_in.weight.copy_(fusion.patch_in.weight)
    fusion.sentence_in.weight.copy_(fusion.patch_in.weight)
    for module in fusion.modules():
        if isinstance(module, Attention):
            module.key_value.weight[: module.query.out_features].copy_(module.query.weight)
