"""Does masked self-distillation pay, and which reading of it pays most? The whole study, run or resumed by one command.

    python benchmarks/ablation/study.py list         # every run that is declared below, and which are done
    python benchmarks/ablation/study.py run [--only both none-compute …]
    python benchmarks/ablation/page.py               # docs/ablation.md and its pictures, from the result files

A run is training and scoring (val and testB). What it leaves in `results/` is all that the tables are made from; a run
that is there is not run again, and one that was cut off goes on where it stopped. The folder moves between machines:
run a part here and a part there. Two processes with a thread each (`--part 1/2` and `--part 2/2`, OMP_NUM_THREADS=1)
get more out of two cores than one with two; run `study.py trunk` first, then, which both go on from.

Unusual here: the *last* model of a run is scored, never the best one of several validations, which would be chosen on
the very sentences that are reported. And an arm at equal compute gets its share in FLOPs, counted and not timed, so
that the plan is the same on every machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SPLITS = ("val", "testB")
SCORED = 500  # references of each split
SCORED_SEED = 1000  # of their scenes: the same for all runs
SIZE = 500  # references to learn from, unless the run is about their number
SIZES = (150, 500, 1_500)
# The default for scenes, said here so that a change of it does not change the study.
NETWORK = {
    "model.decoder_width": 128,
    "model.decoder_mlp": 256,
    "model.head_width": 48,
    "data.val_references": 60,  # nothing is chosen by it
    "data.workers": 0,
}


@dataclass(frozen=True)
class Regime:
    """What a model starts from and what it learns.

    Attributes:
        title: of its tables.
        draws: sentence draws of a plain run: epochs x references.
        settings: keys of the command line.
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
TRUNK = {
    "data.train_references": 40_000,
    "data.scene_seed": 2000,
    "training.clip_lr_scale": 0.3,
    "training.save_every": 500,
    "distillation.vision": False,
    "distillation.language": False,
}
"""The run that the models of regime "trained" start from: no masked branches, scenes of the short style."""

FIRST_READING = {
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
"""What every arm changes something of, said here so that a change of the defaults does not change the study."""

PLAIN = {"distillation.vision": False, "distillation.language": False}
RANDOM = {"distillation.vision_which": "random", "distillation.language_which": "random"}
ARMS: dict[str, dict[str, object]] = {
    "none": PLAIN,
    "lmvsd": {"distillation.language": False},
    "vmlsd": {"distillation.vision": False},
    "both": {},
    "random": RANDOM,
    "opposite": {"distillation.vision_which": "low", "distillation.language_which": "low"},
    "ground-truth": {"distillation.ground_truth": 1.0},
    # MaskRIS's way: two full passes, the second with random parts of image and sentence hidden, both with the truth
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
"""The plain arm with as many FLOPs as "both" takes."""


@dataclass(frozen=True)
class Run:
    """One model: an arm, how many references it learns from, and a seed (of its scenes, too)."""

    arm: str
    regime: str = "clip"
    references: int = SIZE
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder in `results/`."""
        return f"{self.regime}-{self.arm}-n{self.references}-s{self.seed}"


def plan() -> list[Run]:
    """Every run of the study, in the order of what one wants to know first."""
    main = ("none", "both", EQUAL_COMPUTE, "random")
    runs = [Run(arm, "trained") for arm in ARMS]
    runs += [Run(arm, "trained", seed=seed) for seed in range(5) for arm in main]
    runs += [Run(arm, "trained", size, seed) for size in SIZES for seed in range(3) for arm in ("none", "both")]
    runs += [Run(arm, seed=seed) for seed in range(3) for arm in main]
    return list(dict.fromkeys(runs))


def settings(run: Run, trunk: Path) -> dict[str, object]:
    """The command line keys of a run, but for its folder. `trunk`: the model that regime "trained" starts from."""
    regime = REGIMES[run.regime]
    arm = PLAIN if run.arm == EQUAL_COMPUTE else ARMS[run.arm]
    start = {"model.weights": str(trunk)} if run.regime == "trained" else {}
    known = {
        "data.train_references": run.references,
        "training.seed": run.seed,
        "data.scene_seed": run.seed,  # other scenes to learn from; those to score are the same for all
        **NETWORK,
        **FIRST_READING,
        **regime.settings,
        **start,
        **arm,
    }
    share = compute(run.regime) if run.arm == EQUAL_COMPUTE else 1.0
    epochs = round(regime.draws * share / run.references)
    return known | {"training.epochs": epochs, "training.validate_every": epochs}


@cache
def compute(regime: str) -> float:
    """FLOPs of a whole run with both branches over those of a plain one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cmmasksd.config import Config, DistillationConfig
    from cmmasksd.distillation.objective import MaskedSelfDistillation
    from cmmasksd.training.build import build

    config = Config()
    for key, value in NETWORK.items():
        part, name = key.split(".")
        setattr(getattr(config, part), name, value)
    model, processor = build(config)
    tokens = processor.tokens(["the large red star on the left"] * 3)
    size = model.config.clip_config.vision_config.image_size
    cells = size // 4
    inputs = torch.zeros(1, 3, size, size), tokens, torch.zeros(3, cells, cells), torch.zeros(3, dtype=torch.long)

    def step(how: DistillationConfig) -> int:
        objective = MaskedSelfDistillation(model, how, model.config.clip_config.projection_dim)
        with FlopCounterMode(display=False) as counter:
            objective(*inputs)["loss"].backward()
        return counter.get_total_flops()

    reading = {key.partition(".")[2]: value for key, value in FIRST_READING.items()}
    ratio = step(DistillationConfig(**reading)) / step(DistillationConfig(vision=False, language=False))  # pyright: ignore
    start = REGIMES[regime].settings["distillation.start"]
    assert isinstance(start, float)
    return start + (1 - start) * ratio


def command(*arguments: object) -> None:
    """`cmmasksd …`, in this process: its start would cost a tenth of a run."""
    from cmmasksd.cli import main

    if code := main([str(argument) for argument in arguments]):
        sys.exit(code)


def train(out: Path, keys: dict[str, object], call: Callable[..., None], extra: Sequence[object] = ()) -> bool:
    """Train, or go on; returns whether it went on."""
    given = [part for key, value in keys.items() for part in (f"--{key}", json.dumps(value).strip('"'))]
    resume = ["--resume"] if (out / "last" / "state.pt").exists() else []
    call("train", *given, "--training.out", out, *extra, *resume)
    return bool(resume)


def trunk(work: Path, call: Callable[..., None] = command, extra: Sequence[object] = ()) -> Path:
    """The model that regime "trained" starts from; trained now where it is not there yet."""
    model = work / "trunk" / "finished"
    if not model.is_dir():
        train(work / "trunk", NETWORK | TRUNK, call, extra)
        shutil.copytree(work / "trunk" / "last", model)
    return model


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
    begun = trunk(work, call, extra) if run.regime == "trained" else work
    out, keys = work / run.name, settings(run, begun)
    begin = time.perf_counter()
    resumed = train(out, keys, call, extra)
    seconds = time.perf_counter() - begin
    new = results / f".{run.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    scores = {}
    for split in SPLITS:
        where = ["--data", keys.get("data.name", "scenes"), "--split", split]
        where += ["--scene_seed", SCORED_SEED, "--references", scored]
        call("evaluate", "--model", out / "last", *where, "--out", out / split)
        scores[split] = json.loads((out / split / "results.json").read_text())
        del scores[split]["model"]  # a path of this machine
        rows = (out / split / "expressions.jsonl").read_bytes()
        (new / f"{split}.jsonl.gz").write_bytes(gzip.compress(rows, mtime=0))
    said = keys | {"model.weights": "trunk"} if run.regime == "trained" else keys
    record = {**asdict(run), "settings": said, "seconds": round(seconds), "resumed": resumed, "scores": scores}
    (new / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.copy(out / "metrics.jsonl", new)
    new.replace(results / run.name)


def done(results: Path) -> list[Run]:
    """The runs that are there."""
    return [run for run in plan() if (results / run.name / "run.json").is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "trunk", "run"])
    parser.add_argument("--only", nargs="+", metavar="ARM", help="runs of these arms")
    parser.add_argument("--regime", choices=REGIMES, help="runs of this regime")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th run, from the I-th on")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of unfinished runs")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - {run.arm for run in plan()}:
        parser.error(f"there is no arm {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}, {EQUAL_COMPUTE}")
    first, parts = map(int, options.part.split("/"))
    runs = [
        run for run in plan() if run.arm in (options.only or run.arm) and run.regime == (options.regime or run.regime)
    ][first - 1 :: parts]
    finished = set(done(options.results))
    if options.what == "list":
        for run in runs:
            print(f"{'done' if run in finished else '    '}  {run.name}")
        print(f"{len(finished & set(runs))} of {len(runs)} runs are done")
    elif options.what == "trunk":
        print(trunk(options.work))
    else:
        options.results.mkdir(parents=True, exist_ok=True)
        for number, run in enumerate(runs, 1):
            if run not in finished:
                print(f"== run {number} of {len(runs)}: {run.name}", flush=True)
                execute(run, options.results, options.work)


if __name__ == "__main__":
    main()
