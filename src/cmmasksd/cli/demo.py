"""`cmmasksd demo`: train on generated scenes, score, and write a report."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import ConfigFile, add_config, run_config
from cmmasksd.config import ScoreConfig
from cmmasksd.errors import UserError

HELP = "train on generated scenes, score, and write a report"
DESCRIPTION = "Train on generated scenes, score, and write report.html."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action=ConfigFile, help="YAML file of settings; the defaults train in minutes")
    parser.add_argument(
        "--trained",
        type=str | None,
        help="trained model to score instead, such as scenes, the shipped model",
    )
    add_config(parser)


def run(settings: Namespace) -> None:
    config = run_config(settings)
    from cmmasksd.data.scenes import STYLES

    if config.data.name not in STYLES:
        raise UserError(f"demo runs on generated scenes, not {config.data.name}: use `cmmasksd train` for other data")
    from cmmasksd.evaluation.report import report
    from cmmasksd.evaluation.score import score
    from cmmasksd.evaluation.tables import format_table
    from cmmasksd.training.loop import train

    out = Path(config.training.out)
    data, model, log = config.data, settings.trained, None
    if model is None:
        train(config)
        model, log = str(out / "best"), out / "metrics.jsonl"
    splits = (data.val_split, "testB")
    scored = {"model": model, "root": data.root, "scene_seed": data.scene_seed, "scene_size": data.scene_size}
    results = [score(ScoreConfig(data.name, split, workers=data.workers, **scored), out / split) for split in splits]
    page = report(model, [out / split for split in splits], out / "report.html", root=data.root, metrics=log)
    print(format_table([result.as_dict() for result in results]))
    print(f"These are scores on generated scenes. See the report: {page}")
