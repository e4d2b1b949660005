"""score(config): a model on a split, both given by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cmmasksd.config import ScoreConfig
from cmmasksd.data.datasets import open_dataset
from cmmasksd.evaluation.evaluate import evaluate, make_accelerator
from cmmasksd.evaluation.protocols import ORIGINAL
from cmmasksd.evaluation.results import SplitScores, write_results
from cmmasksd.model.locating import model_folder, weights_digest
from cmmasksd.model.trained import load_trained


def score(config: ScoreConfig, out: str | Path | None = None) -> SplitScores:
    """Score a model on a split.

    Every process of a launch must call it: they share the work, and each gets the scores of the whole split.

    Args:
        config: model, split and threshold.
        out: folder for `results.json` and `expressions.jsonl`, which the main process writes; None: write nothing.

    Returns:
        The scores, as they are written.

    Raises:
        UserError: the model, the data set or the split cannot be opened, or a threshold is not a probability.
    """
    folder = None if out is None else Path(out)
    protocol = replace(ORIGINAL, threshold=config.threshold)
    data = open_dataset(config)
    accelerator = make_accelerator()
    model, processor = load_trained(config.model)
    model.to(accelerator.device)  # pyright: ignore (its decorator hides the method)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made must not cost the scores
    result = evaluate(model, processor, data, protocol=protocol, accelerator=accelerator, workers=config.workers)
    result.provenance = _provenance(config, len(data), result.provenance)
    if folder is not None and accelerator.is_main_process:
        write_results(folder, result)
    return result


def _provenance(config: ScoreConfig, references: int, counts: dict[str, Any]) -> dict[str, Any]:
    """What was scored, and the counts of `evaluate`, in the order of `results.json`."""
    provenance: dict[str, Any] = {"data": config.data, "model": config.model, **counts}
    provenance["weights"] = weights_digest(model_folder(config.model))
    if config.root is None:
        provenance |= {"references": references, "scene_seed": config.scene_seed, "scene_size": config.scene_size}
    return provenance
