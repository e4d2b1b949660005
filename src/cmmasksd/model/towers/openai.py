"""Checkpoints of CLIPs by OpenAI and open_clip in transformers' format: other names, transposed projections.

A CLIP with a ResNet, which transformers lacks, becomes a CLIPResNetModel, whose image tower has OpenAI's names. Sizes
follow from the shapes of the weights. Two things leave no trace in them: the number of attention heads, which is
width / 64 except in open_clip's largest image towers, and the activation. OpenAI's CLIPs have quick_gelu, those of
open_clip have gelu unless their configuration or name says otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cmmasksd.errors import UserError, shown

_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""Width of an image tower -> width of a head, where it is not 64: open_clip's ViT-H, ViT-g, ViT-bigG and ViT-e."""
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "num_batches_tracked")
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
# What open_clip_config.json may set. Anything else, such as another pooling, is not in transformers' CLIP.
_SETTINGS = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


def to_transformers(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], *, quick_gelu: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a checkpoint.

    Args:
        weights: its tensors by name.
        settings: `model_cfg` of open_clip_config.json; empty where there is none.
        quick_gelu: the activation, else gelu.

    Returns:
        content: content of a config.json, not checked against bounds; `model_type` names the family.
        converted: the weights by transformers' names.

    Raises:
        UserError: it is not a CLIP, or has parts that transformers' CLIP lacks.
    """
    for name, known in _SETTINGS.items():
        section = _section(settings, name) if name else settings
        if unknown := [key for key, value in section.items() if key not in known and value not in (None, False)]:
            raise UserError(
                f"open_clip_config.json sets {name or 'model_cfg'}.{unknown[0]}, which transformers' CLIP lacks: "
                "choose another CLIP"
            )
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    weights = {name.removeprefix("text."): value for name, value in weights.items() if not name.endswith(_NOT_WEIGHTS)}
    act = "quick_gelu" if quick_gelu else "gelu"
    resnet = any(name.startswith("visual.layer1.") for name in weights)
    head_width = _section(settings, "vision_cfg").get("head_width")
    content = _resnet(weights, head_width or 64) if resnet else _vit(weights, head_width, act)
    vocabulary, text_width = _shape(weights, "token_embedding.weight", 2)
    content["text_config"] = _tower(weights, "transformer.", text_width, act) | {
        "num_attention_heads": _section(settings, "text_cfg").get("heads", text_width // 64),
        "vocab_size": vocabulary,
        "max_position_embeddings": _shape(weights, "positional_embedding", 2)[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,  # these CLIPs take the token with the largest id as the end
        "pad_token_id": vocabulary - 1,
        "projection_dim": content["projection_dim"],
    }
    _check(settings, content)
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        in_resnet = resnet and name.startswith("visual.")
        converted |= {_in_resnet(name): value} if in_resnet else _converted(name, value)
    return content, converted


def _vit(weights: Mapping[str, Tensor], head_width: int | None, act: str) -> dict[str, Any]:
    """The content of a CLIP's config.json without its text tower."""
    width, _, patch_size, _ = _shape(weights, "visual.conv1.weight", 4)
    joint_width = _shape(weights, "visual.proj", 2)[1]
    sizes = {
        "num_attention_heads": width // (head_width or _HEAD_WIDTH.get(width, 64)),
        "image_size": _side(weights, "visual.positional_embedding") * patch_size,
        "patch_size": patch_size,
        "projection_dim": joint_width,
    }
    vision = _tower(weights, "visual.transformer.", width, act) | sizes
    return {"model_type": "clip", "projection_dim": joint_width, "vision_config": vision}


def _resnet(weights: Mapping[str, Tensor], head_width: int) -> dict[str, Any]:
    """The content of a CLIPResNetModel's config.json without its text tower."""
    width = _shape(weights, "visual.layer1.0.conv1.weight", 4)[0]
    blocks = {tuple(name.split(".")[1:3]) for name in weights if re.match(r"visual\.layer[1-4]\.\d", name)}
    return {
        "model_type": "clip_resnet",
        "projection_dim": _shape(weights, "visual.attnpool.c_proj.weight", 2)[0],
        "depths": [sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5)],
        "width": width,
        "num_attention_heads": 32 * width // head_width,
        "image_size": 32 * _side(weights, "visual.attnpool.positional_embedding"),
    }


def _side(weights: Mapping[str, Tensor], name: str) -> int:
    """Patches per side of the image, from the position embeddings."""
    positions, _ = _shape(weights, name, 2)
    side = math.isqrt(max(positions - 1, 0))
    if side * side != positions - 1:
        raise UserError(f"it has {positions - 1} patches, which are not a square: choose another CLIP")
    return side


def _check(settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Refuse the settings of another checkpoint."""
    tower = {"width": "hidden_size", "layers": "num_hidden_layers"}
    text = tower | {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
    vision = (
        tower | {"patch_size": "patch_size"} if "vision_config" in content else {"width": "width", "layers": "depths"}
    )
    vision |= {"image_size": "image_size"}
    pairs = [("embed_dim", settings.get("embed_dim"), content["projection_dim"])]
    image_tower = content.get("vision_config", content)
    for section, names, sizes in (("vision_cfg", vision, image_tower), ("text_cfg", text, content["text_config"])):
        given = _section(settings, section)
        pairs += [(f"{section}.{key}", given[key], sizes[name]) for key, name in names.items() if key in given]
    for key, given, actual in pairs:
        if given not in (None, actual):
            raise UserError(
                f"open_clip_config.json has {key} {shown(given)}, the weights have {actual}: they belong to different "
                "models"
            )


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name, {})
    if not isinstance(section, Mapping):
        raise UserError(f"open_clip_config.json: {name} is {shown(section)}, expected an object")
    for key in ("head_width", "heads"):
        if not isinstance(value := section.get(key, 1), int) or value < 1:
            raise UserError(f"open_clip_config.json: {name}.{key} is {shown(value)}, expected a positive whole number")
    return section


def _shape(weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a weight that every such CLIP has."""
    if name not in weights or weights[name].ndim != dimensions:
        shape = f"has the shape {tuple(weights[name].shape)}" if name in weights else "is missing"
        raise UserError(f"it is not a CLIP of OpenAI or open_clip ({name} {shape}): choose another file")
    return tuple(weights[name].shape)


def _tower(weights: Mapping[str, Tensor], prefix: str, width: int, act: str) -> dict[str, Any]:
    blocks = {name.removeprefix(prefix).split(".")[1] for name in weights if name.startswith(f"{prefix}resblocks.")}
    return {
        "hidden_size": width,
        "intermediate_size": _shape(weights, f"{prefix}resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": len(blocks),
        "hidden_act": act,
    }


def _in_resnet(name: str) -> str:
    """Our name of a weight of the ResNet."""
    name = name.replace("running_mean", "mean").replace("running_var", "variance")
    return name.replace("visual.", "vision_model.", 1)


def _converted(name: str, value: Tensor) -> dict[str, Tensor]:
    """A weight by transformers' name, or the three that it is split into."""
    start = next((start for start in _NAMES if name.startswith(start)), None)
    if start is None or (name != start and not start.endswith(".")):
        raise UserError(f"it holds {shown(name)}, which no CLIP of OpenAI or open_clip has: choose another CLIP")
    renamed, rest = _NAMES[start], name.removeprefix(start)
    if start.endswith("resblocks."):
        index, _, rest = rest.partition(".")
        renamed = f"{renamed}{index}."
        if kind := re.fullmatch("attn.in_proj_(weight|bias)", rest):
            if value.ndim == 0 or not value.shape[0] or value.shape[0] % 3:
                raise UserError(f"{name} has the shape {tuple(value.shape)}: get the file again")
            parts = zip("qkv", value.chunk(3), strict=True)
            return {f"{renamed}self_attn.{part}_proj.{kind[1]}": third for part, third in parts}
        block = next((block for block in _BLOCK if rest.startswith(block)), None)
        if block is None:
            raise UserError(f"it holds {shown(name)}, which no CLIP of OpenAI or open_clip has: choose another CLIP")
        renamed, rest = renamed + _BLOCK[block], rest.removeprefix(block)
    if start in ("visual.proj", "text_projection"):
        value = value.T.contiguous() if value.ndim == 2 else value
    if start == "logit_scale":
        value = value.reshape(()) if value.numel() == 1 else value
    return {renamed + rest: value}
