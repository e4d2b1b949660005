"""`cmmasksd push`: publish a model with its card."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

HELP = "publish a model with its card"
DESCRIPTION = "Publish a model with a generated card: on the Hugging Face hub, or as a folder."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--to", required=True, help="USER/NAME on the hub, or ./folder to inspect first")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="folders that evaluate wrote, for the card")
    parser.add_argument("--license", default="mit", help="licence of the weights, as the hub's identifier")
    parser.add_argument("--card", type=Path | None, help="README.md to use instead of the generated card")
    parser.add_argument("--private", action="store_true", help="make the repository on the hub private")


def run(settings: Namespace) -> None:
    from cmmasksd.publishing.hub import publish

    published = publish(
        settings.model,
        settings.to,
        results=settings.results,
        licence=settings.license,
        card=settings.card,
        private=settings.private,
    )
    print(published)
