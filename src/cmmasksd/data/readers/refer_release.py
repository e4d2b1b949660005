"""Any ``ReferringDataset`` written in the files of a REFER release, which ``ReferDataset`` and other tools read."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cmmasksd.data.masks import mask_to_box, mask_to_polygons
from cmmasksd.data.readers.refer import IMAGE_FOLDERS, checked_file_name
from cmmasksd.data.samples import Reference, ReferringDataset
from cmmasksd.errors import UserError


def coco_file_name(image_id: int) -> str:
    """The file name that COCO gives to an image of train2014."""
    return f"COCO_train2014_{image_id:012d}.jpg"


def write_refer_release(
    out: str | Path,
    datasets: Iterable[ReferringDataset],
    *,
    folder: str = "refcoco",
    by: str = "unc",
    file_name: Callable[[int], str] = coco_file_name,
    quality: int = 95,
) -> None:
    """Write splits of a data set in the files of a REFER release, which ``ReferDataset`` and other tools read.

    The refs file comes last, so that a release without it was not finished. Masks are kept exactly (polygons along the
    pixel edges); images are JPEG without chroma subsampling. Everything belongs to one category, "object".

    Args:
        out: the release's root; made where missing.
        datasets: one per split. Their ids are kept and must not repeat.
        folder: the data set's folder under the root.
        by: the name in ``refs(<by>).p``.
        file_name: image_id -> name of the image file.
        quality: of the JPEG files, 1 to 95.

    Raises:
        UserError: a release or another image is already there, an id appears twice, or a reference cannot be written
            (REFER holds exactly one annotation with a mask per reference).
    """
    from PIL import Image
    from tqdm import tqdm

    out, datasets = Path(out), list(datasets)
    refs_path, instances_path = out / folder / f"refs({by}).p", out / folder / "instances.json"
    for path in (refs_path, instances_path):
        if path.exists():
            raise UserError(f"{path} already exists: delete that release or write to another folder")
    if not any(len(dataset) for dataset in datasets):
        raise UserError(f"nothing to write to {out}: the data sets hold no reference")
    image_folder = out / IMAGE_FOLDERS[0]
    image_folder.mkdir(parents=True, exist_ok=True)
    refs_path.parent.mkdir(parents=True, exist_ok=True)

    seen: set[tuple[str, int | str]] = set()

    def claim(kind: str, value: int | str) -> None:
        if (kind, value) in seen:
            raise UserError(f"{kind} {value} appears twice: a release needs it once over all its splits, renumber them")
        seen.add((kind, value))

    refs, images, annotations = [], [], []
    progress = tqdm(total=sum(len(dataset) for dataset in datasets), desc=f"writing {folder}", unit="ref", disable=None)
    with progress:
        for dataset in datasets:
            for group in dataset.groups():
                image_id = dataset[group[0]].image_id
                pixels = dataset.image(dataset[group[0]])
                file = checked_file_name(file_name(image_id), f"image {image_id}")
                claim("image_id", image_id)
                claim("file name", file)
                height, width = pixels.shape[:2]
                images.append({"id": image_id, "file_name": file, "height": height, "width": width, "license": 0})
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "JPEG", quality=quality, subsampling="4:4:4")
                _write_image(image_folder / file, content.getvalue())
                for index in group:
                    reference = dataset[index]
                    annotation = _annotation(reference, dataset.mask(reference), (height, width))
                    claim("ref_id", reference.ref_id)
                    claim("ann_id", annotation["id"])
                    for expression in reference.expressions:
                        claim("sent_id", expression.sent_id)
                    annotations.append(annotation)
                    refs.append(_ref(reference, file))
                    progress.update()
    instances = {
        "info": {"description": folder},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object", "supercategory": "object"}],
    }
    _write_whole(instances_path, json.dumps(instances).encode())
    _write_whole(refs_path, pickle.dumps(refs, protocol=2))  # the newest that the original toolbox's Python reads


def _ref(reference: Reference, image_file: str) -> dict[str, Any]:
    """One entry of a refs file."""
    (ann_id,) = reference.ann_ids
    image = PurePosixPath(image_file)
    return {
        "ref_id": reference.ref_id,
        "ann_id": ann_id,
        "image_id": reference.image_id,
        "category_id": 1,
        "split": reference.split,
        "file_name": str(image.with_name(f"{image.stem}_{ann_id}{image.suffix}")),
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
    """Write an image; the very same one may be there already, from a run that was cut off or a sister release."""
    if path.exists():
        if path.read_bytes() != content:
            raise UserError(f"{path} already exists and is another image: write to another folder")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, content)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either complete or absent."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
