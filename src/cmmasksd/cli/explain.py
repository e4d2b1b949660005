"""`cmmasksd explain`: what the masked branches see."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MAX_SEED, require_words
from cmmasksd.errors import require_between

HELP = "show what the masked branches see"
DESCRIPTION = "Show what the masked branches see: the correlation, what is hidden, and what each branch predicts."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder that training wrote, or scenes")
    parser.add_argument("--image", type=Path, required=True, help="image file")
    parser.add_argument("--text", action="append", type=str, required=True, help="a sentence; give it again for more")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of masks that are chosen at random")


def run(settings: Namespace) -> None:
    require_words(settings.text)
    require_between("--seed", settings.seed, 0, MAX_SEED)
    import torch

    from cmmasksd.data.images import read_image
    from cmmasksd.explain import explain, load_objective
    from cmmasksd.inference.outputs import slug
    from cmmasksd.inference.sources import refuse_url
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

    refuse_url(settings.image)
    pixels = read_image(settings.image, exif=True)
    model = CMMaskSDModel.from_pretrained(settings.model)
    objective = load_objective(settings.model, model)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    found = explain(objective, CMMaskSDProcessor.from_pretrained(settings.model), pixels, settings.text)
    for nth, one in enumerate(found):
        picture = settings.out / f"{settings.image.stem}_{nth + 1}_{slug(one.text)}_explained.png"
        one.picture().save(picture)
        print(f"{one.text!r} -> {picture}")
