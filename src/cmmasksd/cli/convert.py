"""`cmmasksd convert`: a CLIP of OpenAI or open_clip in transformers' format."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

HELP = "convert a CLIP of OpenAI or open_clip to transformers' format"
DESCRIPTION = (
    "Convert a CLIP of OpenAI or open_clip to transformers' format. No code in the file is run. "
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
        help="activation of the transformers; default: that of open_clip_config.json beside the weights; without it, "
        "quick_gelu for OpenAI's archives and names with quickgelu, openai or metaclip, else gelu",
    )


def run(settings: Namespace) -> None:
    from cmmasksd.model.converting import convert
    from cmmasksd.model.towers.families import FAMILIES

    quick_gelu = None if settings.activation is None else settings.activation == "quick_gelu"
    config: Any = convert(settings.source, settings.out, tokenizer=settings.tokenizer, quick_gelu=quick_gelu)
    sizes, text = FAMILIES[config.model_type].sizes(config), config.text_config
    image = f"ResNet with {config.depths} blocks, {config.width} wide" if config.model_type == "clip_resnet" else ""
    towers = f"image tower {image or _tower(config.vision_config)}; text tower {_tower(text)}"
    pixels = f"patches of {sizes.patch_size} in {sizes.image_size} x {sizes.image_size} pixels"
    print(
        f"{settings.out}: {towers}; {pixels}; joint space {sizes.joint_width}; {text.hidden_act}; "
        f"try it: cmmasksd train --model.backbone {settings.out} …"
    )


def _tower(config: Any) -> str:
    return f"{config.num_hidden_layers} layers x {config.hidden_size}, {config.num_attention_heads} heads"
