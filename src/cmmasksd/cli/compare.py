"""`cmmasksd compare`: two models that were scored on the same split."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MAX_SEED
from cmmasksd.errors import require_between
from cmmasksd.evaluation.protocols import METRIC_NAMES

MAX_RESAMPLES = 10_000_000
HELP = "compare two models on a split"
DESCRIPTION = "Compare two models that were scored on the same split: score differences with bootstrap intervals."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="expressions.jsonl of the first model, or its folder")
    parser.add_argument("b", type=Path, help="expressions.jsonl of the second model, or its folder")
    parser.add_argument(
        "--metrics", nargs="+", type=Literal[METRIC_NAMES], default=["oIoU", "mIoU", "P@0.5"], help="scores to compare"
    )
    parser.add_argument(
        "--unit",
        type=Literal["image", "expression"],
        default="image",
        help="unit of the bootstrap: an image with all its sentences, or a single sentence",
    )
    parser.add_argument("--resamples", type=int, default=10_000, help="number of bootstrap resamples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--out", type=Path | None, help="JSON file for the comparison")


def run(settings: Namespace) -> None:
    require_between("--resamples", settings.resamples, 100, MAX_RESAMPLES)
    require_between("--seed", settings.seed, 0, MAX_SEED)
    from cmmasksd.evaluation.compare import compare_results, format_comparison, write_comparison

    comparisons = compare_results(
        settings.a,
        settings.b,
        metrics=settings.metrics,
        resamples=settings.resamples,
        unit=settings.unit,
        seed=settings.seed,
    )
    if settings.out is not None:
        write_comparison(settings.out, comparisons)
    print(format_comparison(comparisons))
    print(f"A = {settings.a}\nB = {settings.b}\npaired bootstrap over {settings.unit}s, {settings.resamples} resamples")
