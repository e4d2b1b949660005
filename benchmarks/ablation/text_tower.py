"""What a long training does to unseen pairs, and which part of the network does it: towers put back one at a time.

    python benchmarks/ablation/text_tower.py EARLY LATE     # folders of one training's model, before and after

Writes results/text_tower.json: scores on val and on testB (colour-shape pairs that no training scene shows) of both
models, and of the late one with the early one's text tower, or image tower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from cmmasksd.cli import main as cmmasksd

HERE = Path(__file__).parent
SPLITS = ("val", "testB")
TOWERS = {"with the early text tower": "clip.text_", "with the early image tower": "clip.vi"}


def score(model: Path, work: Path) -> dict[str, dict[str, float]]:
    found = {}
    for split in SPLITS:
        command = ["evaluate", "--model", str(model), "--data", "scenes", "--split", split, "--out", str(work / split)]
        if cmmasksd(command):
            raise SystemExit(2)
        scores = json.loads((work / split / "results.json").read_text())
        found[split] = {key: scores[key] for key in ("oIoU", "mIoU", "expressions")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("early", type=Path)
    parser.add_argument("late", type=Path)
    options = parser.parse_args()
    early, late = (load_file(folder / "model.safetensors") for folder in (options.early, options.late))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = {"early": score(options.early, work), "late": score(options.late, work)}
        for name, tower in TOWERS.items():
            mixed = work / "mixed"
            shutil.copytree(options.late, mixed, ignore=shutil.ignore_patterns("state.pt"), dirs_exist_ok=True)
            own = {key: early[key] if key.startswith(tower) else value for key, value in late.items()}
            save_file(own, mixed / "model.safetensors", metadata={"format": "pt"})
            found[f"late, {name}"] = score(mixed, work)
    (HERE / "results" / "text_tower.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
