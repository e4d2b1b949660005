"""Any ``ReferringDataset`` written in the files of a REFER release, which ``ReferDataset`` and other tools read."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmmasksd.data.masks import mask_to_box, mask_to_polygons
from cmmasksd.data.readers.refer import IMAGE_FOLDERS
from cmmasksd.data.samples import Reference, ReferringDataset
from cmmasksd.errors import UserError
from cmmasksd.files import write_bytes


def write_refer_release(out: str | Path, datasets: Sequence[ReferringDataset]) -> None:
    """Write splits of a data set as a REFER release, which ``ReferDataset`` reads as "refcoco", as do other tools.

    The refs file comes last: a release without it is incomplete. Masks are kept exactly (polygons along the pixel
    edges); images are JPEG without chroma subsampling. Everything belongs to one category, "object".

    Args:
        out: the release's root; made where missing.
        datasets: one per split. Their ids are kept and must not repeat.

    Raises:
        UserError: a release or another image is already there, an id appears twice, or a reference cannot be written
            (REFER holds exactly one annotation with a mask per reference).
    """
    from PIL import Image
    from tqdm import tqdm

    out = Path(out)
    refs_path, instances_path = out / "refcoco/refs(unc).p", out / "refcoco/instances.json"
    for path in (refs_path, instances_path):
        if path.exists():
            raise UserError(f"{path} already exists: delete that release or write to another folder")
    if not any(len(dataset) for dataset in datasets):
        raise UserError(f"nothing to write to {out}: the data sets hold no reference")
    image_folder = out / IMAGE_FOLDERS[0]
    image_folder.mkdir(parents=True, exist_ok=True)
    refs_path.parent.mkdir(parents=True, exist_ok=True)

    seen: set[tuple[str, int]] = set()

    def claim(kind: str, value: int) -> None:
        if (kind, value) in seen:
            raise UserError(f"{kind} {value} appears twice: a release needs it once over all its splits, renumber them")
        seen.add((kind, value))

    refs, images, annotations = [], [], []
    with tqdm(total=sum(map(len, datasets)), desc="writing refcoco", unit="ref", disable=None) as progress:
        for dataset in datasets:
            for group in dataset.groups():
                image_id = dataset[group[0]].image_id
                pixels = dataset.image(dataset[group[0]])
                claim("image_id", image_id)
                file = f"COCO_train2014_{image_id:012d}.jpg"
                height, width = pixels.shape[:2]
                images.append({"id": image_id, "file_name": file, "height": height, "width": width, "license": 0})
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "JPEG", quality=95, subsampling="4:4:4")
                _write_image(image_folder / file, content.getvalue())
                for index in group:
                    reference = dataset[index]
                    annotation = _annotation(reference, dataset.mask(reference), (height, width))
                    claim("ref_id", reference.ref_id)
                    claim("ann_id", annotation["id"])
                    for expression in reference.expressions:
                        claim("sent_id", expression.sent_id)
                    annotations.append(annotation)
                    refs.append(_ref(reference))
                    progress.update()
    instances = {
        "info": {"description": "refcoco"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object", "supercategory": "object"}],
    }
    write_bytes(instances_path, json.dumps(instances).encode())
    write_bytes(refs_path, pickle.dumps(refs, protocol=2))  # the newest that the original toolbox's Python reads


def _ref(reference: Reference) -> dict[str, Any]:
    """One entry of a refs file."""
    (ann_id,) = reference.ann_ids
    return {
        "ref_id": reference.ref_id,
        "ann_id": ann_id,
        "image_id": reference.image_id,
        "category_id": 1,
        "split": reference.split,
        "file_name": f"COCO_train2014_{reference.image_id:012d}_{ann_id}.jpg",
        "sent_ids": [expression.sent_id for expression in reference.expressions],
        "sentences": [
            {
                "tokens": expression.text.split(),
                "raw": expression.text,
                "sent_id": expression.sent_id,
                "sent": expression.text,
            }
            for expression in reference.expressions
        ],
    }


def _annotation(reference: Reference, mask: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """One entry of instances.json's annotations; mask (H, W) bool."""
    where = f"reference {reference.ref_id}"
    if len(reference.ann_ids) != 1:
        raise UserError(f"{where} has {len(reference.ann_ids)} annotations: the REFER format holds exactly one")
    if mask.shape != size:
        raise UserError(f"{where} has a mask of size {mask.shape} on an image of size {size}: expected the same")
    if (box := mask_to_box(mask)) is None:
        raise UserError(f"{where} has an empty mask: the REFER format has no way to write it")
    left, top, right, bottom = box
    return {
        "id": reference.ann_ids[0],
        "image_id": reference.image_id,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": mask_to_polygons(mask),
        "area": int(mask.sum()),
        "bbox": [left, top, right - left, bottom - top],
    }


def _write_image(path: Path, content: bytes) -> None:
    """Write an image; an equal one may be there from a run that was cut off."""
    if not path.exists():
        write_bytes(path, content)
    elif path.read_bytes() != content:
        raise UserError(f"{path} already exists and is another image: write to another folder")
