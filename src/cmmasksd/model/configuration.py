"""CMMaskSDConfig: the sizes of the network, in transformers' conventions. It nests the CLIPConfig of the backbone.

Nothing of the distillation is here: the masked branches are a matter of training, so a saved model carries no trace of
them.

A config.json may be a stranger's. Only the sizes named here are taken from it, each within bounds, before anything is
built; whatever else transformers would act on (attention kernels or quantisers to fetch, code to run) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from cmmasksd.config import ModelConfig
from cmmasksd.errors import UserError, shown
from cmmasksd.model.locating import MODEL_TYPE, read_json
from cmmasksd.model.towers.base import EncoderSizes
from cmmasksd.model.towers.clip import encoder_sizes

# The largest public CLIPs have 48 layers of width 5,120 and 15,360 hidden channels.
_OURS = {
    "decoder_width": (1, 8192),
    "decoder_layers": (1, 128),
    "decoder_heads": (1, 256),
    "decoder_mlp": (1, 65_536),
    "head_width": (1, 8192),
    "dropout": (0.0, 0.999),
}
_CLIP = {"projection_dim": (1, 16_384), "logit_scale_init_value": (-100.0, 100.0), "initializer_factor": (0.0, 1e4)}
_TOWER = {
    "hidden_size": (1, 16_384),
    "intermediate_size": (1, 65_536),
    "num_hidden_layers": (1, 128),
    "num_attention_heads": (1, 256),
    "projection_dim": (1, 16_384),
    "layer_norm_eps": (1e-12, 0.1),
    "attention_dropout": (0.0, 0.999),
    "initializer_range": (0.0, 1e4),
    "initializer_factor": (0.0, 1e4),
}
_IDS = {f"{name}_token_id": (0, 1 << 20) for name in ("bos", "eos", "pad")}
_TEXT = _TOWER | _IDS | {"vocab_size": (1, 1 << 20), "max_position_embeddings": (3, 4096)}
_VISION = _TOWER | {"num_channels": (3, 3), "image_size": (1, 4096), "patch_size": (1, 1024)}
_MAY_BE_NULL = ("bos_token_id", "pad_token_id")  # neither is used
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")


class CMMaskSDConfig(PreTrainedConfig):
    """Sizes of a CMMaskSDModel.

    Args:
        clip_config: configuration of the backbone.
        decoder_width, decoder_layers, decoder_heads, decoder_mlp, head_width, dropout: see `ModelConfig`.

    Raises:
        UserError: for sizes that are out of bounds or do not fit together.
    """

    model_type = MODEL_TYPE
    sub_configs = {"clip_config": CLIPConfig}  # noqa: RUF012 (transformers' convention)  # pyright: ignore

    clip_config: Any = None
    decoder_width: int = ModelConfig.decoder_width
    decoder_layers: int = ModelConfig.decoder_layers
    decoder_heads: int = ModelConfig.decoder_heads
    decoder_mlp: int = ModelConfig.decoder_mlp
    head_width: int = ModelConfig.head_width
    dropout: float = ModelConfig.dropout

    def __post_init__(self, **kwargs: Any) -> None:
        _bounded(vars(self), _OURS, "")
        if self.decoder_width % self.decoder_heads:
            raise UserError(
                f"decoder_width {self.decoder_width} cannot be split among {self.decoder_heads} heads: "
                f"change decoder_width or decoder_heads"
            )
        if self.head_width % 16:
            raise UserError(
                f"head_width {self.head_width} is not a multiple of 16: use {max(16, self.head_width // 16 * 16)}"
            )
        if self.clip_config is None:
            self.clip_config = CLIPConfig()
        elif not isinstance(self.clip_config, CLIPConfig):
            self.clip_config = clip_config(self.clip_config)
        super().__post_init__(**kwargs)

    @property
    def encoder(self) -> EncoderSizes:
        """Sizes of the dual encoder, whatever its family."""
        return encoder_sizes(self.clip_config)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json's content, from which only the sizes are taken."""
        known = (*_OURS, "clip_config")
        return super().from_dict({key: config_dict[key] for key in known if key in config_dict}, **kwargs)


def read_config(folder: Path, **sizes: Any) -> CMMaskSDConfig:
    """The configuration of a trained model in a folder; `sizes` override the file's.

    Raises:
        UserError: config.json is of another kind of model, or a size is out of bounds.
    """
    content = _of_type(folder, MODEL_TYPE, f"a '{MODEL_TYPE}': give the folder or hub id of a trained model")
    return _in_file(folder, lambda: CMMaskSDConfig.from_dict(content | sizes))


def read_clip_config(folder: Path) -> CLIPConfig:
    """The configuration of a CLIP in a folder.

    Raises:
        UserError: config.json is not a CLIP's, or a size is out of bounds.
    """
    content = _of_type(
        folder,
        CLIPConfig.model_type,
        "a CLIP: choose a CLIP in transformers' format, or name one in open_clip's hf-hub:USER/NAME",
    )
    return _in_file(folder, lambda: clip_config(content))


def _of_type(folder: Path, model_type: str, expected: str) -> dict[str, Any]:
    """The content of config.json, checked before any weight is read, so that a wrong folder gives one short error."""
    content = read_json(folder / "config.json")
    if (kind := content.get("model_type")) != model_type:
        raise UserError(f"{folder} is a {shown(kind)} model, not {expected}")
    return content


def _in_file(folder: Path, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def clip_config(content: object) -> CLIPConfig:
    """A CLIPConfig from the content of a config.json.

    Raises:
        UserError: it is not a CLIP's, or a size is out of bounds.
    """
    clip = _section(content, "clip_config")
    sections: Any = (("text_config", CLIPTextConfig, _TEXT), ("vision_config", CLIPVisionConfig, _VISION))
    towers = {}
    for name, kind, bounds in sections:
        # the first CLIPs in transformers' format have a second section, which takes precedence
        tower = _section(clip.get(name), name) | _section(clip.get(f"{name}_dict"), f"{name}_dict")
        tower = {key: value for key, value in tower.items() if value is not None or key not in _MAY_BE_NULL}
        towers[name] = taken = _bounded(tower, bounds, f"{name}.")
        taken["hidden_act"] = tower.get("hidden_act", kind.hidden_act)
        if taken["hidden_act"] not in _ACTIVATIONS:
            raise UserError(f"{name}.hidden_act is {shown(taken['hidden_act'])}: expected {' or '.join(_ACTIVATIONS)}")
        width, heads = (taken.get(key, getattr(kind, key)) for key in ("hidden_size", "num_attention_heads"))
        if width % heads:
            raise UserError(f"{name}.hidden_size {width} cannot be split among {heads} heads: expected a multiple")
    config = CLIPConfig(**_bounded(clip, _CLIP, ""), **towers)
    vision: Any = config.vision_config
    if vision.image_size < vision.patch_size:
        raise UserError(
            f"vision_config.patch_size is {vision.patch_size}: expected at most its image_size {vision.image_size}"
        )
    return config


def _section(content: object, name: str) -> dict[str, Any]:
    """A copy of a section of config.json; null counts as empty."""
    if not isinstance(content, Mapping | None):
        raise UserError(f"{name} is {shown(content)}: expected an object of sizes")
    return dict(content or {})


def _bounded(section: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], where: str) -> dict[str, Any]:
    """The known keys of a section of config.json; each value must have the type of its bounds and lie within them."""
    taken = {name: section[name] for name in bounds if name in section}
    for name, value in taken.items():
        low, high = bounds[name]
        whole = isinstance(low, int)
        kind = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            number = "a whole number" if whole else "a number"
            raise UserError(f"{where}{name} is {shown(value)}: expected {number} from {low} to {high}")
        taken[name] = value if whole else float(value)  # transformers refuses 0 in place of 0.0
    return taken
