"""`cmmasksd explain`: what the masked branches see."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MAX_SEED, require_words
from cmmasksd.errors import require_between

HELP = "show what the masked branches see"
DESCRIPTION = "Show what the masked branches see: the correlation, what is masked, and what each branch predicts."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder that training wrote, or scenes, a shipped model")
    parser.add_argument("--image", type=Path, required=True, help="image file")
    parser.add_argument("--text", action="append", type=str, required=True, help="sentence about an object; repeatable")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the figures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks that are drawn at random")


def run(settings: Namespace) -> None:
    require_words(settings.text)
    require_between("--seed", settings.seed, 0, MAX_SEED)
    from cmmasksd.explain import write_figures

    for text, file in write_figures(settings.model, settings.image, settings.text, settings.out, seed=settings.seed):
        print(f"{text!r} -> {file}")
