"""Checkpoints of OpenAI and open_clip as folders in transformers' format."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedConfig

from cmmasksd.errors import UserError
from cmmasksd.files import whole_folder
from cmmasksd.model.loading import build_backbone, read_checkpoint
from cmmasksd.model.locating import OPEN_CLIP_CONFIG, TOKENIZER_FILES, backbone_folder, is_checkpoint
from cmmasksd.model.processing import checkpoint_mean_and_std
from cmmasksd.model.tokenizing import check_tokenizer, load_tokenizer
from cmmasksd.model.towers.families import FAMILIES


def convert(
    source: str | Path, out: Path, *, tokenizer: str | Path | None = None, quick_gelu: bool | None = None
) -> PreTrainedConfig:
    """Convert a CLIP to config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

    Args:
        source: a file of weights, or hf-hub:USER/NAME.
        out: folder to write, which must be absent or empty.
        tokenizer: folder or hub id of the tokenizer. None: beside the weights.
        quick_gelu: see `read_checkpoint`.

    Returns:
        The configuration of the CLIP.

    Raises:
        UserError: the source cannot be read or is not a CLIP, the tokenizer is missing or does not fit, or `out` is in
            use.
    """
    if not is_checkpoint(source):
        raise UserError(
            f"{source} is not a checkpoint: give a .pt, .bin or .safetensors file of a CLIP, or hf-hub:USER/NAME"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another one with --out")
    folder = backbone_folder(source, (*TOKENIZER_FILES, OPEN_CLIP_CONFIG))
    words = load_tokenizer(folder if tokenizer is None else tokenizer)
    config, weights = read_checkpoint(source, quick_gelu=quick_gelu)
    sizes = FAMILIES[config.model_type].sizes(config)
    check_tokenizer(words, sizes, folder if tokenizer is None else Path(tokenizer))
    words.model_max_length = min(words.model_max_length, sizes.max_tokens)
    mean, std = checkpoint_mean_and_std(folder)
    clip = build_backbone(config, weights, Path(source))
    clip.config._name_or_path = ""  # it would be saved, and may be a path of this machine
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": sizes.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": sizes.image_size, "width": sizes.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    with whole_folder(out) as new:
        clip.save_pretrained(new)
        words.save_pretrained(new)
        (new / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")
    return clip.config
