"""One self-contained HTML page of a run: scores, curves, and the best, worst and randomly drawn expressions.

The page needs neither network nor scripts: images are embedded, curves are inline SVG (see `charts`), and its content
security policy forbids everything else. The template escapes every value, since sentences come from data sets.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cmmasksd.config import SplitConfig
from cmmasksd.data.datasets import open_dataset
from cmmasksd.errors import UserError, shown
from cmmasksd.evaluation.charts import HEIGHT, WIDTH, run_charts
from cmmasksd.evaluation.examples import Example, choose_examples, collect_examples
from cmmasksd.evaluation.protocols import METRIC_NAMES
from cmmasksd.evaluation.results import read_expressions, read_results
from cmmasksd.evaluation.tables import percentages, protocol_lines, row_name
from cmmasksd.files import write_text
from cmmasksd.inference.visualize import PREDICTION_COLOR, TRUTH_COLOR, check_sizes, comparison, enlarged
from cmmasksd.model.locating import model_folder, weights_digest

TEMPLATE = "report.html.jinja"
SECTIONS = {
    "best": ("Best", "The expressions with the highest IoU, if above 0; ties are broken at random."),
    "worst": ("Worst", "The expressions with the lowest IoU; ties are broken at random."),
    "random": ("Random sample", "Drawn from all expressions with a fixed seed, regardless of their scores."),
}
"""Kind of example -> heading and explanation."""
EXAMPLES = 12
"""Number of examples of each kind."""
MAX_SIDE = 640
"""Maximum length of the longer side of an embedded image in pixels."""


def report(
    model: str | Path,
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    root: str | Path | None = None,
    metrics: str | Path | None = None,
    drawings: Sequence[tuple[str, np.ndarray]] = (),
) -> Path:
    """Write the page of a scored model.

    Args:
        model: the model that was scored, by folder, hub id or name.
        folders: folders that scoring wrote, one per split. The examples are from the first split.
        out: the HTML file.
        root: folder of the data, as given to scoring.
        metrics: `metrics.jsonl` of the training, for its curves.
        drawings: see `write_report`.

    Returns:
        The path of the page.

    Raises:
        UserError: a file is not as scoring writes it, or holds the scores of another model or of other data.
    """
    from cmmasksd.inference.predictor import Segmenter

    folders = [Path(folder) for folder in folders]
    results = [read_results(folder) for folder in folders]
    first = results[0]
    if "data" not in first:
        raise UserError(f"{folders[0]} does not say which data set was scored: score it with `cmmasksd evaluate`")
    if first.get("weights", digest := weights_digest(model_folder(model))) != digest:
        raise UserError(f"{folders[0]} holds the scores of another model: score {model} with `cmmasksd evaluate`")
    curves = read_log(Path(metrics)) if metrics is not None else []
    scenes = {key: first[key] for key in ("references", "scene_seed", "scene_size") if key in first}
    data = open_dataset(SplitConfig(first["data"], first["split"], None if root is None else Path(root), **scenes))
    segmenter = Segmenter.from_pretrained(model, threshold=first["protocol"]["threshold"])
    chosen = choose_examples(read_expressions(folders[0]), EXAMPLES)
    return write_report(
        Path(out),
        title=f"CM-MaskSD on {first['data']} {first['split']}",
        results=results,
        examples=collect_examples(data, segmenter, chosen),
        curves=curves,
        facts={"model": str(model)},
        drawings=drawings,
    )


def write_report(
    path: Path,
    *,
    title: str,
    results: Sequence[Mapping[str, Any]],
    examples: Mapping[str, Sequence[Example]],
    curves: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    drawings: Sequence[tuple[str, np.ndarray]] = (),
) -> Path:
    """Write the page at once.

    Args:
        path: the HTML file; its folder is made if missing.
        title: title of the page.
        results: one per split, as `read_results` gives them; their extra texts and numbers are listed under the table.
        examples: SECTIONS' keys -> examples, shown in the order given.
        curves: the rows of `metrics.jsonl`, see `run_charts`.
        facts: label -> value, listed under the title (checkpoint, model, date).
        drawings: photographs with masks drawn on them, (H, W, 3) uint8, and their names; they come first.

    Returns:
        The path.

    Raises:
        UserError: an example's image and masks differ in size.
        KeyError: `examples` has a key that SECTIONS lacks.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=title,
        facts=facts,
        drawings=[(name, _data_uri(drawing)) for name, drawing in drawings],
        columns=("split", *METRIC_NAMES, "expressions"),
        results=[(row_name(result), [*percentages(result), f"{result['expressions']:,}"]) for result in results],
        notes=[*protocol_lines(results), *_extras(results)],
        charts=run_charts(curves),
        chart_size=(WIDTH, HEIGHT),
        sections=[(kind, *SECTIONS[kind], map(_card, members)) for kind, members in examples.items() if members],
        prediction_color=_css(PREDICTION_COLOR),
        truth_color=_css(TRUTH_COLOR),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD
    write_text(path, page.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return path


def read_log(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's `metrics.jsonl`, for `write_report`.

    Raises:
        UserError: the file is missing, or a line is not a JSON object.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: leave out --metrics, or give the metrics.jsonl of a run")
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"a line is {shown(rows[-1])}")
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8 or not JSON
        raise UserError(f"{file} is not the log of a run ({error}): give the metrics.jsonl of a run") from None
    return rows


def _extras(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The other texts and numbers of the results, one line per result that has some."""
    known = {"split", *METRIC_NAMES, "expressions", "protocol", "data"}
    lines = []
    for result in results:
        extra = [f"{k} {v}" for k, v in result.items() if k not in known and isinstance(v, str | int | float)]
        if extra:
            lines.append(f"{row_name(result)}: {', '.join(extra)}")
    return lines


def _card(example: Example) -> dict[str, Any]:
    """The values of an example in the template."""
    check_sizes(example.image, example.truth, example.prediction)
    image, truth, prediction = _at_display_size(example)
    return {
        "example": example,
        "iou": f"{100 * example.iou:.1f}",
        "image": _data_uri(image),
        "overlay": _data_uri(comparison(image, truth, prediction)),
    }


def _at_display_size(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and masks at the size of the embedded image: large ones shrunk, small ones enlarged pixel by pixel.

    Enlarging before drawing keeps the lines thin on a 64-pixel scene.
    """
    image, truth, prediction = example.image, example.truth, example.prediction
    height, width = truth.shape
    if max(height, width) <= MAX_SIDE:
        factor = MAX_SIDE // max(height, width)
        return enlarged(image, factor), enlarged(truth, factor), enlarged(prediction, factor)
    scale = MAX_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrunk = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return shrunk, _shrunk(truth, size), _shrunk(prediction, size)


def _shrunk(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another (width, height); a pixel belongs to it where most of it does."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
