"""The ablation study of masked self-distillation: every run, started or resumed by one command.

    python benchmarks/ablation/study.py list         # every run that is declared below, and which are done
    python benchmarks/ablation/study.py run [--only both none-compute …]
    python benchmarks/ablation/page.py               # docs/ablation.md and its figures, from the result files

A run is training and scoring (val and testB). The tables are made only from what it leaves in `results/`. A finished
run is not repeated, an interrupted one resumes. The folder may be moved between machines, each of which does a part.
On two cores, two processes with one thread each (`--part 1/2` and `--part 2/2`, OMP_NUM_THREADS=1) are faster than one
process with two threads; then run `study.py trunk` first, which both start from.

Unusual here: the *last* model of a run is scored, not the best of several validations, which would be chosen on the
very sentences that are reported. And the arm at equal compute gets its share in FLOPs, counted and not timed, so that
the plan is the same on every machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmmasksd.config import Config

HERE = Path(__file__).parent
SPLITS = ("val", "testB")
SCORING = {"references": 500, "scene_seed": 1000}
"""Scenes that are scored, of each split: the same for all runs."""
SIZE = 500
"""Training references, unless the run is about their number."""
SIZES = (150, 500, 1_500)
NETWORK: dict[str, object] = {
    "model.decoder_width": 128,
    "model.decoder_mlp": 256,
    "model.head_width": 48,
    "data.val_references": 60,  # nothing is chosen by it
    "data.workers": 0,
}
"""The defaults for scenes, repeated so that a change of them does not change the study."""


@dataclass(frozen=True)
class Regime:
    """What a model starts from and what it learns.

    Attributes:
        title: heading of its tables.
        draws: sentence draws of a plain run: epochs x references.
        settings: settings of a training run, by their keys on the command line.
    """

    title: str
    draws: int
    settings: dict[str, object]


REGIMES = {
    "clip": Regime(
        "From the small CLIP",
        6_000,
        {"distillation.start": 0.25, "distillation.warmup": 0.25},
    ),
    "trained": Regime(
        "From a model that can segment, to sentences of another kind",
        3_000,
        {
            "data.name": "scenesg",
            "training.lr": 5e-4,
            "training.warmup_steps": 20,
            "distillation.start": 0.0,
            "distillation.warmup": 0.25,
        },
    ),
}
TRUNK: dict[str, object] = {
    "data.train_references": 40_000,
    "data.scene_seed": 2000,
    "training.clip_lr_scale": 0.3,
    "training.save_every": 500,
    "distillation.vision": False,
    "distillation.language": False,
}
"""The run that the models of regime "trained" start from: no masked branches, scenes of the short style."""

FIRST_READING: dict[str, object] = {
    "distillation.vision_which": "high",
    "distillation.language_which": "high",
    "distillation.vision_guide": "max",
    "distillation.correlation": "patches",
    "distillation.vision_ratio": 0.5,
    "distillation.language_ratio": 0.3,
    "distillation.vision_level": "feature",
    "distillation.language_level": "input",
    "distillation.loss": "kl",
    "distillation.vision_weight": 1.0,
    "distillation.language_weight": 1.0,
    "distillation.ground_truth": 0.0,
}
"""The settings that every arm varies, repeated so that a change of the defaults does not change the study."""

PLAIN: dict[str, object] = {"distillation.vision": False, "distillation.language": False}
RANDOM: dict[str, object] = {"distillation.vision_which": "random", "distillation.language_which": "random"}
ARMS: dict[str, dict[str, object]] = {
    "none": PLAIN,
    "lmvsd": {"distillation.language": False},
    "vmlsd": {"distillation.vision": False},
    "both": {},
    "random": RANDOM,
    "opposite": {"distillation.vision_which": "low", "distillation.language_which": "low"},
    "ground-truth": {"distillation.ground_truth": 1.0},
    # as in MaskRIS: two full passes, both supervised, the second with random parts of image and sentence hidden
    "two-passes": {
        **RANDOM,
        "distillation.joint": True,
        "distillation.vision_level": "blank",
        "distillation.ground_truth": 1.0,
    },
    "unshared": {"distillation.share_weights": False, "distillation.start": 0.0},
    "vision-input": {"distillation.vision_level": "input"},
    "language-feature": {"distillation.language_level": "feature"},
    "vision-ratio-0.25": {"distillation.vision_ratio": 0.25},
    "vision-ratio-0.75": {"distillation.vision_ratio": 0.75},
    "language-ratio-0.15": {"distillation.language_ratio": 0.15},
    "language-ratio-0.5": {"distillation.language_ratio": 0.5},
    "weight-0.3": {"distillation.vision_weight": 0.3, "distillation.language_weight": 0.3},
    "weight-3": {"distillation.vision_weight": 3.0, "distillation.language_weight": 3.0},
    "mse": {"distillation.loss": "mse"},
    "from-the-start": {"distillation.start": 0.0, "distillation.warmup": 0.0},
    "warm-up-0.5": {"distillation.start": 0.0, "distillation.warmup": 0.5},
    "sentence": {"distillation.vision_guide": "sentence"},
    "vision-low": {"distillation.vision_which": "low"},
    "language-low": {"distillation.language_which": "low"},
    "values": {"distillation.correlation": "values"},
}
EQUAL_COMPUTE = "none-compute"
"""The plain arm with as many FLOPs as "both"."""


@dataclass(frozen=True)
class Run:
    """One model: its arm, its number of training references, and its seed (of its scenes, too)."""

    arm: str
    regime: str = "clip"
    references: int = SIZE
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder in `results/`."""
        return f"{self.regime}-{self.arm}-n{self.references}-s{self.seed}"


def plan() -> list[Run]:
    """Every run of the study, the most informative ones first."""
    main = ("none", "both", EQUAL_COMPUTE, "random")
    runs = [Run(arm, "trained") for arm in ARMS]
    runs += [Run(arm, "trained", seed=seed) for seed in range(5) for arm in main]
    runs += [Run(arm, "trained", size, seed) for size in SIZES for seed in range(3) for arm in ("none", "both")]
    runs += [Run(arm, seed=seed) for seed in range(3) for arm in main]
    return list(dict.fromkeys(runs))


def settings(run: Run, trunk: Path) -> dict[str, object]:
    """The settings of a run except its folder, by their keys on the command line.

    Args:
        run: the run.
        trunk: folder of the model that regime "trained" starts from.
    """
    regime = REGIMES[run.regime]
    arm = PLAIN if run.arm == EQUAL_COMPUTE else ARMS[run.arm]
    start = {"model.weights": str(trunk)} if run.regime == "trained" else {}
    values = {
        "data.train_references": run.references,
        "training.seed": run.seed,
        "data.scene_seed": run.seed,  # training scenes only: those that are scored are the same for all
        **NETWORK,
        **FIRST_READING,
        **regime.settings,
        **start,
        **arm,
    }
    share = compute(run.regime) if run.arm == EQUAL_COMPUTE else 1.0
    epochs = round(regime.draws * share / run.references)
    return values | {"training.epochs": epochs, "training.validate_every": epochs}


def config(values: Mapping[str, object], **training: object) -> Config:
    """The settings as an object; `training` adds some to those of the section of this name."""
    from cmmasksd.config import Config, DataConfig, DistillationConfig, ModelConfig, TrainingConfig

    sections: dict[str, dict] = {"data": {}, "model": {}, "distillation": {}, "training": training}
    for key, value in values.items():
        section, name = key.split(".")
        sections[section][name] = value
    return Config(
        DataConfig(**sections["data"]),
        ModelConfig(**sections["model"]),
        DistillationConfig(**sections["distillation"]),
        TrainingConfig(**sections["training"]),
    )


@cache
def compute(regime: str) -> float:
    """FLOPs of a whole run with both branches over those of a plain one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cmmasksd.distillation.objective import MaskedSelfDistillation
    from cmmasksd.training.build import build

    model, processor = build(config(NETWORK))
    tokens = processor.tokens(["the large red star on the left"] * 3)
    size = model.config.encoder.image_size
    cells = size // 4
    inputs = torch.zeros(1, 3, size, size), tokens, torch.zeros(3, cells, cells), torch.zeros(3, dtype=torch.long)

    def flops(values: Mapping[str, object]) -> int:
        distillation = config(values).distillation
        objective = MaskedSelfDistillation(model, distillation, model.config.encoder.joint_width)
        with FlopCounterMode(display=False) as counter:
            objective(*inputs)["loss"].backward()
        return counter.get_total_flops()

    ratio = flops(FIRST_READING) / flops(PLAIN)
    start = REGIMES[regime].settings["distillation.start"]
    assert isinstance(start, float)
    return start + (1 - start) * ratio


def fit(out: Path, values: Mapping[str, object]) -> bool:
    """Train in a folder, or resume the training in it; returns whether it was resumed."""
    from cmmasksd.training.loop import train

    resume = (out / "last" / "state.pt").exists()
    train(config(values, out=str(out), resume=resume))
    return resume


def trunk(work: Path, overrides: Mapping[str, object] = {}) -> Path:
    """The model that regime "trained" starts from; trained now if it does not exist."""
    model = work / "trunk" / "finished"
    if not model.is_dir():
        fit(work / "trunk", NETWORK | TRUNK | overrides)
        shutil.copytree(work / "trunk" / "last", model)
    return model


def execute(
    run: Run,
    results: Path,
    work: Path,
    *,
    overrides: Mapping[str, object] = {},
    scoring: Mapping[str, int] = SCORING,
) -> None:
    """Train, score, and write `results/<name>/`: run.json, the training's log and the rows of each split.

    Args:
        run: the run.
        results: folder of finished runs.
        work: folder of unfinished runs.
        overrides: settings that replace those of the run, for tests.
        scoring: see SCORING.
    """
    from cmmasksd.config import ScoreConfig
    from cmmasksd.evaluation.score import score

    out = work / run.name
    values = settings(run, trunk(work, overrides) if run.regime == "trained" else work)
    begin = time.perf_counter()
    resumed = fit(out, values | overrides)
    seconds = time.perf_counter() - begin
    new = results / f".{run.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    scores = {}
    for split in SPLITS:
        data = str(values.get("data.name", "scenes"))
        scored = ScoreConfig(model=str(out / "last"), data=data, split=split, **scoring)
        scores[split] = score(scored, out / split).as_dict()
        del scores[split]["model"]  # a path of this machine
        rows = (out / split / "expressions.jsonl").read_bytes()
        (new / f"{split}.jsonl.gz").write_bytes(gzip.compress(rows, mtime=0))
    portable = values | {"model.weights": "trunk"} if run.regime == "trained" else values
    record = {**asdict(run), "settings": portable, "seconds": round(seconds), "resumed": resumed, "scores": scores}
    (new / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.copy(out / "metrics.jsonl", new)
    new.replace(results / run.name)


def done(results: Path) -> list[Run]:
    """The finished runs."""
    return [run for run in plan() if (results / run.name / "run.json").is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "trunk", "run"])
    parser.add_argument("--only", nargs="+", metavar="ARM", help="runs of these arms")
    parser.add_argument("--regime", choices=REGIMES, help="runs of this regime")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th run, from the I-th on")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of unfinished runs")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - {run.arm for run in plan()}:
        parser.error(f"unknown arm {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}, {EQUAL_COMPUTE}")
    first, parts = map(int, options.part.split("/"))
    runs = [
        run for run in plan() if run.arm in (options.only or run.arm) and run.regime == (options.regime or run.regime)
    ][first - 1 :: parts]
    finished = set(done(options.results))
    if options.action == "list":
        for run in runs:
            print(f"{'done' if run in finished else '    '}  {run.name}")
        print(f"{len(finished & set(runs))} of {len(runs)} runs are done")
    elif options.action == "trunk":
        print(trunk(options.work))
    else:
        options.results.mkdir(parents=True, exist_ok=True)
        for number, run in enumerate(runs, 1):
            if run not in finished:
                print(f"== run {number} of {len(runs)}: {run.name}", flush=True)
                execute(run, options.results, options.work)


if __name__ == "__main__":
    main()
