"""Sentences for files of instances, written as a REFER release or a manifest: what `cmmasksd data expressions` does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cmmasksd.config import ExpressionConfig
from cmmasksd.data.expressions.dataset import ExpressionDataset, Source, generate
from cmmasksd.data.expressions.instances import InstanceFile
from cmmasksd.data.expressions.words import Vocabulary, read_synonyms
from cmmasksd.data.images import is_turned, read_image
from cmmasksd.data.masks import mask_to_rle
from cmmasksd.data.readers.refer_release import write_refer_release
from cmmasksd.errors import UserError, shown
from cmmasksd.files import whole_file


def write_expressions(
    instances: Sequence[Path],
    out: Path,
    settings: ExpressionConfig,
    *,
    images: Sequence[Path] = (),
    synonyms: Path | None = None,
) -> str:
    """Make the sentences of annotation files and write them.

    Args:
        instances: the annotation files.
        out: FILE.jsonl for a manifest, or a folder for a REFER release.
        settings: kinds and shares of the sentences.
        images: image folder of each file, or one for all; see `InstanceFile`.
        synonyms: file of nouns; see `read_synonyms`.

    Returns:
        A summary in a few lines.

    Raises:
        UserError: a file is damaged, or the arguments contradict each other.
    """
    manifest = out.suffix.lower() == ".jsonl"
    if not manifest and out.suffix.lower() in (".csv", ".json"):
        raise UserError(f"--out {out} is neither FILE.jsonl nor a folder: choose one of them")
    if not manifest and settings.no_target:
        raise UserError(
            "--no_target needs a manifest, since a REFER release has no sentences that name nothing: "
            "give --out FILE.jsonl"
        )
    if len(images) not in (0, 1, len(instances)):
        raise UserError(f"--images has {len(images)} folders for {len(instances)} files: give one for each")
    folders = images if len(images) == len(instances) else [*images, None][:1] * len(instances)
    files = [InstanceFile(path, folder) for path, folder in zip(instances, folders, strict=True)]
    nouns = read_synonyms(synonyms) if synonyms is not None else {}
    if synonyms is not None:
        _require_known(nouns, files, synonyms)
    lines = []
    for file in files:
        if file.image_folder is None:
            if not manifest:
                raise UserError(f"a REFER release holds the images of {file.path}: name their folder with --images")
            lines.append(f"{file.path}: no image files found, colours are left out (name their folder with --images)")
    generated = generate(files, settings, Vocabulary(nouns))
    if manifest:
        write_manifest(out, generated.splits)
    else:
        write_refer_release(out, generated.splits)
    references = [reference for split in generated.splits for reference in split]
    named = sum(len(reference.expressions) for reference in references if reference.ann_ids)
    nothing = sum(not reference.ann_ids for reference in references)
    image_count = len({reference.image_id for reference in references})
    lines += [
        f"{named} sentences for {len(references) - nothing} objects of {image_count} images, "
        f"and {nothing} that name nothing: {out}",
        "references: " + ", ".join(f"{split.split} {len(split)}" for split in generated.splits),
    ]
    if generated.left_out:
        lines.append("not named: " + ", ".join(f"{why} ({n})" for why, n in generated.left_out.most_common()))
    lines.append(f"train on them with --data.name {'manifest' if manifest else 'refcoco'} --data.root {out}")
    return "\n".join(lines)


def _require_known(synonyms: dict[str, tuple[str, ...]], files: Sequence[InstanceFile], where: Path) -> None:
    """Refuse synonyms of a class that no file has: a typing error would go unseen."""
    known = sorted({name for file in files for name in file.categories})
    for name in synonyms:
        if name not in known:
            some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            raise UserError(
                f"{where} names the class {shown(name)}, which no file of instances has: expected some of {some}"
            )


def write_manifest(out: Path, splits: Sequence[ExpressionDataset]) -> int:
    """Write splits as a manifest, which ``ManifestDataset`` reads.

    Images that do not lie in the manifest's folder are copied into a folder beside it, called after the manifest.
    Images whose masks are drawn on pixels that EXIF would turn are written there anew, as PNG.

    Returns:
        How many image files were written.

    Raises:
        UserError: the manifest or its folder of images exists already.
    """
    folder = out.with_name(f"{out.stem}-images")
    for path in (out, folder):
        if path.exists():
            raise UserError(f"{path} already exists: delete it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    files: dict[int, str] = {}
    with ExitStack() as undo, whole_file(out) as part, part.open("w", encoding="utf-8") as lines:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        for dataset in splits:
            for reference in (dataset[index] for group in dataset.groups() for index in group):
                source = dataset.source(reference)
                if reference.image_id not in files:
                    files[reference.image_id] = _image_file(source, reference.image_id, out.parent, folder)
                row = {
                    "image": files[reference.image_id],
                    "expressions": [expression.text for expression in reference.expressions],
                    "rle": mask_to_rle(dataset.mask(reference)),
                    "split": dataset.split,
                    "id": reference.ref_id,
                }
                lines.write(json.dumps(row) + "\n")
        undo.pop_all()
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def _image_file(source: Source, image_id: int, root: Path, folder: Path) -> str:
    """The path of an image relative to a manifest's folder, to which it is copied where it lies elsewhere."""
    path = source.image.path
    if path is None:
        return source.image.file_name
    turned = not source.upright and is_turned(path)
    real, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if real.is_relative_to(real_root) and not turned:
        return real.relative_to(real_root).as_posix()
    folder.mkdir(exist_ok=True)
    copy = folder / f"{image_id:06d}{'.png' if turned else path.suffix.lower()}"
    if turned:
        from PIL import Image

        Image.fromarray(read_image(path)).save(copy)
    else:
        shutil.copyfile(path, copy)
    return copy.relative_to(root).as_posix()
