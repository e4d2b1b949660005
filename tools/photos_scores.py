"""How well a model finds objects in photographs that its training has not seen, by kind of photograph.

    python tools/photos_scores.py --model photos --root data/photos

The held-out tenth of every set below `root` (folders with instances.json and images) is described anew, as
`--data instances --split val` does it, and every sentence is segmented. Presence is measured against sentences that
name nothing in the image.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from cmmasksd import Segmenter
from cmmasksd.config import ExpressionConfig
from cmmasksd.data.expressions.dataset import ExpressionDataset, Source, generate, instance_files
from cmmasksd.data.samples import Reference


def held_out(root: Path) -> ExpressionDataset:
    """The images of the split val with their sentences, almost a third of which name nothing."""
    return generate(instance_files(root), ExpressionConfig(no_target=0.3), only="val").splits[0]


def kind(source: Source) -> str:
    """The row of the table that an object belongs to."""
    name = source.file.path.parent.name
    if name != "voc" or source.annotation is None:
        return name
    alike = Counter(annotation.category for annotation in source.image.annotations)[source.annotation.category]
    return "voc, one of its kind" if alike == 1 else "voc, several of a kind"


def auroc(named: list[float], unnamed: list[float]) -> float:
    """Probability that a sentence that names something has the higher presence; ties count half."""
    if not named or not unnamed:
        return float("nan")
    higher = np.asarray(named)[:, None] - np.asarray(unnamed)
    return float(((higher > 0) + 0.5 * (higher == 0)).mean())


def measure(segmenter: Segmenter, data: ExpressionDataset, limit: int = 0) -> dict[str, dict[str, float]]:
    """Scores by kind of photograph."""
    from tqdm import tqdm

    ious: dict[str, list[float]] = defaultdict(list)
    presence: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    groups = data.groups()
    step = max(1, len(groups) // limit) if limit else 1
    for group in tqdm(groups[::step], unit="image"):
        references: list[Reference] = [data[index] for index in group]
        image = data.image(references[0])
        texts = [reference.expressions[0].text for reference in references]
        for reference, segmentation in zip(references, segmenter.segment(image, texts), strict=True):
            source = data.source(reference)
            presence[source.file.path.parent.name][source.annotation is None].append(segmentation.presence)
            if source.annotation is not None:
                target = data.mask(reference)
                union = np.count_nonzero(target | segmentation.mask)
                ious[kind(source)].append(np.count_nonzero(target & segmentation.mask) / union)
    rows = {}
    for name, values in sorted(ious.items()):
        found = np.mean(np.array(values) > 0.5)
        rows[name] = {"mIoU": 100 * float(np.mean(values)), "P@0.5": 100 * float(found), "n": len(values)}
    named, unnamed = ([value for pair in presence.values() for value in pair[which]] for which in (0, 1))
    rows["presence"] = {"AUROC": auroc(named, unnamed), "n": len(unnamed)}
    rows["presence"] |= {name: auroc(*pair) for name, pair in sorted(presence.items())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="photos", help="folder of a model, hub id or shipped model")
    parser.add_argument("--root", type=Path, required=True, help="folder with one folder per set of photographs")
    parser.add_argument("--limit", type=int, default=0, help="about how many images to measure; 0: all")
    options = parser.parse_args()
    rows = measure(Segmenter.from_pretrained(options.model), held_out(options.root), options.limit)
    for name, row in rows.items():
        print(f"{name:24}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
