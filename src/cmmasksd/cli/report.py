"""`cmmasksd report`: a page of scores, curves and overlays for a scored split."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MODEL

HELP = "write a page of scores and overlays for a scored split"
DESCRIPTION = "Write a page of scores, curves and overlays for a scored split."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--results", type=Path, required=True, help="folder that evaluate wrote")
    parser.add_argument("--root", type=Path | None, help="folder or file of the data, as given to evaluate")
    parser.add_argument("--metrics", type=Path | None, help="metrics.jsonl of the training, for its curves")
    parser.add_argument("--out", type=Path, required=True, help="HTML file for the page")


def run(settings: Namespace) -> None:
    from cmmasksd.evaluation.report import report

    print(report(settings.model, [settings.results], settings.out, root=settings.root, metrics=settings.metrics))
