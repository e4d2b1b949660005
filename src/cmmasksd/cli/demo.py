"""`cmmasksd demo`: segment photographs, train on generated scenes, score, and write a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import ConfigFile, add_config, run_config
from cmmasksd.config import ScoreConfig
from cmmasksd.errors import UserError

if TYPE_CHECKING:
    import numpy as np

HELP = "segment photographs, train on generated scenes, score, and write a report"
DESCRIPTION = (
    "Segment photographs with the shipped model (they come with the extra `demo`), train on generated scenes, score, "
    "and write report.html."
)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action=ConfigFile, help="YAML file of settings; the defaults train in minutes")
    parser.add_argument(
        "--trained",
        type=str | None,
        help="trained model to score instead, such as scenes, a shipped one",
    )
    add_config(parser)


def run(settings: Namespace) -> None:
    config = run_config(settings)
    from cmmasksd.data.scenes import STYLES

    if config.data.name not in STYLES:
        raise UserError(f"demo runs on generated scenes, not {config.data.name}: use `cmmasksd train` for other data")
    from cmmasksd.evaluation.report import report, write_report
    from cmmasksd.evaluation.score import score
    from cmmasksd.evaluation.tables import format_table
    from cmmasksd.training.checkpoint import STATE, require_resumable
    from cmmasksd.training.loop import train

    out = Path(config.training.out)
    data, model, log = config.data, settings.trained, None
    if model is None:
        require_resumable(out / "last" / STATE, out, config.training.resume, "--training.out")
    drawings = _drawings()
    if drawings:
        page = write_report(out / "report.html", title="CM-MaskSD", results=[], examples={}, drawings=drawings)
        print(f"Photographs, segmented by the shipped model: {page}", flush=True)
    else:
        print('For photographs, install scikit-image: pip install "cmmasksd[demo]"', flush=True)
    if model is None:
        train(config)
        model, log = str(out / "best"), out / "metrics.jsonl"
    splits = (data.val_split, "testB")
    scored = {"model": model, "root": data.root, "scene_seed": data.scene_seed, "scene_size": data.scene_size}
    results = [score(ScoreConfig(data.name, split, workers=data.workers, **scored), out / split) for split in splits]
    folders = [out / split for split in splits]
    page = report(model, folders, out / "report.html", root=data.root, metrics=log, drawings=drawings)
    print(format_table([result.as_dict() for result in results]))
    print(f"These are scores on generated scenes. See the report: {page}")


def _drawings() -> list[tuple[str, np.ndarray]]:
    """The example photographs, segmented: name and drawing of each."""
    from cmmasksd.data.examples import photographs
    from cmmasksd.inference.outputs import add_segmentation
    from cmmasksd.inference.predictor import Segmenter
    from cmmasksd.inference.visualize import Drawing

    examples = photographs()
    if not examples:
        return []
    segmenter, drawings = Segmenter.from_pretrained("photos", min_score=0.5), []
    for file, texts in examples:
        segmentations = segmenter.segment(file, texts)
        drawing = Drawing(segmentations[0].image)
        for nth, segmentation in enumerate(segmentations):
            add_segmentation(drawing, segmentation, nth)
        drawings.append((file.name, drawing.finish()))
    return drawings
