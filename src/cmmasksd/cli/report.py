"""`cmmasksd report`: a page of overlays for a scored split."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MODEL
from cmmasksd.errors import UserError

HELP = "a page of overlays for a scored split"
DESCRIPTION = "Write a page of overlays, scores and curves for a scored split."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--results", type=Path, required=True, help="folder that evaluate wrote")
    parser.add_argument("--root", type=Path | None, help="folder of the data, as given to evaluate")
    parser.add_argument("--metrics", type=Path | None, help="metrics.jsonl of the training, for its curves")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file")


def run(settings: Namespace) -> None:
    print(write(settings.model, [settings.results], settings.root, settings.metrics, settings.out))


def write(model: str, folders: list[Path], root: Path | None, metrics: Path | None, out: Path) -> Path:
    """A page for the first folder's split (examples), with the scores of all folders."""
    from cmmasksd.data.datasets import open_dataset
    from cmmasksd.evaluation.report import choose_examples, collect_examples, read_log, write_report
    from cmmasksd.evaluation.results import read_expressions, read_results
    from cmmasksd.inference.predictor import Segmenter
    from cmmasksd.model.locating import model_folder, weights_digest

    results = [read_results(folder) for folder in folders]
    first = results[0]
    if "data" not in first:
        raise UserError(f"{folders[0]} does not say which data set was scored: score it with `cmmasksd evaluate`")
    if first.get("weights", digest := weights_digest(model_folder(model))) != digest:
        raise UserError(f"{folders[0]} holds the scores of another model: score {model} with `cmmasksd evaluate`")
    rows = read_log(metrics) if metrics is not None else []
    data = open_dataset(
        first["data"],
        first["split"],
        root=root,
        references=first.get("references", 0),
        seed=first.get("scene_seed", 0),
        canvas=first.get("scene_size", 128),
    )
    segmenter = Segmenter.from_pretrained(model, threshold=first["protocol"]["threshold"])
    chosen = choose_examples(read_expressions(folders[0]), 12)
    return write_report(
        out,
        title=f"CM-MaskSD on {first['data']} {first['split']}",
        results=results,
        examples=collect_examples(data, segmenter, chosen),
        curves=rows,
        facts={"model": model},
    )
