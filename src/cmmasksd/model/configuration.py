"""CMMaskSDConfig: the sizes of the network, in transformers' conventions. It nests the backbone's configuration.

Nothing of the distillation is here: the masked branches are a matter of training, so a saved model carries no trace of
them.

A config.json may be a stranger's. Only the sizes named here are taken from it, each within bounds, before anything is
built; whatever else transformers would act on (attention kernels or quantisers to fetch, code to run) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, PreTrainedConfig, SiglipConfig

from cmmasksd.config import ModelConfig
from cmmasksd.errors import UserError, shown
from cmmasksd.model.locating import MODEL_TYPE, read_json
from cmmasksd.model.towers.base import EncoderSizes
from cmmasksd.model.towers.bounds import bounded
from cmmasksd.model.towers.families import FAMILIES, NETWORKS
from cmmasksd.model.towers.lite import LiteConfig
from cmmasksd.model.towers.resnet import CLIPResNetConfig

_OURS = {
    "decoder_width": (1, 8192),
    "decoder_layers": (1, 128),
    "decoder_heads": (1, 256),
    "decoder_mlp": (1, 65_536),
    "head_width": (1, 8192),
    "dropout": (0.0, 0.999),
}


class CMMaskSDConfig(PreTrainedConfig):
    """Sizes of a CMMaskSDModel.

    Args:
        clip_config, siglip_config, lite_config, clip_resnet_config: configuration of the backbone, under the name of
            its family. All None: a CLIPConfig.
        decoder_width, decoder_layers, decoder_heads, decoder_mlp, head_width, dropout: see `ModelConfig`.

    Raises:
        UserError: for sizes that are out of bounds or do not fit together.
    """

    model_type = MODEL_TYPE
    sub_configs = {  # noqa: RUF012 (transformers' convention)  # pyright: ignore
        "clip_config": CLIPConfig,
        "siglip_config": SiglipConfig,
        "lite_config": LiteConfig,
        "clip_resnet_config": CLIPResNetConfig,
    }

    clip_config: Any = None
    siglip_config: Any = None
    lite_config: Any = None
    clip_resnet_config: Any = None
    decoder_width: int = ModelConfig.decoder_width
    decoder_layers: int = ModelConfig.decoder_layers
    decoder_heads: int = ModelConfig.decoder_heads
    decoder_mlp: int = ModelConfig.decoder_mlp
    head_width: int = ModelConfig.head_width
    dropout: float = ModelConfig.dropout

    def __post_init__(self, **kwargs: Any) -> None:
        bounded(vars(self), _OURS)
        if self.decoder_width % self.decoder_heads:
            raise UserError(
                f"decoder_width {self.decoder_width} cannot be split among {self.decoder_heads} heads: "
                f"change decoder_width or decoder_heads"
            )
        if self.head_width % 16:
            raise UserError(
                f"head_width {self.head_width} is not a multiple of 16: use {max(16, self.head_width // 16 * 16)}"
            )
        given = [name for name in FAMILIES if getattr(self, f"{name}_config") is not None]
        if len(given) > 1:
            raise UserError(f"the backbone is both {' and '.join(given)}: expected one of them")
        if not given:
            self.clip_config = CLIPConfig()
        elif not isinstance(self.backbone, PreTrainedConfig):
            setattr(self, f"{self.family}_config", FAMILIES[self.family].config(self.backbone))
        super().__post_init__(**kwargs)

    @property
    def family(self) -> str:
        """Name of the backbone's family, see `FAMILIES`."""
        return next(name for name in FAMILIES if getattr(self, f"{name}_config") is not None)

    @property
    def backbone(self) -> Any:
        """The backbone's own configuration."""
        return getattr(self, f"{self.family}_config")

    @property
    def encoder(self) -> EncoderSizes:
        """Sizes of the dual encoder, whatever its family."""
        return FAMILIES[self.family].sizes(self.backbone)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json's content, from which only the sizes are taken."""
        known = (*_OURS, *(f"{name}_config" for name in FAMILIES))
        return super().from_dict({key: config_dict[key] for key in known if key in config_dict}, **kwargs)


def read_config(folder: Path, **sizes: Any) -> CMMaskSDConfig:
    """The configuration of a trained model in a folder; `sizes` override the file's.

    Raises:
        UserError: config.json is of another kind of model, or a size is out of bounds.
    """
    content = _of_type(folder, (MODEL_TYPE,), f"a '{MODEL_TYPE}': give the folder or hub id of a trained model")
    return _in_file(folder, lambda: CMMaskSDConfig.from_dict(content | sizes))


def read_backbone_config(folder: Path, families: Container[str] = FAMILIES) -> PreTrainedConfig:
    """The configuration of a network in transformers' format.

    Args:
        folder: its folder.
        families: those of NETWORKS to accept.

    Raises:
        UserError: config.json is of another kind of model, or a size is out of bounds.
    """
    names = " or ".join(family.label for name, family in NETWORKS.items() if name in families)
    remedy = "choose a backbone in transformers' format, or name one in open_clip's hf-hub:USER/NAME"
    content = _of_type(folder, families, f"{names}: {remedy}")
    return _in_file(folder, lambda: NETWORKS[content["model_type"]].config(content))


def _of_type(folder: Path, known: Container[str], expected: str) -> dict[str, Any]:
    """The content of config.json, checked before any weight is read, so that a wrong folder gives one short error."""
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{folder} is a {shown(kind)} model, not {expected}")
    return content


def _in_file(folder: Path, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
