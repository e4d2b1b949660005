"""CMMaskSDConfig: the sizes of the network, in transformers' conventions. It nests the CLIPConfig of the backbone.

Nothing of the distillation is here: the masked branches are a matter of training, so a saved model carries no trace of
them.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPConfig, PreTrainedConfig

from cmmasksd.errors import UserError


class CMMaskSDConfig(PreTrainedConfig):
    """Sizes of a CMMaskSDModel.

    Args:
        clip_config: of the backbone.
        decoder_width: channels of the fusion decoder.
        decoder_layers: of the fusion decoder, 3 as in CRIS and ETRIS.
        decoder_heads: attention heads; must divide the width.
        decoder_mlp: hidden channels of the decoder's MLP.
        head_width: channels of the mask head at twice the patch grid, a multiple of 16; half as many at four times.
        dropout: in the decoder, while training.

    Raises:
        UserError: for sizes that do not fit together.
    """

    model_type = "cmmasksd"
    sub_configs = {"clip_config": CLIPConfig}  # noqa: RUF012 (transformers' convention)  # pyright: ignore

    clip_config: Any = None
    decoder_width: int = 512
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_mlp: int = 1024
    head_width: int = 256
    dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.clip_config is None:
            self.clip_config = CLIPConfig()
        elif isinstance(self.clip_config, dict):
            self.clip_config = CLIPConfig(**self.clip_config)
        for name in ("decoder_width", "decoder_layers", "decoder_heads", "decoder_mlp", "head_width"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)!r}: it must be a whole number of at least 1")
        if self.decoder_width % self.decoder_heads:
            raise UserError(
                f"decoder_width {self.decoder_width} cannot be split among {self.decoder_heads} heads: "
                f"change decoder_width or decoder_heads"
            )
        if self.head_width % 16:
            raise UserError(
                f"head_width {self.head_width} is not a multiple of 16: use {max(16, self.head_width // 16 * 16)}"
            )
        super().__post_init__(**kwargs)
