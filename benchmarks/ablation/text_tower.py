"""What a long training does to unseen pairs, and in which tower: the early towers put back into the late model.

    python benchmarks/ablation/text_tower.py EARLY LATE     # folders of one training's model, before and after

Writes results/text_tower.json: scores on val and on testB (colour-shape pairs that no training scene shows) of both
models, and of the late one with the early one's text tower or image tower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from cmmasksd.config import ScoreConfig
from cmmasksd.evaluation.score import score

HERE = Path(__file__).parent
SPLITS = ("val", "testB")
TOWERS = {"with the early text tower": "clip.text_", "with the early image tower": "clip.vi"}


def scores(model: Path) -> dict[str, dict[str, float]]:
    """Split -> scores."""
    results = [score(ScoreConfig(model=str(model), data="scenes", split=split)).as_dict() for split in SPLITS]
    return {result["split"]: {key: result[key] for key in ("oIoU", "mIoU", "expressions")} for result in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("early", type=Path, help="folder of the earlier model")
    parser.add_argument("late", type=Path, help="folder of the later model")
    options = parser.parse_args()
    early, late = (load_file(folder / "model.safetensors") for folder in (options.early, options.late))
    results = {"early": scores(options.early), "late": scores(options.late)}
    with tempfile.TemporaryDirectory() as folder:
        for name, tower in TOWERS.items():
            mixed = Path(folder) / tower
            shutil.copytree(options.late, mixed, ignore=shutil.ignore_patterns("state.pt"))
            weights = {key: early[key] if key.startswith(tower) else value for key, value in late.items()}
            save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
            results[f"late, {name}"] = scores(mixed)
    (HERE / "results" / "text_tower.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
