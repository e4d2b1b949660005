"""One self-contained HTML page of a run: scores, curves, and the best, worst and randomly drawn expressions.

The page needs neither network nor script: images are embedded, curves are inline SVG drawn here, and its content
security policy forbids everything else. Sentences come from data sets and are escaped wherever they appear.

The random cards are the honest ones: best and worst show the range, a seeded draw from all expressions shows the model.
"""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cmmasksd.data.samples import ReferringDataset
from cmmasksd.errors import UserError, shown
from cmmasksd.evaluation.protocols import METRIC_NAMES, ORIGINAL
from cmmasksd.evaluation.results import ExpressionScore, percentages, protocol_lines, row_name, write_atomically
from cmmasksd.inference.visualize import PREDICTION_COLOR, TRUTH_COLOR, check_sizes, comparison

if TYPE_CHECKING:
    from cmmasksd.inference.predictor import Segmenter

LOSS_CURVES = {
    "loss": "loss (total)",
    "seg": "segmentation",
    "lmvsd": "LMVSD",
    "vmlsd": "VMLSD",
    "joint": "both at once",
}
"""Key in `metrics.jsonl` -> name in the legend. A curve whose key is in no row is left out."""

SCORE_CURVES = {"oIoU": "oIoU", "mIoU": "mIoU"}

SECTIONS = {
    "best": ("Best", "The expressions with the highest IoU; ties are drawn by lot."),
    "worst": ("Worst", "The expressions with the lowest IoU; ties are drawn by lot."),
    "random": ("Random sample", "Drawn from all expressions with a fixed seed, whatever they scored."),
}

_MAX_POINTS = 200  # per curve: more than the chart has room for only makes the page heavy
_MAX_SIDE = 512  # pixels of an embedded image's long side
_MAX_VALUE = 1e100  # beyond it a logged value counts as infinite, so that no sum or difference of two overflows


@dataclass(frozen=True, slots=True)
class Example:
    """One expression to show.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        sentence: as given; escaped when written.
        truth: (H, W) bool.
        prediction: (H, W) bool.
        iou: a fraction of 1.
        sent_id: the expression.
        image_id: its image.
    """

    image: np.ndarray
    sentence: str
    truth: np.ndarray
    prediction: np.ndarray
    iou: float
    sent_id: int
    image_id: int


def choose_examples(rows: Sequence[ExpressionScore], n: int, seed: int = 0) -> dict[str, list[int]]:
    """Which expressions to show: the n best, the n worst, and n drawn from all.

    The choice depends on the rows and the seed, not on the rows' order. Ties are drawn by lot, for otherwise the many
    expressions with IoU 0 would be represented by the first image.

    Args:
        rows: the scored expressions of a split.
        n: how many of each kind; fewer where there are fewer rows, and then the kinds overlap.
        seed: of the draw.

    Returns:
        "best", "worst" and "random" -> sent_ids; the best start with the best, the worst with the worst.
    """
    drawn = sorted(rows, key=lambda row: row.sent_id)
    random.Random(seed).shuffle(drawn)
    ascending = sorted(drawn, key=lambda row: row.iou)  # stable: ties keep the drawn order
    descending = sorted(drawn, key=lambda row: -row.iou)
    chosen = {"best": descending, "worst": ascending, "random": drawn}
    return {kind: [row.sent_id for row in ordered[:n]] for kind, ordered in chosen.items()}


def read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, for `write_report`.

    Raises:
        UserError: the file is missing, or a line is not a JSON object.
    """
    if not file.is_file():
        raise UserError(f"there is no log {file}: leave out --metrics, or give the metrics.jsonl of a run")
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


def collect_examples(
    data: ReferringDataset, segmenter: Segmenter, chosen: Mapping[str, Sequence[int]]
) -> dict[str, list[Example]]:
    """Predict the chosen expressions again and gather what a card shows.

    Args:
        data: the split they are from.
        segmenter: the model that was scored, with the same threshold.
        chosen: kind -> sent_ids, see `choose_examples`.

    Raises:
        UserError: an expression is not in the split.
    """
    wanted = {sent_id for sent_ids in chosen.values() for sent_id in sent_ids}
    made: dict[int, Example] = {}
    for index in range(len(data)):
        if len(made) == len(wanted):
            break
        reference = data[index]
        expressions = [e for e in reference.expressions if e.sent_id in wanted]
        if not expressions:
            continue
        image, truth = data.image(reference), data.mask(reference)
        for expression, found in zip(expressions, segmenter.segment(image, [e.text for e in expressions]), strict=True):
            iou = ORIGINAL.iou(int((found.mask & truth).sum()), int((found.mask | truth).sum()))
            made[expression.sent_id] = Example(
                image, expression.text, truth, found.mask, iou, expression.sent_id, reference.image_id
            )
    if lost := wanted - made.keys():
        raise UserError(f"{data.name} {data.split} has no expression {min(lost)}: score the model on this data first")
    return {kind: [made[sent_id] for sent_id in sent_ids] for kind, sent_ids in chosen.items()}


def write_report(
    path: Path,
    *,
    title: str,
    results: Sequence[Mapping[str, Any]],
    examples: Mapping[str, Sequence[Example]],
    curves: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page, atomically.

    Args:
        path: the HTML file; its folder is made if missing.
        title: of the page.
        results: one per split, as `read_results` gives them; their extra texts and numbers are listed under the table.
        examples: SECTIONS' keys -> examples, shown in the order given.
        curves: the rows of `metrics.jsonl`: dictionaries with a `step` and any of the keys of LOSS_CURVES and
            SCORE_CURVES. Other rows and keys are ignored.
        facts: label -> value, listed under the title (checkpoint, model, date).

    Returns:
        The path.

    Raises:
        UserError: an example's image and masks differ in size.
        KeyError: `examples` has a key that SECTIONS lacks.
    """
    body = [f"<header><h1>{_text(title)}</h1>{_definitions(facts or {})}</header>", _scores_section(results)]
    body.append(_curves_section(curves))
    for kind, members in examples.items():
        heading, explanation = SECTIONS[kind]
        if members:
            cards = "\n".join(_card(example) for example in members)
            body.append(
                f'<section aria-labelledby="{kind}"><h2 id="{kind}">{heading}</h2><p class="note">{explanation} {_KEY}'
                f'</p>\n<div class="cards">\n{cards}\n</div></section>'
            )
    page = _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(part for part in body if part))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _text(value: object) -> str:
    """A value as HTML text, safe in attributes too; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
    return escape(str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace"), quote=True)


def _definitions(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    return "<dl>" + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items()) + "</dl>"


def _scores_section(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of all splits, how it was scored, and what else each result says."""
    if not results:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("split", *METRIC_NAMES, "expressions"))
    rows = "\n".join(
        f'<tr><th scope="row">{_text(row_name(result))}</th>'
        + "".join(f"<td>{cell}</td>" for cell in (*percentages(result), f"{result['expressions']:,}"))
        + "</tr>"
        for result in results
    )
    known = {"split", *METRIC_NAMES, "expressions", "protocol", "data"}
    notes = [_text(line) for line in protocol_lines(results)]
    for result in results:
        extra = [f"{k} {v}" for k, v in result.items() if k not in known and isinstance(v, str | int | float)]
        if extra:
            notes.append(_text(f"{row_name(result)}: {', '.join(extra)}"))
    return (
        '<section aria-labelledby="scores"><h2 id="scores">Scores</h2>\n'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="scores"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
        '<p class="note">In percent. oIoU: sum of intersections over sum of unions. mIoU: mean of the IoU of every'
        " expression. P@X: share of expressions whose IoU reaches X.</p>\n"
        + "".join(f'<p class="note">{note}</p>' for note in notes)
        + "</section>"
    )


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves_section(rows: Sequence[Mapping[str, Any]]) -> str:
    charts = []
    losses = {name: _points(rows, key) for key, name in LOSS_CURVES.items()}
    if any(losses.values()):
        charts.append(_chart("Training loss", losses))
    scores = {name: [(x, 100 * y) for x, y in _points(rows, key)] for key, name in SCORE_CURVES.items()}
    if any(scores.values()):
        charts.append(_chart("Validation score, percent", scores))
    if not charts:
        return ""
    return (
        '<section aria-labelledby="curves"><h2 id="curves">Curves</h2>\n<div class="charts">'
        + "\n".join(charts)
        + "</div></section>"
    )


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The (step, value) points of one key; values that are not finite are included, steps that are not are left out."""
    pairs = [(row.get("step"), row.get(key)) for row in rows]
    numbers = [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]
    return [(float(x), float(y) if abs(y) < _MAX_VALUE else math.nan) for x, y in numbers if abs(x) < _MAX_VALUE]


def _thinned(points: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """At most _MAX_POINTS points, each the mean of that many neighbours; and how many neighbours."""
    size = math.ceil(len(points) / _MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], size


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover low to high."""
    span = max((high - low) or abs(high) or 1.0, 1e-9 * max(abs(low), abs(high)), 1e-99)
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _chart(title: str, curves: Mapping[str, list[tuple[float, float]]]) -> str:
    """One figure: an SVG with axes and a legend. Curves differ in dash as well as colour.

    NaN and infinity have no place on an axis: they are left out of the curve, and counted under it.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    lost = sum(len(points) for points in curves.values()) - sum(len(points) for points in finite.values())
    note = f" {lost} logged values were NaN or infinite and are not drawn." if lost else ""
    thinned = {name: _thinned(points) for name, points in finite.items() if points}
    if not thinned:
        return f'<figure class="chart"><figcaption>{_text(title)}</figcaption><p class="note">{note}</p></figure>'
    every = [point for points in finite.values() for point in points]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 5), _ticks(min(0.0, *ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9 * max(1.0, abs(min(xs))))
    width, height, left, right, top, bottom = 480, 270, 50, 14, 10, 40

    def at_x(x: float) -> float:
        return left + (width - left - right) * (x - x_low) / (x_high - x_low)

    def at_y(y: float) -> float:
        return height - bottom - (height - top - bottom) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        if x_low <= x <= x_high:
            base = height - bottom
            parts.append(f'<line class="axis" x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text x="{at_x(x):.1f}" y="{base + 17}" text-anchor="middle">{_number(x)}</text>')
    parts.append(f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">step</text>')

    legend = []
    for index, (name, points) in enumerate(curves.items()):
        if name not in thinned:
            continue
        shown, _ = thinned[name]
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in shown)
        parts.append(f'<polyline class="curve c{index}" points="{path}"/>')
        if len(shown) <= 30:  # few enough that each point is a measurement to be seen
            parts += [f'<circle class="dot c{index}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.6"/>' for x, y in shown]
        legend.append(
            f'<li><svg width="28" height="10" aria-hidden="true"><line class="curve c{index}" x1="0" x2="28" y1="5"'
            f' y2="5"/></svg>{_text(name)} <b>{_number(points[-1][1])}</b></li>'
        )
    size = max(size for _, size in thinned.values())
    note += f" Each point is the mean of up to {size} logged values." if size > 1 else ""
    label = _text(f"{title} over training steps: " + ", ".join(thinned))
    return (
        f'<figure class="chart"><figcaption>{_text(title)}</figcaption>\n'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>\n'
        f'<ul class="legend">{"".join(legend)}</ul><p class="note">The number is the last logged value.{note}</p>'
        "</figure>"
    )


# --- cards ------------------------------------------------------------------------------------------------------------


def _card(example: Example) -> str:
    check_sizes(example.image, example.truth, example.prediction)
    image, truth, prediction = _at_display_size(example)
    sentence, iou = _text(example.sentence), f"{100 * example.iou:.1f} %"
    return (
        f'<figure class="card"><div class="pair"><img src="{_data_uri(image)}" alt="Image {example.image_id}">'
        f'<img src="{_data_uri(comparison(image, truth, prediction))}"'
        f' alt="Prediction and truth for: {sentence}. IoU {iou}"></div>\n'
        f'<figcaption><p class="sentence" dir="auto">{sentence}</p>'
        f'<p class="score"><span class="bar" aria-hidden="true"><i style="width:{100 * example.iou:.1f}%"></i></span>'
        f'<b>IoU {iou}</b></p><p class="note">expression {example.sent_id}, image {example.image_id}</p>'
        "</figcaption></figure>"
    )


def _at_display_size(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and masks at the size of the embedded picture: large ones shrunk, small ones enlarged pixel by pixel.

    Enlarging before drawing keeps the truth's line thin on a 64-pixel scene.
    """
    arrays = (example.image, example.truth, example.prediction)
    height, width = example.truth.shape
    if max(height, width) > _MAX_SIDE:
        scale = _MAX_SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(example.image).resize(size, Image.Resampling.LANCZOS))
        # A shrunk pixel belongs to the mask where most of it does.
        truth, prediction = (
            np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128
            for mask in arrays[1:]
        )
        return image, truth, prediction
    factor = _MAX_SIDE // max(height, width)
    image, truth, prediction = (array.repeat(factor, axis=0).repeat(factor, axis=1) for array in arrays)
    return image, truth, prediction


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    # Full colour resolution (subsampling 0): otherwise JPEG smears the thin coloured line.
    Image.fromarray(image).save(buffer, format="JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _css(color: tuple[int, int, int]) -> str:
    return "#%02x%02x%02x" % color  # noqa: UP031  (the tuple is the format's argument list)


_KEY = (
    '<span class="key"><span class="swatch fill"></span> prediction</span>'
    ' <span class="key"><span class="swatch line"></span> truth</span>'
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = f"""
:root {{ color-scheme: light dark; --bg: #ffffff; --fg: #1a1f26; --muted: #5a6470; --line: #d5dbe2; --card: #f5f7f9;
  --c0: #1a1f26; --c1: #0072b2; --c2: #d55e00; --c3: #00805d; }}
@media (prefers-color-scheme: dark) {{ :root {{ --bg: #12161b; --fg: #e8ecf0; --muted: #9aa5b1; --line: #333c46;
  --card: #1b2128; --c0: #e8ecf0; --c1: #56b4e9; --c2: #f08a3c; --c3: #2bc79a; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1320px; padding: 1.25rem clamp(.75rem, 3vw, 2rem) 3rem; background: var(--bg);
  color: var(--fg); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .5rem; }}
dl {{ display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; margin: 0; }}
dl div {{ display: flex; gap: .4rem; }}
dt {{ color: var(--muted); }}
dd {{ margin: 0; }}
.note {{ color: var(--muted); font-size: .85rem; margin: .35rem 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .4rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }}
th:first-child {{ text-align: left; padding-left: 0; }}
thead th {{ color: var(--muted); font-weight: 600; font-size: .85rem; }}
td:nth-child(2), td:nth-child(3) {{ font-weight: 700; }}
@media (max-width: 600px) {{ th, td {{ padding: .35rem .4rem; font-size: .85rem; }} }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.5rem; }}
.chart {{ margin: 0; max-width: 640px; }}
.chart figcaption {{ font-weight: 600; }}
.chart > svg {{ width: 100%; height: auto; display: block; }}
.chart text {{ fill: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums; }}
.grid {{ stroke: var(--line); stroke-width: 1; }}
.axis {{ stroke: var(--muted); stroke-width: 1; fill: none; }}
.curve {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
.curve.c0 {{ stroke: var(--c0); }}
.curve.c1 {{ stroke: var(--c1); stroke-dasharray: 7 3; }}
.curve.c2 {{ stroke: var(--c2); stroke-dasharray: 2 3; }}
.curve.c3 {{ stroke: var(--c3); stroke-dasharray: 9 3 2 3; }}
.dot.c0 {{ fill: var(--c0); }} .dot.c1 {{ fill: var(--c1); }}
.dot.c2 {{ fill: var(--c2); }} .dot.c3 {{ fill: var(--c3); }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 0; padding: 0;
  font-size: .9rem; }}
.legend svg {{ vertical-align: middle; margin-right: .4rem; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 1rem; }}
.card {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }}
.pair img {{ width: 100%; aspect-ratio: 4 / 3; object-fit: contain; display: block; }}
.card figcaption {{ padding: .6rem .8rem .5rem; }}
.sentence {{ margin: 0 0 .4rem; font-weight: 600; }}
.score {{ display: flex; align-items: center; gap: .6rem; margin: 0; font-variant-numeric: tabular-nums; }}
.score b {{ white-space: nowrap; min-width: 6.7em; text-align: right; }}
.bar {{ flex: 1; height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; }}
.bar i {{ display: block; height: 100%; background: var(--c1); }}
.key {{ white-space: nowrap; margin-left: .6rem; }}
.swatch {{ display: inline-block; width: 1.1em; height: .8em; border-radius: 2px; }}
.swatch.fill {{ background: {_css(PREDICTION_COLOR)}; opacity: .75; }}
.swatch.line {{ border: 2px solid {_css(TRUTH_COLOR)}; outline: 1px solid #000; }}
@media print {{ .card, .chart {{ break-inside: avoid; }} }}
"""
