"""Does masked self-distillation pay, and which reading of it pays most? The whole study, run or resumed by one command.

    python benchmarks/ablation/study.py list                 # every run that is declared below, and which are done
    python benchmarks/ablation/study.py run [--only both none-compute …]
    python benchmarks/ablation/study.py tables > docs/ablation-tables.md

A run is training and scoring (val and testB) in processes of their own. What it leaves in `results/` is all that the
tables are made from; a run that is there is not run again, and one that was cut off goes on where it stopped. The
folder moves between machines: run a part here and a part there.

Unusual here: the *last* model of a run is scored, never the best one of several validations, which would be chosen on
the very sentences that are reported. And an arm at equal compute gets its share in FLOPs, counted and not timed, so
that the plan is the same on every machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SPLITS = ("val", "testB")
SCORED = 1500  # references of each split
SENTENCES = 24_000  # sentence draws of a plain run: epochs x references
SIZE = 2_000  # references to learn from, unless the run is about their number

BASE = {"distillation.start": 0.5, "distillation.warmup": 0.25}
PLAIN = {"distillation.vision": False, "distillation.language": False}
RANDOM = {"distillation.vision_which": "random", "distillation.language_which": "random"}
ARMS: dict[str, dict[str, object]] = {
    "none": PLAIN,
    "lmvsd": {"distillation.language": False},
    "vmlsd": {"distillation.vision": False},
    "both": {},
    "random": RANDOM,
    "opposite": {"distillation.vision_which": "low", "distillation.language_which": "low"},
    "vision-low": {"distillation.vision_which": "low"},
    "language-low": {"distillation.language_which": "low"},
    "unshared": {"distillation.share_weights": False, "distillation.start": 0.0},
    "ground-truth": {"distillation.ground_truth": 1.0},
    "vision-input": {"distillation.vision_level": "input"},
    "language-feature": {"distillation.language_level": "feature"},
    "vision-ratio-0.25": {"distillation.vision_ratio": 0.25},
    "vision-ratio-0.75": {"distillation.vision_ratio": 0.75},
    "language-ratio-0.15": {"distillation.language_ratio": 0.15},
    "language-ratio-0.5": {"distillation.language_ratio": 0.5},
    "weight-0.3": {"distillation.vision_weight": 0.3, "distillation.language_weight": 0.3},
    "weight-3": {"distillation.vision_weight": 3.0, "distillation.language_weight": 3.0},
    "from-the-start": {"distillation.start": 0.0, "distillation.warmup": 0.0},
    "warm-up-0.5": {"distillation.start": 0.0, "distillation.warmup": 0.5},
    "mse": {"distillation.loss": "mse"},
    # MaskRIS's way: two full passes, the second with random parts of image and sentence hidden, both with the truth
    "two-passes": {
        **RANDOM,
        "distillation.joint": True,
        "distillation.vision_level": "blank",
        "distillation.ground_truth": 1.0,
    },
}
EQUAL_COMPUTE = "none-compute"
"""The plain arm with as many FLOPs as "both" takes."""


@dataclass(frozen=True)
class Run:
    """One model: an arm, how many references it learns from, how often it sees them, and a seed."""

    arm: str
    references: int = SIZE
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder in `results/`."""
        return f"{self.arm}-n{self.references}-s{self.seed}"


def plan() -> list[Run]:
    """Every run of the study, in the order of what one wants to know first."""
    headline = [Run(arm, seed=seed) for seed in range(5) for arm in ("none", "both", EQUAL_COMPUTE, "random")]
    screen = [Run(arm) for arm in ARMS]
    sizes = [
        Run(arm, references=size, seed=seed) for size in (500, 8_000) for seed in range(3) for arm in ("none", "both")
    ]
    seeds = [Run(arm, seed=seed) for seed in (1, 2) for arm in ("lmvsd", "vmlsd", "opposite", "two-passes")]
    return list(dict.fromkeys([*headline[:4], *screen, *headline, *sizes, *seeds]))


def settings(run: Run) -> dict[str, object]:
    """The command line keys of a run, but for its folder."""
    arm = PLAIN if run.arm == EQUAL_COMPUTE else ARMS[run.arm]
    share = compute() if run.arm == EQUAL_COMPUTE else 1.0
    epochs = round(SENTENCES * share / run.references)
    return {
        "data.train_references": run.references,
        "training.epochs": epochs,
        "training.validate_every": epochs,
        "training.seed": run.seed,
        "data.scene_seed": run.seed,  # other scenes to learn from; those to score are the same for all
        **BASE,
        **arm,
    }


@cache
def compute() -> float:
    """FLOPs of a whole run with both branches over those of a plain one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cmmasksd.config import Config, DistillationConfig
    from cmmasksd.distillation.objective import MaskedSelfDistillation
    from cmmasksd.training.loop import build

    model, processor = build(Config())
    tokens = processor.tokens(["the large red star on the left"] * 3)
    size = model.config.clip_config.vision_config.image_size
    cells = size // 4
    inputs = torch.zeros(1, 3, size, size), tokens, torch.zeros(3, cells, cells), torch.zeros(3, dtype=torch.long)

    def step(how: DistillationConfig) -> int:
        objective = MaskedSelfDistillation(model, how, model.config.clip_config.projection_dim)
        with FlopCounterMode(display=False) as counter:
            objective(*inputs)["loss"].backward()
        return counter.get_total_flops()

    both = DistillationConfig(start=BASE["distillation.start"])
    ratio = step(both) / step(DistillationConfig(vision=False, language=False))
    return both.start + (1 - both.start) * ratio


def command(*arguments: object) -> None:
    """`cmmasksd …` in a process of its own."""
    subprocess.run([sys.executable, "-m", "cmmasksd", *map(str, arguments)], check=True)


def execute(
    run: Run,
    results: Path,
    work: Path,
    *,
    call: Callable[..., None] = command,
    extra: Sequence[object] = (),
    scored: int = SCORED,
) -> None:
    """Train, score, and leave `results/<name>/`: run.json and the rows of each split."""
    out, keys = work / run.name, settings(run)
    begin = time.perf_counter()
    given = [part for key, value in keys.items() for part in (f"--{key}", json.dumps(value).strip('"'))]
    resume = ["--resume"] if (out / "last" / "state.pt").exists() else []
    call("train", *given, "--training.out", out, *extra, *resume)
    seconds = time.perf_counter() - begin
    new = work / f"{run.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    scores = {}
    for split in SPLITS:
        where = ["--data", "scenes", "--split", split, "--scene_seed", 1000, "--references", scored]
        call("evaluate", "--model", out / "last", *where, "--out", out / split)
        scores[split] = json.loads((out / split / "results.json").read_text())
        rows = (out / split / "expressions.jsonl").read_bytes()
        (new / f"{split}.jsonl.gz").write_bytes(gzip.compress(rows, mtime=0))
    record = {**asdict(run), "settings": keys, "seconds": round(seconds), "resumed": bool(resume), "scores": scores}
    (new / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.copy(out / "metrics.jsonl", new)
    new.replace(results / run.name)


def done(results: Path) -> list[Run]:
    """The runs that are there."""
    return [run for run in plan() if (results / run.name / "run.json").is_file()]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@cache
def rows_of(results: Path, run: Run, split: str) -> list:
    """The rows of one run; sentence ids are made apart by seed, so that the runs of an arm can stand in one list."""
    from cmmasksd.evaluation.results import read_expressions

    rows = read_expressions(results / run.name / f"{split}.jsonl.gz")
    return [replace(row, sent_id=row.sent_id + run.seed * 10**12) for row in rows]


def table(
    results: Path, arms: Sequence[str], references: int, base: str = "none", resamples: int = 10_000
) -> list[str]:
    """Markdown rows: every arm with its scores and its difference to `base` on the seeds that both have."""
    from cmmasksd.evaluation.compare import compare
    from cmmasksd.evaluation.protocols import ORIGINAL

    lines = [
        f"| arm | seeds | val oIoU | val mIoU | testB oIoU | testB mIoU | val oIoU − {base} | testB oIoU − {base} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    there = {(run.arm, run.seed): run for run in done(results) if run.references == references}
    for arm in arms:
        runs = [run for (name, _), run in there.items() if name == arm]
        if not runs:
            continue
        cells = [arm, str(len(runs))]
        for split in SPLITS:
            for metric in ("oIoU", "mIoU"):
                values = [_record(results, run)["scores"][split][metric] * 100 for run in runs]
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.2f}{spread}")
        pairs = [(there[base, run.seed], run) for run in runs if (base, run.seed) in there]
        for split in SPLITS:
            if arm == base or not pairs:
                cells.append("")
                continue
            a, b = ([row for pair in pairs for row in rows_of(results, pair[i], split)] for i in (0, 1))
            found = compare(a, b, ORIGINAL, metrics=["oIoU"], resamples=resamples, slices=whole)[0]
            interval = f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
            cells.append(f"{100 * found.difference:+.2f} {interval} ({len(pairs)})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def whole(rows: list) -> dict[str, np.ndarray]:
    """The one slice of a table's differences."""
    return {"all": np.ones(len(rows), bool)}


def tables(results: Path, resamples: int = 10_000) -> str:
    """All tables, as Markdown."""
    sizes = sorted({run.references for run in plan()})
    arms = [*ARMS, EQUAL_COMPUTE]
    parts = [
        "Percent. Mean ± standard deviation over seeds; differences in points with the 95 % interval of a paired",
        "bootstrap over images (all seeds of an image are drawn together); in brackets the number of pairs of seeds.",
    ]
    for size in sizes:
        if any(run.references == size for run in done(results)):
            parts += ["", f"## {size:,} references", "", *table(results, arms, size, resamples=resamples)]
    return "\n".join(parts) + "\n"


@cache
def _record(results: Path, run: Run) -> dict:
    return json.loads((results / run.name / "run.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "run", "tables"])
    parser.add_argument("--only", nargs="+", metavar="ARM", help="runs of these arms")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of unfinished runs")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - {run.arm for run in plan()}:
        parser.error(f"there is no arm {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}, {EQUAL_COMPUTE}")
    runs = [run for run in plan() if not options.only or run.arm in options.only]
    finished = set(done(options.results))
    if options.what == "tables":
        print(tables(options.results), end="")
    elif options.what == "list":
        for run in runs:
            print(f"{'done' if run in finished else '    '}  {run.name}")
        print(f"{len(finished & set(runs))} of {len(runs)} runs are done")
    else:
        options.results.mkdir(parents=True, exist_ok=True)
        for number, run in enumerate(runs, 1):
            if run not in finished:
                print(f"== run {number} of {len(runs)}: {run.name}", flush=True)
                execute(run, options.results, options.work)


if __name__ == "__main__":
    main()
