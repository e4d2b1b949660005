"""Bounds of the sizes in a config.json, which may be a stranger's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmmasksd.errors import UserError, shown

# The largest public CLIPs have 48 layers of width 5,120 and 15,360 hidden channels.
TOWER = {
    "hidden_size": (1, 16_384),
    "intermediate_size": (1, 65_536),
    "num_hidden_layers": (1, 128),
    "num_attention_heads": (1, 256),
    "layer_norm_eps": (1e-12, 0.1),
    "attention_dropout": (0.0, 0.999),
}
TEXT = TOWER | {"vocab_size": (1, 1 << 20), "max_position_embeddings": (3, 4096)}
VISION = TOWER | {"num_channels": (3, 3), "image_size": (1, 4096), "patch_size": (1, 1024)}
TOKEN_ID = (0, 1 << 20)
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")


def section(content: object, name: str) -> dict[str, Any]:
    """A copy of a section of config.json; null counts as empty."""
    if not isinstance(content, Mapping | None):
        raise UserError(f"{name} is {shown(content)}: expected an object of sizes")
    return dict(content or {})


def bounded(content: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], where: str = "") -> dict[str, Any]:
    """The known keys of a section of config.json; each value must have the type of its bounds and lie within them."""
    taken = {name: content[name] for name in bounds if name in content}
    for name, value in taken.items():
        low, high = bounds[name]
        whole = isinstance(low, int)
        kind = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            number = "a whole number" if whole else "a number"
            raise UserError(f"{where}{name} is {shown(value)}: expected {number} from {low} to {high}")
        taken[name] = value if whole else float(value)  # transformers refuses 0 in place of 0.0
    return taken


def bounded_tower(
    content: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], name: str, kind: Any
) -> dict[str, Any]:
    """The sizes of a transformer tower.

    Args:
        content: its section of config.json.
        bounds: known keys.
        name: name of the section, for messages.
        kind: class of its configuration, which has the defaults.

    Raises:
        UserError: a size is out of bounds, or sizes do not fit together.
    """
    taken = bounded(content, bounds, f"{name}.")
    taken["hidden_act"] = content.get("hidden_act", kind.hidden_act)
    if taken["hidden_act"] not in _ACTIVATIONS:
        raise UserError(f"{name}.hidden_act is {shown(taken['hidden_act'])}: expected {' or '.join(_ACTIVATIONS)}")
    width, heads = (taken.get(key, getattr(kind, key)) for key in ("hidden_size", "num_attention_heads"))
    if width % heads:
        raise UserError(f"{name}.hidden_size {width} cannot be split among {heads} heads: expected a multiple")
    if "patch_size" in bounds:
        image, patch = (taken.get(key, getattr(kind, key)) for key in ("image_size", "patch_size"))
        if image < patch:
            raise UserError(f"{name}.patch_size is {patch}: expected at most its image_size {image}")
    return taken
