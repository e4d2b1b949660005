"""Folder to model, every weight accounted for: missing, unexpected, misshapen or non-finite weights stop the load.

`save_float16` writes the models that ship.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from cmmasksd.errors import UserError, reason, shown
from cmmasksd.model.configuration import read_backbone_config
from cmmasksd.model.locating import (
    REMEDY,
    WEIGHTS,
    checkpoint_file,
    files_of,
    is_checkpoint,
    open_clip_settings,
    require,
    weight_files,
)
from cmmasksd.model.torchscript import is_torchscript, read_torchscript
from cmmasksd.model.towers.families import FAMILIES, NETWORKS
from cmmasksd.model.towers.openai import to_transformers


def load_backbone(name: str | Path, families: Container[str] = FAMILIES) -> PreTrainedModel:
    """Load a backbone into float32, every weight accounted for.

    Args:
        name: folder or hub id in transformers' format, "tiny", or a CLIP of OpenAI or open_clip (see `is_checkpoint`).
        families: those of NETWORKS to accept.

    Raises:
        UserError: there is no backbone of these families, or its weights do not fit its configuration.
    """
    if is_checkpoint(name):
        config, weights = read_checkpoint(name)
        if config.model_type not in families:
            raise UserError(f"{name} is a {FAMILIES[config.model_type].label}: choose one with a ViT")
        return build_backbone(config, weights, Path(name))
    folder = files_of(name, ("config.json", "model*.safetensors", "model.safetensors.index.json"))
    if not (folder / WEIGHTS).is_file() and not (folder / f"{WEIGHTS}.index.json").is_file():
        folder = files_of(name, ("config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"))
    require(folder, ("config.json",), REMEDY)
    config, weights = read_backbone_config(folder, families), {}
    for file in weight_files(folder):
        weights |= read_weights(file)
    return build_backbone(config, weights, folder)


def build_backbone(config: PreTrainedConfig, weights: dict[str, Tensor], source: Path) -> PreTrainedModel:
    """`build` for the network of a family, in float32."""
    network: Any = NETWORKS[config.model_type].network
    return build(network, network.from_pretrained, config, weights, source, dtype=torch.float32)


def load_clip(name: str | Path) -> CLIPModel:
    """As `load_backbone`, but a CLIP only."""
    clip: Any = load_backbone(name, ("clip",))
    return clip


def read_checkpoint(name: str | Path, *, quick_gelu: bool | None = None) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Configuration and weights of a CLIP in the format of OpenAI or open_clip, converted to transformers'.

    Args:
        name: see `is_checkpoint`.
        quick_gelu: the activation. None: that of the open_clip_config.json beside it; without such a file,
            quick_gelu for OpenAI's archives and for names with "quickgelu", "openai" or "metaclip".

    Raises:
        UserError: the file is damaged, or does not hold a CLIP.
    """
    file = checkpoint_file(name)
    archive = is_torchscript(file)
    weights = read_torchscript(file) if archive else read_weights(file)
    settings = open_clip_settings(file.parent, "model_cfg")
    if quick_gelu is None and settings:
        quick_gelu = settings.get("quick_gelu") is True
    elif quick_gelu is None:
        by_name = re.search("quickgelu|openai|metaclip", file.name, re.IGNORECASE)
        quick_gelu = archive or "input_resolution" in weights or by_name is not None
    try:
        content, weights = to_transformers(weights, settings, quick_gelu=quick_gelu)
        return FAMILIES[content["model_type"]].config(content), weights
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights. Pickled code is never run.

    Raises:
        UserError: the file is damaged, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"the pickled weights in {file} hold more than tensors: get them in safetensors format"
        ) from error
    except Exception as error:  # what the two libraries raise for a damaged file has no common class
        raise UserError(f"cannot load {file}: {reason(error)}") from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):  # a run of open_clip
        weights = weights["state_dict"]
    # a tensor that repeats its numbers (expanded) would need more memory than its file
    if not isinstance(weights, dict) or not all(
        isinstance(value, Tensor) and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        for value in weights.values()
    ):
        raise UserError(f"{file} holds more than plain tensors: get the weights in safetensors format")
    return weights


def build(
    kind: Any, load: Any, config: PreTrainedConfig, weights: dict[str, Tensor], folder: Path, *args: Any, **kwargs: Any
) -> Any:
    """Build a model from its configuration and weights.

    Args:
        kind: class of the model.
        load: its `from_pretrained`. It gets no folder: transformers would read more from it than config.json and the
            weights.
        config: its sizes.
        weights: its tensors by name.
        folder: where they come from, for messages.
        *args, **kwargs: passed to `load`.

    Raises:
        UserError: weights are missing, unexpected, misshapen or not finite.
    """
    stored = sum(value.numel() for value in weights.values())
    with torch.device("meta"):
        needed = sum(value.numel() for value in kind(config).parameters())
    if needed > 2 * stored:  # where fewer are missing, the message below names them
        raise UserError(
            f"config.json in {folder} describes {needed} weights and the files hold {stored}: they belong to different "
            "models"
        )
    for key, value in weights.items():
        if not value.is_floating_point() and not key.endswith("position_ids"):
            raise UserError(f"weight {shown(key)} of {folder} is {value.dtype}: expected floating-point numbers")
        if not _is_finite(value):
            raise UserError(f"{shown(key)} in {folder} holds values that are not finite: train again, or get it again")
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet_transformers():
            model, info = load(None, *args, config=config, state_dict=weights, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot load a model from {folder}: {reason(error)}") from error
    gaps = {
        "of another shape": {key[0] for key in info["mismatched_keys"]},
        "missing": info["missing_keys"],
        # old CLIP checkpoints also store the position indices, which are not weights
        "unexpected": {key for key in info["unexpected_keys"] if not key.endswith("position_ids")},
    }
    for gap, keys in gaps.items():
        if keys:
            few = ", ".join(shown(key) for key in sorted(keys)[:3]) + (", …" if len(keys) > 3 else "")
            raise UserError(f"{len(keys)} weights of {folder} are {gap} ({few}): they do not fit its configuration")
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bar and its report of the weights, a table of hundreds of lines."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    # a sum is several times faster than checking every number, and rarely overflows
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())


def save_float16(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and model.safetensors at half the size; loading returns the weights to float32.

    Args:
        model: the model, which stays as it is.
        folder: made if missing. No path of this machine is written into it.
    """
    half: Any = copy.deepcopy(model).half()
    for config in _nested(half.config):
        config._name_or_path, config.dtype = "", None  # a loaded model has its folder and float32 here
    half.save_pretrained(folder)


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for name in config.sub_configs:
        if (nested := getattr(config, name)) is not None:
            yield nested
            yield from _nested(nested)
