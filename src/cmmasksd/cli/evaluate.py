"""`cmmasksd evaluate`: score a model on a split."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import field_values, is_main_process
from cmmasksd.config import ScoreConfig

HELP = "score a model on a split"
DESCRIPTION = "Score a model on all sentences of a split, at the original size of the images."


def add_options(parser: ArgumentParser) -> None:
    parser.add_class_arguments(ScoreConfig)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and expressions.jsonl")


def run(settings: Namespace) -> None:
    config = ScoreConfig(**field_values(ScoreConfig, settings))
    from cmmasksd.evaluation.score import score
    from cmmasksd.evaluation.tables import format_table

    result = score(config, settings.out)
    if is_main_process():
        print(format_table([result.as_dict()]))
