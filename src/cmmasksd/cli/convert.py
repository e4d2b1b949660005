"""`cmmasksd convert`: a CLIP of OpenAI or open_clip in transformers' format."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

HELP = "convert a CLIP of OpenAI or open_clip to transformers' format"
DESCRIPTION = (
    "Convert a ViT CLIP of OpenAI or open_clip to transformers' format. No code in the file is run. "
    "`train` also takes such files as its backbone."
)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="weights of a CLIP (.pt, .bin or .safetensors), or hf-hub:USER/NAME")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the CLIP and its tokenizer")
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        help="folder or hub id of the tokenizer, such as openai/clip-vit-base-patch32; default: beside the weights",
    )
    parser.add_argument(
        "--activation",
        type=Literal["quick_gelu", "gelu"] | None,
        help="activation of both towers; default: that of open_clip_config.json beside the weights; without it, "
        "quick_gelu for OpenAI's archives and names with quickgelu, openai or metaclip, else gelu",
    )


def run(settings: Namespace) -> None:
    from cmmasksd.model.converting import convert

    quick_gelu = None if settings.activation is None else settings.activation == "quick_gelu"
    config: Any = convert(settings.source, settings.out, tokenizer=settings.tokenizer, quick_gelu=quick_gelu)
    vision, text = config.vision_config, config.text_config
    towers = f"{_tower('image', vision)}; {_tower('text', text)}"
    pixels = f"patches of {vision.patch_size} in {vision.image_size} x {vision.image_size} pixels"
    print(
        f"{settings.out}: {towers}; {pixels}; joint space {config.projection_dim}; {vision.hidden_act}; "
        f"try it: cmmasksd train --model.backbone {settings.out} …"
    )


def _tower(name: str, config: Any) -> str:
    return f"{name} tower {config.num_hidden_layers} layers x {config.hidden_size}, {config.num_attention_heads} heads"
