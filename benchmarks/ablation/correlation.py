"""What the patch-word correlation points at, what the masked branches hide, and what each branch can still segment.

    python benchmarks/ablation/correlation.py tiny=tiny trunk=runs/ablation/trunk/finished both=runs/ablation/…/last

For every NAME=MODEL (a CLIP, or a model that training wrote), on generated scenes that training never drew:

- pointing: share of expressions whose best-scored patch lies in the named object (covered by at least half), by guide
  and source;
- hidden: share of the named object, and of the rest of the image, that each end of the correlation hides at ratio 0.5;
- branches: mean IoU of the prediction of each branch, for a model that was trained with them.

Written to `results/correlation.json`, which `page.py` reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from study import HERE, SCORING, config

from cmmasksd.config import DistillationConfig, SplitConfig
from cmmasksd.data.datasets import open_dataset
from cmmasksd.data.workers import loaded
from cmmasksd.distillation.masking import choose_patches, patch_scores
from cmmasksd.explain import load_objective
from cmmasksd.model.correlation import correlation, pointing, sentence_correlation
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.training.batches import TrainingBatches, TrainingItems, training_loader
from cmmasksd.training.build import build

FILE = "correlation.json"


@torch.no_grad()
def measure(name: str, data: str, references: int) -> dict[str, float]:
    """Every figure of a model, in percent.

    Args:
        name: a CLIP, or the folder of a trained model.
        data: style of the scenes.
        references: number of references.
    """
    objective = None
    if (Path(name) / "config.yaml").is_file():
        model, processor = CMMaskSDModel.from_pretrained(name), CMMaskSDProcessor.from_pretrained(name)
        if _has_branches(name):
            objective = load_objective(name, model)
    else:
        model, processor = build(config({"model.backbone": name}))
    model.eval()
    split = open_dataset(SplitConfig(data, "val", references=references, scene_seed=SCORING["scene_seed"]))
    items = TrainingItems(split, processor, stride=model.stride)
    batches = TrainingBatches(split.groups(), 24, per_image=3, seed=0).at(0)
    values_of: dict[str, list[float]] = {}

    def count(key: str, values: torch.Tensor) -> None:
        values_of.setdefault(key, []).extend((100 * values.float()).tolist())

    torch.manual_seed(0)
    for batch in loaded(training_loader(items, batches, workers=0)):
        pixels = processor.pixel_values(batch.images)
        image = model.encode_image(pixels, value_path=True).select(batch.image_index)
        text = model.encode_text(batch.tokens)
        cover = F.interpolate(batch.targets[:, None], image.grid, mode="bilinear", antialias=True).flatten(1)
        count("pointing at random", (cover >= 0.5).float().mean(1))
        for source in ("patches", "values"):
            corr = correlation(image, text, source)
            scores = {guide: patch_scores(corr, text.word_mask, guide) for guide in ("max", "mean")}
            scores["sentence"] = sentence_correlation(image, text, source)
            for guide, score in scores.items():
                count(f"pointing {source} {guide}", pointing(score, batch.targets, image.grid))
            if source == "patches":
                for which in ("high", "low", "random"):
                    for guide in ("max", "sentence"):
                        hidden = choose_patches(scores[guide], 0.5, which).float()
                        count(f"hidden object {which} {guide}", (hidden * cover).sum(1) / cover.sum(1).clamp(min=1e-6))
                        rest = 1 - cover
                        count(f"hidden rest {which} {guide}", (hidden * rest).sum(1) / rest.sum(1))
        if objective is not None:
            logits = objective.decode(objective.views(pixels, batch.tokens, batch.image_index))
            truth = batch.targets >= 0.5
            for branch, branch_logits in logits.items():
                mask = branch_logits > 0
                union = (mask | truth).sum((1, 2)).clamp(min=1)
                count(f"branch {branch}", (mask & truth).sum((1, 2)) / union)
    return {key: round(sum(percents) / len(percents), 2) for key, percents in values_of.items()}


def _has_branches(folder: str) -> bool:
    """Whether a trained model has masked branches."""
    import yaml

    settings = yaml.safe_load((Path(folder) / "config.yaml").read_text())["distillation"]
    distillation = DistillationConfig(**settings)
    return distillation.vision or distillation.language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--data", default="scenes", help="style of the scenes (default: %(default)s)")
    parser.add_argument("--references", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(default: %(default)s)")
    options = parser.parse_args()
    file = options.results / FILE
    figures = json.loads(file.read_text()) if file.is_file() else {}
    for argument in options.models:
        name, _, model = argument.partition("=")
        figures[name] = measure(model, options.data, options.references)
        print(name, json.dumps(figures[name], indent=2))
    options.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
