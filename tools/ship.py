"""Makes the model that ships as "scenes" out of a training's folder: float16 weights, scores of those, and its card.

    python tools/ship.py runs/scenes-model/last --branches runs/scenes-model-3/last

The scores in the card are those of the stored file, on scenes that no training has drawn. How the weights came about is
told in `scenes-model.md.in` beside this file: edit that, not the card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch

from cmmasksd.assets import located
from cmmasksd.cli import main as cmmasksd
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.publishing.hub import public_settings
from cmmasksd.training.checkpoint import WEIGHTS

SPLITS = ("val", "testB")
COLUMNS = ("oIoU", "mIoU", "P@0.5", "P@0.7", "P@0.9")


def store(trained: Path, out: Path) -> CMMaskSDModel:
    """The files that `from_pretrained` and `explain` need, weights in float16."""
    model = CMMaskSDModel.from_pretrained(trained).to(torch.float16)
    clip = model.config.clip_config
    clip._name_or_path = ""  # a path of this machine
    for part in (clip, clip.text_config, clip.vision_config):
        part.dtype = None
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("model.safetensors", "config.json", "state.pt*"))
    model.save_pretrained(out)
    (out / "config.yaml").write_bytes(public_settings(out))
    return model


def scores(model: Path, references: int) -> list[str]:
    """Rows of the card's table."""
    rows = []
    for split in SPLITS:
        with tempfile.TemporaryDirectory() as folder:
            command = ["evaluate", "--model", str(model), "--data", "scenes", "--split", split]
            if cmmasksd([*command, "--references", str(references), "--out", folder]):
                raise SystemExit(2)
            found = json.loads((Path(folder) / "results.json").read_text())
        cells = [split, str(found["expressions"]), *(f"{100 * found[column]:.1f}" for column in COLUMNS)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="folder of a trained model")
    parser.add_argument("--branches", type=Path, help="folder whose masked branches `explain` shows; else the model's")
    parser.add_argument("--references", type=int, default=1500, help="of each split that is scored")
    options = parser.parse_args()
    out = Path(located("scenes"))
    model = store(options.trained, out)
    if options.branches is not None:
        shutil.copy(options.branches / WEIGHTS, out / WEIGHTS)
    weights = (out / "model.safetensors").read_bytes()
    known = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        "size": f"{len(weights) / 1e6:.1f}",
        "hash": hashlib.sha256(weights).hexdigest(),
        "scores": "\n".join(scores(out, options.references)),
    }
    card = (Path(__file__).parent / "scenes-model.md.in").read_text()
    for key, value in known.items():
        card = card.replace("{{" + key + "}}", value)
    (out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
