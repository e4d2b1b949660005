"""`cmmasksd evaluate`: score a model on a split."""

from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MAX_WORKERS, is_main_process, require_between, require_dataset
from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE, ScoreConfig

HELP = "score a model on a split"
DESCRIPTION = "Score a model on every sentence of a split, at the images' own size."


def add_options(parser: ArgumentParser) -> None:
    parser.add_class_arguments(ScoreConfig)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and expressions.jsonl")


def run(settings: Namespace) -> None:
    require_dataset(settings.data, "--data")
    require_between("--references", settings.references, 1, MAX_REFERENCES)
    require_between("--scene_size", settings.scene_size, 64, MAX_SCENE_SIZE)
    require_between("--workers", settings.workers, 0, MAX_WORKERS)
    from cmmasksd.evaluation.score import score
    from cmmasksd.evaluation.tables import format_table

    config = ScoreConfig(**{field.name: settings[field.name] for field in fields(ScoreConfig)})
    result = score(config, settings.out)
    if is_main_process():
        print(format_table([result.as_dict()]))
