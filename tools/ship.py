"""Make a model that ships from a training's folder: float16 weights, their scores, and the card.

    python tools/ship.py scenes runs/scenes-model/last --branches runs/scenes-model-3/last
    python tools/ship.py photos runs/photos-2/last --root data/photos

The card's scores are those of the stored file, on scenes that no training has drawn, or on the held-out photographs.
The rest of its text comes from `scenes-model.md.in` or `photos-model.md.in` beside this file: edit that, not the card.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from photos_scores import held_out, measure

from cmmasksd import Segmenter
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


def scores_on_scenes(model: Path, references: int) -> list[str]:
    """Rows of the card's table."""
    rows = []
    for split in SPLITS:
        result = score(ScoreConfig(model=str(model), data="scenes", split=split, references=references))
        cells = [split, str(len(result.rows)), *(f"{100 * result.scores[column]:.1f}" for column in COLUMNS)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def scores_on_photographs(model: Path, root: Path) -> list[str]:
    """Rows of the card's table."""
    rows = measure(Segmenter.from_pretrained(model), held_out(root))
    presence = rows.pop("presence")
    lines = [f"| {name} | {row['n']} | {row['mIoU']:.1f} | {row['P@0.5']:.1f} |" for name, row in rows.items()]
    return [*lines, f"| presence, AUROC | {presence['n']} that name nothing | {presence['AUROC']:.3f} | |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("scenes", "photos"), help="name to ship it by")
    parser.add_argument("trained", type=Path, help="folder of a trained model")
    parser.add_argument("--root", type=Path, help="photographs (photos only)")
    parser.add_argument("--branches", type=Path, help="folder of the masked branches for `explain` (default: TRAINED)")
    parser.add_argument(
        "--references", type=int, default=1500, help="number of references per scored split (scenes only)"
    )
    options = parser.parse_args()
    if options.name == "photos" and options.root is None:
        parser.error("photos needs --root, the photographs")
    out = Path(located(options.name))
    model = store(options.trained, out)
    if options.branches is not None:
        shutil.copy(options.branches / WEIGHTS, out / WEIGHTS)
    weights = out / "model.safetensors"
    values = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        "size": f"{weights.stat().st_size / 1e6:.1f}",
        "hash": sha256(weights),
        "scores": "\n".join(
            scores_on_photographs(out, options.root)
            if options.name == "photos"
            else scores_on_scenes(out, options.references)
        ),
    }
    card = (Path(__file__).parent / f"{options.name}-model.md.in").read_text()
    for key, value in values.items():
        card = card.replace("{{" + key + "}}", value)
    (out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
