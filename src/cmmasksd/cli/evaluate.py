"""`cmmasksd evaluate`: score a model on a split."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MAX_WORKERS, MODEL, SCENE_REFERENCES, require_between, require_dataset
from cmmasksd.config import DATASETS, MAX_REFERENCES, MAX_SCENE_SIZE

HELP = "score a model on a split"
DESCRIPTION = "Score a model on every sentence of a split, at the images' own size."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--data", required=True, help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--root", type=Path | None, help="folder of RefCOCO; for manifest: its file or folder")
    parser.add_argument("--split", required=True, help="such as val, testA, testB or test")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and expressions.jsonl")
    parser.add_argument("--references", type=int, default=SCENE_REFERENCES, help="of generated scenes: how many")
    parser.add_argument("--scene_seed", type=int, default=0, help="of generated scenes: their seed")
    parser.add_argument("--scene_size", type=int, default=128, help="of generated scenes: side of the image in pixels")
    parser.add_argument("--threshold", type=float, default=0.5, help="a pixel above this probability is in the mask")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")


def run(settings: Namespace) -> None:
    require_dataset(settings.data, "--data")
    require_between("--references", settings.references, 1, MAX_REFERENCES)
    require_between("--scene_size", settings.scene_size, 64, MAX_SCENE_SIZE)
    require_between("--workers", settings.workers, 0, MAX_WORKERS)
    from cmmasksd.evaluation.results import format_table, read_results

    main = score(
        model=settings.model,
        name=settings.data,
        root=settings.root,
        split=settings.split,
        out=settings.out,
        references=settings.references,
        seed=settings.scene_seed,
        size=settings.scene_size,
        threshold=settings.threshold,
        workers=settings.workers,
    )
    if main:
        print(format_table([read_results(settings.out)]))


def score(
    *,
    model: str,
    name: str,
    root: Path | None,
    split: str,
    out: Path,
    references: int,
    seed: int,
    size: int,
    threshold: float = 0.5,
    workers: int = 0,
) -> bool:
    """Score a split and write its result files; true in the process that wrote them."""
    from dataclasses import replace

    from cmmasksd.data.datasets import open_dataset
    from cmmasksd.evaluation.evaluate import evaluate, make_accelerator
    from cmmasksd.evaluation.protocols import ORIGINAL
    from cmmasksd.evaluation.results import write_results
    from cmmasksd.model.locating import model_folder, weights_digest
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

    protocol = replace(ORIGINAL, threshold=threshold)
    data = open_dataset(name, split, root=root, references=references, seed=seed, canvas=size)
    accelerator = make_accelerator()
    network = CMMaskSDModel.from_pretrained(model).to(accelerator.device)
    processor = CMMaskSDProcessor.from_pretrained(model)
    out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made must not cost the scores
    rows, scores, truncated = evaluate(
        network, processor, data, protocol=protocol, accelerator=accelerator, workers=workers
    )
    if accelerator.is_main_process:
        extra: dict[str, Any] = {"data": name, "model": model, "truncated_expressions": truncated}
        extra["weights"] = weights_digest(model_folder(model))
        if root is None:
            extra |= {"references": len(data), "scene_seed": seed, "scene_size": size}
        write_results(out, split, rows, scores, protocol, extra)
    return accelerator.is_main_process
