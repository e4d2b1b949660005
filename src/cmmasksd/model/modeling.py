"""CMMaskSDModel: the towers of a dual encoder, the fusion decoder and the mask head. The forward pass is one screen.

Encode once, decode per expression: `encode_image` and `encode_text` are apart, so K expressions on one image cost one
image encoding. The masked branches of CM-MaskSD exist only while training and are not here (see
`cmmasksd.distillation`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from cmmasksd.errors import UserError
from cmmasksd.model.configuration import CMMaskSDConfig, read_config
from cmmasksd.model.decoder import FusionDecoder
from cmmasksd.model.initialisation import init_decoder, init_layer
from cmmasksd.model.loading import build, load_backbone, read_weights
from cmmasksd.model.locating import WEIGHTS, model_folder, require
from cmmasksd.model.mask_head import MaskHead
from cmmasksd.model.tokenizing import load_tokenizer
from cmmasksd.model.towers.base import EncoderSizes, ImageFeatures, TextFeatures, Tokens
from cmmasksd.model.towers.families import FAMILIES


@dataclass
class CMMaskSDOutput(ModelOutput):
    """logits: (K, 4h, 4w) for K expressions and a patch grid of h x w."""

    logits: Tensor | None = None


class Decoder(nn.Module):
    """Fusion decoder and mask head: all of the network that is not the dual encoder."""

    def __init__(self, sizes: EncoderSizes, config: CMMaskSDConfig) -> None:
        super().__init__()
        self.local = sum(channels for channels, cells in sizes.scales if cells == 1)  # the last of `pixels`
        self.fusion = FusionDecoder(
            sizes.joint_width,
            sizes.embedding_width,
            width=config.decoder_width,
            layers=config.decoder_layers,
            heads=config.decoder_heads,
            mlp=config.decoder_mlp,
            dropout=config.dropout,
            local=self.local,
        )
        self.head = MaskHead(sizes.joint_width, config.decoder_width, width=config.head_width, scales=sizes.scales)

    def forward(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Features of K images and K sentences to logits (K, 4h, 4w)."""
        assert text.embedded is not None  # `encode_text` and `encode_image` give them
        assert image.pixels is not None
        fused = self.fusion(
            patches=image.patches,
            words=text.words,
            embedded=text.embedded,
            sentence=text.sentence,
            word_mask=text.word_mask,
            grid=image.grid,
            local=image.pixels[..., -self.local :] if self.local else None,
            hidden=image.hidden,
            whole=image.whole,
        )
        return self.head(fused=fused, pixels=image.pixels, sentence=text.sentence, grid=image.grid)


class CMMaskSDModel(PreTrainedModel):
    """Referring image segmentation on a dual encoder.

    Args:
        config: sizes; the weights are fresh. See `from_backbone` and `from_pretrained` for trained ones.
    """

    config_class = CMMaskSDConfig
    base_model_prefix = "cmmasksd"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    image_features = ("patches", "pixels")
    text_features = ("words", "sentence", "embedded")
    decoder_inputs = (*image_features, *text_features, "word_mask")

    config: CMMaskSDConfig

    def __init__(self, config: CMMaskSDConfig) -> None:
        super().__init__(config)
        family = FAMILIES[config.family]
        network: Any = family.network
        self.add_module(config.family, network._from_config(config.backbone))
        self.towers = family.towers(self.backbone)  # shares its modules; no entry of its own in the state_dict
        self.decoder = Decoder(config.encoder, config)
        self.post_init()
        init_decoder(self.decoder.fusion, self.decoder.head)

    def _init_weights(self, module: nn.Module) -> None:
        init_layer(module)

    @property
    def backbone(self) -> Any:
        """The network of transformers that the towers are views of: `clip` in a model on CLIP."""
        return getattr(self, self.config.family)

    @property
    def stride(self) -> float:
        """Pixels of the input per logit."""
        return self.config.encoder.patch_size / 4

    @property
    def patch_width(self) -> int:
        """Width of `ImageFeatures.patches`."""
        return self.config.encoder.joint_width

    def encode_image(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> ImageFeatures:
        """(B, 3, H, W) normalised pixels to patches in the joint space: see `ImageTower`."""
        return self.towers.image(pixel_values, keep=keep, value_path=value_path)[0]

    def encode_text(self, tokens: Tokens) -> TextFeatures:
        """Sentences to words and sentence in the joint space."""
        return self.towers.text(tokens)

    def decode(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Features of K images and K sentences (pair by pair) to logits (K, 4h, 4w). `ImageFeatures.select` repeats
        one image for its sentences."""
        return self.decoder(image, text)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        word_ids: Tensor,
        image_index: Tensor | None = None,
    ) -> CMMaskSDOutput:
        """Segment.

        Args:
            pixel_values: (B, 3, H, W), H and W multiples of the patch size.
            input_ids, attention_mask, word_ids: (K, L), see `Tokens`.
            image_index: (K,) int64, the image of each sentence. None: sentence k goes with image k, or all with the
                only one.

        Returns:
            logits (K, H / stride, W / stride).
        """
        tokens = Tokens(input_ids, attention_mask, word_ids, torch.zeros_like(input_ids[:, 0], dtype=torch.bool))
        image = self.encode_image(pixel_values)
        if image_index is None and len(image) == 1:
            image_index = input_ids.new_zeros(len(tokens))
        if image_index is not None:
            image = image.select(image_index)
        return CMMaskSDOutput(logits=self.decode(image, self.encode_text(tokens)))

    # -- weights

    def copy_decoder(self) -> nn.Module:
        """An independent decoder with the same weights, called like `decode`: distillation with separate weights."""
        return copy.deepcopy(self.decoder)

    def freeze_unused(self) -> None:
        """Exclude from training what no mask depends on, such as the temperature of contrastive training."""
        for name in FAMILIES[self.config.family].unused:
            self.backbone.get_parameter(name).requires_grad_(False)

    @classmethod
    def from_backbone(cls, name: str | Path, **sizes: Any) -> CMMaskSDModel:
        """A new model on a trained dual encoder.

        Args:
            name: a folder or hub id in transformers' format, such as "openai/clip-vit-base-patch16" (`FAMILIES` has the
                known ones), a CLIP of OpenAI or open_clip (a file, or hf-hub:USER/NAME), or "tiny".
            **sizes: fields of CMMaskSDConfig.

        Raises:
            UserError: there is no backbone of a known family, or its weights do not fit its configuration.
        """
        backbone = load_backbone(name)
        config: Any = backbone.config
        if config.model_type == "siglip":  # a config.json of SigLIP 2 has SigLIP's padding token
            config.text_config.pad_token_id = load_tokenizer(name).pad_token_id
        config._name_or_path = ""  # it would be saved, and may be a path of this machine
        model = cls(CMMaskSDConfig(**{f"{config.model_type}_config": config}, **sizes))
        model.backbone.load_state_dict(backbone.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> CMMaskSDModel:  # pyright: ignore
        """As in transformers, but missing, unexpected, misshapen or non-finite weights stop the load, and only
        config.json and model.safetensors of the folder are read."""
        kwargs.setdefault("dtype", torch.float32)
        hub = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        folder = model_folder(name, **{key: kwargs.pop(key) for key in hub if kwargs.get(key) is not None})
        require(folder, ("config.json", WEIGHTS))
        sizes = {key: kwargs.pop(key) for key in CMMaskSDConfig.__annotations__ if key in kwargs}
        config = kwargs.pop("config", None) or read_config(folder, **sizes)
        return build(cls, super().from_pretrained, config, read_weights(folder / WEIGHTS), folder, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:  # pyright: ignore
        """Refused: transformers would upload the weights without the processor and without a card.

        Raises:
            UserError: always; it names `cmmasksd.push_to_hub`.
        """
        raise UserError(
            "a model is uploaded with its processor and a generated card: use cmmasksd.push_to_hub(model, processor, "
            "repo_id)"
        )
