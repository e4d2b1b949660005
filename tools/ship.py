"""Make the model that ships as "scenes" from a training's folder: float16 weights, their scores, and the card.

    python tools/ship.py runs/scenes-model/last --branches runs/scenes-model-3/last

The card's scores are those of the stored file, on scenes that no training has drawn. The rest of its text comes from
`scenes-model.md.in` beside this file: edit that, not the card.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from cmmasksd.assets import located
from cmmasksd.config import ScoreConfig
from cmmasksd.evaluation.score import score
from cmmasksd.files import sha256
from cmmasksd.model.loading import save_float16
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.publishing.hub import public_settings
from cmmasksd.training.checkpoint import WEIGHTS

SPLITS = ("val", "testB")
COLUMNS = ("oIoU", "mIoU", "P@0.5", "P@0.7", "P@0.9")


def store(trained: Path, out: Path) -> CMMaskSDModel:
    """The files that `from_pretrained` and `explain` need, weights in float16."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("model.safetensors", "config.json", "state.pt*"))
    model = CMMaskSDModel.from_pretrained(trained)
    save_float16(model, out)
    (out / "config.yaml").write_bytes(public_settings(out))  # without folders of this machine
    return model


def scores(model: Path, references: int) -> list[str]:
    """Rows of the card's table."""
    rows = []
    for split in SPLITS:
        result = score(ScoreConfig(model=str(model), data="scenes", split=split, references=references))
        cells = [split, str(len(result.rows)), *(f"{100 * result.scores[column]:.1f}" for column in COLUMNS)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="folder of a trained model")
    parser.add_argument("--branches", type=Path, help="folder of the masked branches for `explain` (default: TRAINED)")
    parser.add_argument("--references", type=int, default=1500, help="number of references per scored split")
    options = parser.parse_args()
    out = Path(located("scenes"))
    model = store(options.trained, out)
    if options.branches is not None:
        shutil.copy(options.branches / WEIGHTS, out / WEIGHTS)
    weights = out / "model.safetensors"
    values = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        "size": f"{weights.stat().st_size / 1e6:.1f}",
        "hash": sha256(weights),
        "scores": "\n".join(scores(out, options.references)),
    }
    card = (Path(__file__).parent / "scenes-model.md.in").read_text()
    for key, value in values.items():
        card = card.replace("{{" + key + "}}", value)
    (out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
