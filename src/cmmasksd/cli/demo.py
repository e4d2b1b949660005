"""`cmmasksd demo`: train on generated scenes, score, and write a page to look at."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli import evaluate, report
from cmmasksd.cli.options import SCENE_REFERENCES, ConfigFile, add_config, run_config
from cmmasksd.errors import UserError

HELP = "train on generated scenes, score, and write report.html"
DESCRIPTION = "Train on generated scenes, score, and write a page to look at."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action=ConfigFile, help="settings of the run; the built-in ones train in minutes")
    parser.add_argument(
        "--trained", type=str | None, help="score this model and train none, such as scenes: the one that ships"
    )
    add_config(parser)


def run(settings: Namespace) -> None:
    config = run_config(settings)
    from cmmasksd.data.scenes import STYLES

    if config.data.name not in STYLES:
        raise UserError(f"demo runs on generated scenes, not {config.data.name}: use `cmmasksd train` for other data")
    from cmmasksd.evaluation.results import format_table, read_results
    from cmmasksd.training.loop import train

    out = Path(config.training.out)
    data, model, log = config.data, settings.trained, None
    if model is None:
        train(config)
        model, log = str(out / "best"), out / "metrics.jsonl"
    results = []
    for split in (data.val_split, "testB"):
        evaluate.score(
            model=model,
            name=data.name,
            root=data.root,
            split=split,
            out=out / split,
            references=SCENE_REFERENCES,
            seed=data.scene_seed,
            size=data.scene_size,
            workers=data.workers,
        )
        results.append(read_results(out / split))
    page = report.write(model, [out / data.val_split, out / "testB"], data.root, log, out / "report.html")
    print(format_table(results))
    print(f"These are scores on generated scenes. Look at the pictures: {page}")
