"""Make docs/ablation.md and its figures from the result files of the study.

    python benchmarks/ablation/page.py

The text is `ablation.md.in` beside this file. Expressions in double braces are computed here, so that no number on the
page is typed by hand:

    {{table REGIME REFERENCES}}                          every arm: scores, and differences to "none"
    {{slices REGIME REFERENCES ARM BASE SPLIT}}          a difference by kind of sentence and size of object
    {{difference REGIME REFERENCES ARM BASE SPLIT METRIC}}   points and their interval
    {{seeds REGIME REFERENCES ARM BASE SPLIT METRIC}}    the difference of each seed
    {{score REGIME REFERENCES ARM SPLIT METRIC}}         percent, mean over seeds
    {{runs}}                                             number of runs
    {{looks PREFIX …}}                                   figures of correlation.py whose name begins with PREFIX
    {{towers}}                                           scores of text_tower.py
    {{steps}}                                            times of step.py

Unusual here: the bootstrap draws images with all their sentences and all seeds. Its interval covers other images, not
other seeds; for these, see the differences of each seed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from study import ARMS, EQUAL_COMPUTE, HERE, REGIMES, SIZE, SIZES, SPLITS, Run, done

from cmmasksd.evaluation.compare import Comparison, compare, slices_of
from cmmasksd.evaluation.protocols import ORIGINAL
from cmmasksd.evaluation.results import ExpressionScore, read_expressions

DOCS = HERE.parents[1] / "docs"
IMAGES = "images"


class Study:
    """The finished runs in a folder, and the page's text about them.

    Args:
        results: folder of finished runs.
        resamples: number of bootstrap resamples.
    """

    def __init__(self, results: Path, resamples: int = 10_000) -> None:
        self.results, self.resamples, self.runs = results, resamples, done(results)
        self.record = cache(self._record)
        self.rows = cache(self._rows)
        self.compared = cache(self._compared)

    def seeds(self, regime: str, references: int, arm: str) -> dict[int, Run]:
        """Seed -> run."""
        wanted = (regime, references, arm)
        return {run.seed: run for run in self.runs if (run.regime, run.references, run.arm) == wanted}

    def pairs(self, regime: str, references: int, arm: str, base: str) -> list[tuple[Run, Run]]:
        """(base run, arm run) of every seed that both have."""
        a, b = self.seeds(regime, references, base), self.seeds(regime, references, arm)
        return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]

    def _record(self, run: Run) -> dict:
        return json.loads((self.results / run.name / "run.json").read_text())

    def _rows(self, run: Run, split: str) -> list[ExpressionScore]:
        """The rows of a run, with sentence ids that no other seed has, so that all runs of an arm can be one list."""
        rows = read_expressions(self.results / run.name / f"{split}.jsonl.gz")
        return [replace(row, sent_id=row.sent_id + run.seed * 10**12) for row in rows]

    def percent(self, run: Run, split: str, metric: str) -> float:
        """A score of a run."""
        return 100 * self.record(run)["scores"][split][metric]

    def _compared(
        self, regime: str, references: int, arm: str, base: str, split: str, metric: str, sliced: bool
    ) -> list[Comparison]:
        pairs = self.pairs(regime, references, arm, base)
        a, b = ([row for pair in pairs for row in self.rows(pair[i], split)] for i in (0, 1))
        slices = slices_of if sliced else whole
        return compare(a, b, ORIGINAL, metrics=[metric], resamples=self.resamples, slices=slices)

    # -- expressions of the template

    def say_score(self, regime: str, references: str, arm: str, split: str, metric: str) -> str:
        values = [self.percent(run, split, metric) for run in self.seeds(regime, int(references), arm).values()]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    def say_difference(self, regime: str, references: str, arm: str, base: str, split: str, metric: str) -> str:
        (comparison,) = self.compared(regime, int(references), arm, base, split, metric, False)
        return _with_interval(comparison)

    def say_seeds(self, regime: str, references: str, arm: str, base: str, split: str, metric: str) -> str:
        pairs = self.pairs(regime, int(references), arm, base)
        values = [(self.percent(b, split, metric) - self.percent(a, split, metric)) / 100 for a, b in pairs]
        return ", ".join(map(_points, values))

    def say_table(self, regime: str, references: str) -> str:
        lines = [
            "| arm | seeds | val oIoU | val mIoU | testB oIoU | testB mIoU | val oIoU − none | testB oIoU − none |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for arm in [*ARMS, EQUAL_COMPUTE]:
            if not (runs := self.seeds(regime, int(references), arm)):
                continue
            cells = [arm, str(len(runs))]
            cells += [
                self.say_score(regime, references, arm, split, metric)
                for split in SPLITS
                for metric in ("oIoU", "mIoU")
            ]
            paired = arm != "none" and self.pairs(regime, int(references), arm, "none")
            for split in SPLITS:
                cells.append(self.say_difference(regime, references, arm, "none", split, "oIoU") if paired else "")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def say_slices(self, regime: str, references: str, arm: str, base: str, split: str) -> str:
        lines = [f"| sentences | number | oIoU {base} | oIoU {arm} | difference |", "|---|---|---|---|---|"]
        pairs = len(self.pairs(regime, int(references), arm, base))
        for row in self.compared(regime, int(references), arm, base, split, "oIoU", True):
            scores = f"{100 * row.a:.2f} | {100 * row.b:.2f}"
            lines.append(f"| {row.slice} | {row.expressions // pairs} | {scores} | {_with_interval(row)} |")
        return "\n".join(lines)

    def say_runs(self) -> str:
        return str(len(self.runs))

    def say_looks(self, *prefixes: str) -> str:
        models = json.loads((self.results / "correlation.json").read_text())
        lines = ["| percent | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
        for key in {key: None for figures in models.values() for key in figures if key.startswith(prefixes)}:
            cells = [f"{figures[key]:.1f}" if key in figures else "" for figures in models.values()]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def say_towers(self) -> str:
        models = json.loads((self.results / "text_tower.json").read_text())
        lines = ["| model | val oIoU | val mIoU | testB oIoU | testB mIoU |", "|---|---|---|---|---|"]
        for model, scores in models.items():
            cells = [f"{100 * scores[split][metric]:.1f}" for split in SPLITS for metric in ("oIoU", "mIoU")]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def say_steps(self) -> str:
        timed = json.loads((self.results / "step.json").read_text())
        lines = ["| arm | TFLOP | FLOPs × none | time × none | in every turn |", "|---|---|---|---|---|"]
        plain = timed["arms"]["none"]["tflop"]
        for arm, step in timed["arms"].items():
            turns = ", ".join(f"{ratio:.2f}" for ratio in step["ratios"])
            share = step["tflop"] / plain
            lines.append(f"| {arm} | {step['tflop']:.3f} | {share:.2f} | {step['ratio']:.2f} | {turns} |")
        return "\n".join(lines)


def whole(rows: object) -> dict[str, np.ndarray]:
    """The slice of a difference over all sentences."""
    assert isinstance(rows, list)
    return {"all": np.ones(len(rows), bool)}


def _points(value: float) -> str:
    """A fraction as percentage points with its sign."""
    return f"{100 * value:+.2f}".replace("-", "−")


def _with_interval(comparison: Comparison) -> str:
    return f"{_points(comparison.difference)} [{_points(comparison.low)}, {_points(comparison.high)}]"


def fill(template: str, study: Study) -> str:
    """The template with its expressions computed."""

    def text(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        return getattr(study, f"say_{name}")(*arguments)

    return re.sub(r"\{\{(.+?)\}\}", text, template)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw(study: Study, folder: Path) -> list[Path]:
    """The study's figures as SVG: every arm's difference, training-set sizes, training losses."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {"svg.hashsalt": "cmmasksd", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _arms(study, folder / "arms.svg"),
        _sizes(study, folder / "sizes.svg"),
        _losses(study, folder / "losses.svg"),
    ]


def _save(figure, file: Path) -> Path:
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    return file


def _arms(study: Study, file: Path) -> Path:
    from matplotlib.figure import Figure

    arms = [arm for arm in [*ARMS, EQUAL_COMPUTE] if study.pairs("trained", SIZE, arm, "none") and arm != "none"]
    figure = Figure(figsize=(8, 0.27 * len(arms) + 1))
    for axes, split in zip(figure.subplots(1, 2, sharey=True), SPLITS, strict=True):
        axes.axvline(0, color="0.6", linewidth=1)
        for row, arm in enumerate(arms):
            (comparison,) = study.compared("trained", SIZE, arm, "none", split, "oIoU", False)
            many = len(study.pairs("trained", SIZE, arm, "none")) > 1
            interval = [100 * comparison.low, 100 * comparison.high]
            axes.plot(interval, [row, row], color="tab:blue", linewidth=3 if many else 1)
            axes.plot(100 * comparison.difference, row, "o", color="tab:blue", markersize=6 if many else 4)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_title(f"{split}: oIoU points over no distillation")
        axes.grid(axis="x", color="0.9")
    axes.invert_yaxis()
    return _save(figure, file)


def _sizes(study: Study, file: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    for axes, split in zip(figure.subplots(1, 2, sharey=True), SPLITS, strict=True):
        for arm, style in (("none", "o--"), ("both", "s-")):
            sizes = [size for size in SIZES if study.seeds("trained", size, arm)]
            values = [
                [study.percent(run, split, "oIoU") for run in study.seeds("trained", s, arm).values()] for s in sizes
            ]
            means = [statistics.mean(of_size) for of_size in values]
            axes.errorbar(
                sizes,
                means,
                yerr=[statistics.stdev(of_size) if len(of_size) > 1 else 0 for of_size in values],
                fmt=style,
                capsize=3,
                label={"none": "no distillation", "both": "both branches"}[arm],
            )
        axes.set_xscale("log")
        axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axes.minorticks_off()
        axes.set_xlabel("references to learn from")
        axes.set_title(f"{split}, oIoU in percent (bars: standard deviation over seeds)", fontsize=8)
        axes.grid(color="0.9")
    axes.legend()
    return _save(figure, file)


def _losses(study: Study, file: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    for axes, regime in zip(figure.subplots(1, 2), REGIMES, strict=True):
        for arm, style in (("none", "--"), ("both", "-"), ("random", ":")):
            runs = list(study.seeds(regime, SIZE, arm).values())
            logs = [
                [json.loads(line) for line in (study.results / run.name / "metrics.jsonl").read_text().splitlines()]
                for run in runs
            ]
            points = [[(row["step"], row["seg"]) for row in log if "seg" in row] for log in logs]
            if points:
                steps, losses = np.mean([run_points[: min(map(len, points))] for run_points in points], axis=0).T
                axes.plot(steps, losses, style, label=f"{arm}, {len(runs)} seed{'s' * (len(runs) > 1)}")
        axes.set_title(REGIMES[regime].title, fontsize=8)
        axes.set_xlabel("step")
        axes.grid(color="0.9")
        if axes.lines:
            axes.legend()
    figure.axes[0].set_ylabel("main branch's training loss")
    return _save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS, help="(default: %(default)s)")
    options = parser.parse_args()
    study = Study(options.results)
    (options.out / "ablation.md").write_text(fill((HERE / "ablation.md.in").read_text(), study))
    draw(study, options.out / IMAGES)


if __name__ == "__main__":
    main()
