"""`cmmasksd push`: publish a model with its card."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.errors import UserError

HELP = "publish a model with its card"
DESCRIPTION = "Publish a model with a generated card: on the Hugging Face hub, or as a folder."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--to", required=True, help="USER/NAME on the hub, or ./folder to look at first")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="folders that evaluate wrote, for the card")
    parser.add_argument("--license", default="mit", help="of the weights, by the hub's identifier")
    parser.add_argument("--card", type=Path | None, help="your own README.md in place of the generated one")
    parser.add_argument("--private", action="store_true", help="nobody else may see it on the hub")


def run(settings: Namespace) -> None:
    from cmmasksd.evaluation.results import read_results
    from cmmasksd.model.locating import is_hub_id, model_folder, weights_digest
    from cmmasksd.publishing.card import CARD, model_card
    from cmmasksd.publishing.hub import contents, upload, write_folder

    to_hub = is_hub_id(settings.to)
    if to_hub and Path(settings.to).parent.is_dir():
        raise UserError(f"--to {settings.to} may be a folder or a hub id: write ./{settings.to} for the folder")
    folder = model_folder(settings.model)
    results = []
    for path in settings.results:
        results.append(read_results(path))
        if results[-1].get("weights") != weights_digest(folder):
            raise UserError(f"{path} does not hold scores of {settings.model}: score this model with cmmasksd evaluate")
    name = settings.to if to_hub else Path(settings.to).resolve().name
    if settings.card is None:
        card = model_card(folder, name, results, licence=settings.license)
    else:
        card = settings.card.read_text(encoding="utf-8")
    files = contents(folder, card)
    if to_hub:
        print(upload(files, settings.to, private=settings.private))
    else:
        write_folder(files, Path(settings.to).expanduser())
        print(f"{', '.join(files)} in {settings.to}; the card is {Path(settings.to) / CARD}")
