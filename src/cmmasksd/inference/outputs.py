"""The files that `cmmasksd predict` writes (masks, overlays, videos, annotations), and their names."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmmasksd.data.images import read_image
from cmmasksd.data.video import frame_rate, is_video, write_video
from cmmasksd.errors import UserError
from cmmasksd.files import whole_file, write_text
from cmmasksd.inference.base import Segmentation
from cmmasksd.inference.formats import merge_coco, to_coco, to_labelme
from cmmasksd.inference.predict import Prediction, Unit
from cmmasksd.inference.sources import STDOUT, Source, is_pattern
from cmmasksd.inference.visualize import PALETTE, Drawing


class FileNames:
    """Unique names for output files, valid on every file system, including case-insensitive ones.

    The names depend on the sources alone, not on which of them can be read, so a resumed run gives the same names.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._stems: list[str] = []
        self._taken: set[str] = set()
        last: dict[str, int] = {}
        for source in sources:
            file = source.image if isinstance(source.image, Path) else Path("stdin")
            plain = unicodedata.normalize("NFC", file.stem)
            plain = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', "-", plain)
            plain = plain.encode()[:120].decode(errors="ignore")  # a name may have 255 bytes in all
            stem, last[plain] = self._free(plain, last.get(plain, 1))
            self._stems.append(stem)
            self._taken.add(stem.casefold())

    def stem(self, index: int, frame: int | None) -> str:
        """Stem of the file names for the source at `index` and a frame of it."""
        stem = self._stems[index]
        return stem if frame is None else self._free(f"{stem}_f{frame:04}", 1)[0]

    def _free(self, plain: str, number: int) -> tuple[str, int]:
        stem = plain
        while stem.casefold() in self._taken:
            number += 1
            stem = f"{plain}_{number}"
        return stem, number


def slug(text: str) -> str:
    """A sentence as part of a file name, without "_"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "sentence"


def output_folder(
    out: Path | None, json: Path | None, image: Path, sources: Sequence[Source], *, annotations: bool = False
) -> Path | None:
    """The folder for masks and overlays: `out`, else the current folder, unless other results are written.

    Args:
        out, json, image: the command's options.
        annotations: whether the command writes annotations.
        sources: the images that `image` stands for.

    Returns:
        The folder; STDOUT for standard output; None for no files.

    Raises:
        UserError: `out` and `json` contradict each other or the sources, or the folder is that of the images.
    """
    if out == json == STDOUT:
        raise UserError("--out - and --json - both write to standard output: give a file or folder to one of them")
    if out == STDOUT and (len(sources) > 1 or len(sources[0].texts) > 1):
        raise UserError("--out - writes the mask of one sentence in one image: give one of each, or use --json -")
    folder = out or (None if json or annotations else Path("."))
    read = {image} if image.is_dir() else set()
    if is_pattern(image):
        read = {source.image.parent for source in sources if isinstance(source.image, Path)}
    if folder is not None and folder.is_dir() and any(map(folder.samefile, read)):
        raise UserError(f"--out {folder} is the folder of images, and would mix masks with them: use --out out")
    return folder


def write_images(prediction: Prediction, stem: str, folder: Path | None) -> list[Path]:
    """Write mask and overlay to a folder, or the mask alone to standard output.

    Args:
        prediction: mask of one sentence.
        stem: stem of the file names, see `FileNames`.
        folder: see `output_folder`.

    Returns:
        The files written.

    Raises:
        UserError: the image has several frames, and the folder is standard output.
    """
    if folder is None:
        return []
    if folder != STDOUT:
        return save_images(prediction.segmentation, prediction.nth, stem, folder)
    if prediction.frame is not None:
        raise UserError(f"{prediction.source.name} has several frames: name a folder with --out, or use --json -")
    content = io.BytesIO()
    mask_image(prediction.segmentation).save(content, "PNG")
    sys.stdout.buffer.write(content.getvalue())
    sys.stdout.buffer.flush()
    return []


class AnnotationWriter:
    """Predictions as annotations for labelling tools: one labelme file per image, or one COCO file.

    Args:
        labelme: folder of the labelme files; images that lie elsewhere are copied into it.
        coco: COCO file, written by `close`; its images are named relative to its folder, or to their common folder
            where they lie elsewhere.
        sources: the images.
        names: their file names.
        resume: whether a run is resumed, so that `labelme` holds files.

    Raises:
        UserError: `labelme` holds files, or `coco` cannot hold the images.
    """

    def __init__(
        self,
        labelme: Path | None,
        coco: Path | None,
        sources: Sequence[Source],
        names: FileNames,
        *,
        resume: bool = False,
    ) -> None:
        self._labelme, self._coco, self._names = labelme, coco, names
        self._stem, self._unit = "", list[Segmentation]()
        self._parts: list[dict[str, Any]] = []
        if STDOUT in (labelme, coco):
            raise UserError("--labelme and --coco do not write to standard output: name a folder or file")
        if labelme is not None and not resume and labelme.is_dir() and any(labelme.glob("*.json")):
            raise UserError(f"--labelme {labelme} already holds JSON files: give another folder")
        if coco is None:
            return
        if resume:
            raise UserError("--resume does not complete a COCO file: leave out --coco")
        if coco.exists():
            raise UserError(f"--coco {coco} already exists: delete it or give another file")
        files = [source.image.resolve() for source in sources if isinstance(source.image, Path)]
        if len(files) < len(sources):
            raise UserError("--coco needs image files: save the image instead of giving it on standard input")
        folder = coco.parent.resolve()
        inside = all(file.is_relative_to(folder) for file in files)
        self._root = folder if inside else Path(os.path.commonpath([file.parent for file in files]))

    def add(self, prediction: Prediction) -> None:
        """Take a prediction. After the last one of an image, or of one frame, their annotations are made."""
        if self._labelme is None and self._coco is None:
            return
        if not self._unit:
            self._stem = self._names.stem(prediction.index, prediction.frame)
        # annotations are made of masks; the probabilities of all sentences would take four times their memory
        self._unit.append(replace(prediction.segmentation, probability=np.empty((0, 0), np.float32)))
        if prediction.last:
            segmentations, self._unit = self._unit, []
            self._annotate(prediction, segmentations)

    def fail(self) -> None:
        """Drop the predictions of an image that cannot be read completely."""
        self._unit = []

    def _annotate(self, last: Prediction, segmentations: Sequence[Segmentation]) -> None:
        image = last.source.image
        if self._coco is not None:
            if last.frame is not None or isinstance(image, bytes):
                raise UserError(f"{last.source.name} has several frames, which COCO cannot name: use --labelme DIR")
            file_name = image.resolve().relative_to(self._root).as_posix()
            self._parts.append(to_coco(segmentations, file_name=file_name))
        if self._labelme is not None:
            self._labelme.mkdir(parents=True, exist_ok=True)
            if last.frame is not None or isinstance(image, bytes):
                file_name = f"{self._stem}.png"
                Image.fromarray(last.segmentation.image).save(self._labelme / file_name)
            elif image.parent.samefile(self._labelme):
                file_name = image.name
            else:
                file_name = f"{self._stem}{image.suffix}"
                shutil.copyfile(image, self._labelme / file_name)
            content = to_labelme(segmentations, file_name=file_name)
            write_text(self._labelme / f"{self._stem}.json", json.dumps(content, ensure_ascii=False, indent=1))

    def close(self) -> None:
        """Write the COCO file."""
        if self._coco is not None:
            self._coco.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._coco, json.dumps(merge_coco(self._parts)))


def mask_image(segmentation: Segmentation) -> Image.Image:
    """The mask as a grey image: 255 inside, 0 outside."""
    return Image.fromarray(segmentation.mask.astype(np.uint8) * 255)


def save_images(segmentation: Segmentation, nth: int, stem: str, folder: Path) -> list[Path]:
    """Write the mask and the overlay of an image's nth sentence (from 0) as PNG; returns the two files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawing = Drawing(segmentation.image)
    add_segmentation(drawing, segmentation, nth)
    images = {"mask": mask_image(segmentation), "overlay": Image.fromarray(drawing.finish())}
    files = [folder / f"{stem}_{nth + 1}_{slug(segmentation.text)}_{kind}.png" for kind in images]
    for file, image in zip(files, images.values(), strict=True):
        _write_png(image, file)
    return files


def _write_png(image: Image.Image, file: Path) -> None:
    with whole_file(file) as part:
        image.save(part, "PNG")


def add_segmentation(drawing: Drawing, segmentation: Segmentation, nth: int) -> None:
    """Draw the nth mask (from 0) of an image in its colour, with its sentence and score."""
    drawing.add(segmentation.mask, PALETTE[nth % len(PALETTE)], label=segmentation.label(nth + 1))


class LabelledOutput:
    """Drawings of all sentences about an image, STEM_labelled.png, and videos of overlays, STEM_labelled.mp4.

    Memory grows neither with the sentences nor with the frames: masks are drawn as they come, and a video is made of
    the files of its frames.

    Args:
        sources: the inputs of the run.
        names: their file names.
        folder: see `output_folder`.
    """

    def __init__(self, sources: Sequence[Source], names: FileNames, folder: Path | None) -> None:
        self._sources, self._names = sources, names
        self._folder = None if folder == STDOUT else folder
        self._frames: dict[int, int] = {}  # group -> number of its frames
        self._failed: set[Path | bytes] = set()
        self._drawing, self._stem, self._drawn = None, "", 0

    def add(self, prediction: Prediction) -> None:
        """Draw a prediction. After the last one of an image with several sentences, its drawing is written."""
        if self._folder is None:
            return
        if self._drawing is None:
            self._drawing = Drawing(prediction.segmentation.image, enlarge=True)
            self._stem, self._drawn = self._names.stem(prediction.index, prediction.frame), 0
        add_segmentation(self._drawing, prediction.segmentation, self._drawn)
        self._drawn += 1
        if prediction.last:
            if self._drawn > 1:
                _write_png(Image.fromarray(self._drawing.finish()), self._file(self._stem))
            self._drawing = None
            self._count(prediction.unit)

    def fail(self, image: Path | bytes) -> None:
        """Drop the drawing of an image that cannot be read completely; a video like that gets no MP4 file."""
        self._failed.add(image)
        self._drawing = None

    def write_videos(self, done: Iterable[Unit]) -> None:
        """Write the videos, after the last prediction.

        Args:
            done: units of an earlier run, whose files are in the folder.
        """
        for unit in done:
            self._count(unit)
        start = 0  # index of the first source of a group
        for group, (video, members) in enumerate(groupby(self._sources, key=lambda source: source.image)):
            texts = [source.texts for source in members]
            if self._folder is not None and group in self._frames and is_video(video) and video not in self._failed:
                frames = (self._overlay(start, frame, texts) for frame in range(1, self._frames[group] + 1))
                target = self._file(self._names.stem(start, None)).with_suffix(".mp4")
                write_video(target, map(read_image, frames), frame_rate(video))
            start += len(texts)

    def _count(self, unit: Unit) -> None:
        group, frame = unit
        if frame is not None:
            self._frames[group] = max(frame, self._frames.get(group, 0))

    def _overlay(self, index: int, frame: int, texts: Sequence[Sequence[str]]) -> Path:
        """The file that shows all sentences about a frame."""
        stem = self._names.stem(index, frame)
        return self._file(stem) if sum(map(len, texts)) > 1 else self._file(stem, f"1_{slug(texts[0][0])}_overlay")

    def _file(self, stem: str, kind: str = "labelled") -> Path:
        assert self._folder is not None
        return self._folder / f"{stem}_{kind}.png"
