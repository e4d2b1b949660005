"""`cmmasksd predict`: masks for the sentences about an image."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MODEL, require_words
from cmmasksd.errors import UserError

if TYPE_CHECKING:
    from cmmasksd.inference.predict import Prediction
    from cmmasksd.inference.sources import Source

HELP = "masks for the sentences about an image"
DESCRIPTION = "Find what sentences name in an image."
STDOUT = Path("-")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument(
        "--image",
        required=True,
        type=Path,
        help="image, animation (GIF, WebP, PNG) or video; folder of images; .jsonl or .csv file with a row of `image` "
        "and `expressions` each; or - for an image on standard input",
    )
    parser.add_argument("--text", action="append", type=str, default=[], help="a sentence; give it again for more")
    parser.add_argument("--texts", type=Path | None, help="text file with a sentence in every line")
    parser.add_argument(
        "--out",
        type=Path | None,
        help="folder for masks and overlays (default: this one, or none with --json); - writes the one mask of one "
        "sentence to standard output, as PNG",
    )
    parser.add_argument(
        "--json",
        type=Path | None,
        help="write a line of JSON for every sentence to this file as it is found, or with - to standard output",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the file of --json after its run was interrupted or killed"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="a pixel above this probability is in the mask")
    parser.add_argument("--device", type=str | None, help="such as cpu or cuda; by itself a GPU where there is one")


def run(settings: Namespace) -> None:
    from cmmasksd.inference.outputs import FileNames
    from cmmasksd.inference.predict import Failure, predict
    from cmmasksd.inference.predictor import load_segmenter
    from cmmasksd.inference.rows import json_row

    sources = _sources(settings)
    folder = _output_folder(settings, sources)
    segmenter = load_segmenter(settings.model, device=settings.device, threshold=settings.threshold)
    names, failures, rows = FileNames(sources), [], []
    with _row_writer(settings, folder, sources) as (done, write_rows):
        for result in predict(segmenter, sources, done=done, progress=True):
            if isinstance(result, Failure):
                failures.append(result.reason)
                rows = []
                continue
            stem = names.stem(result.index, result.frame)
            files = _write_images(result, stem, folder)
            if STDOUT not in (settings.out, settings.json):
                _print_line(result, "" if len(sources) == 1 and result.frame is None else f"{stem}: ", files)
            rows.append(json_row(result))
            if result.last:
                write_rows(result.unit, rows)  # last: a row implies its mask and overlay
                rows = []
    if failures:
        raise UserError(_summary(failures, len({source.image for source in sources})))


def _sources(settings: Namespace) -> list[Source]:
    """The images and their sentences. One image is opened at once: a wrong path must not wait for the model."""
    from cmmasksd.data.images import image_size
    from cmmasksd.data.video import is_video
    from cmmasksd.inference.sources import find_sources, read_sentences

    texts = [*settings.text, *(read_sentences(settings.texts) if settings.texts else [])]
    require_words(texts)
    sources = find_sources(settings.image, texts)
    if len(sources) == 1 and not is_video(sources[0].image):
        image_size(sources[0].image)
    return sources


def _output_folder(settings: Namespace, sources: list[Source]) -> Path | None:
    """The folder for masks and overlays: "-" for standard output, None for nowhere.

    Raises:
        UserError: the options about outputs contradict each other, or something is in the way.
    """
    from cmmasksd.inference.rows import require_free

    if settings.out == settings.json == STDOUT:
        raise UserError("--out - and --json - both write to standard output: give a file or folder to one of them")
    if settings.out == STDOUT and (len(sources) > 1 or len(sources[0].texts) > 1):
        raise UserError("--out - writes the mask of one sentence in one image: give one of each, or use --json -")
    folder = settings.out or (None if settings.json else Path("."))
    if folder is not None and folder.is_dir() and settings.image.is_dir() and folder.samefile(settings.image):
        raise UserError(f"--out {folder} is the folder of images, and would mix masks with them: use --out out")
    if settings.json not in (None, STDOUT):
        require_free(settings.json, settings.resume)
    elif settings.resume:
        raise UserError("--resume resumes the rows of a file: name it with --json")
    return folder


@contextmanager
def _row_writer(settings: Namespace, folder: Path | None, sources: list[Source]) -> Iterator[tuple[Any, Any]]:
    """See `json_rows`; rows may also go to standard output or nowhere."""
    from cmmasksd.inference.rows import fingerprint, json_rows
    from cmmasksd.model.locating import model_folder

    if settings.json is None:
        yield (), lambda unit, rows: None
    elif settings.json == STDOUT:
        yield (), lambda unit, rows: print(*map(json.dumps, rows), sep="\n", flush=True)
    else:
        out = folder and str(folder)
        run = fingerprint(model_folder(settings.model), sources, threshold=settings.threshold, out=out)
        with json_rows(settings.json, run, resume=settings.resume) as rows:
            yield rows


def _write_images(prediction: Prediction, stem: str, folder: Path | None) -> list[Path]:
    """Write mask and overlay to a folder, or the mask alone to standard output; returns the files."""
    from cmmasksd.inference.outputs import mask_image, save_images

    if folder is None:
        return []
    if folder != STDOUT:
        return save_images(prediction.segmentation, prediction.nth, stem, folder)
    if prediction.frame is not None:
        name = prediction.source.name
        raise UserError(f"{name} has several frames: name a folder with --out, or use --json -")
    content = io.BytesIO()
    mask_image(prediction.segmentation).save(content, "PNG")
    sys.stdout.buffer.write(content.getvalue())
    sys.stdout.buffer.flush()
    return []


def _print_line(prediction: Prediction, where: str, files: list[Path]) -> None:
    """One line about a sentence, above the progress bar."""
    from tqdm import tqdm

    segmentation = prediction.segmentation
    share = 100 * float(segmentation.mask.mean())
    written = f" -> {', '.join(map(str, files))}" if files else ""
    tqdm.write(f"{where}{segmentation.text!r}: {share:.1f} % of the image, score {segmentation.score:.2f}{written}")


def _summary(failures: list[str], images: int) -> str:
    """One line of less than 400 characters about all images that failed, if there are several images."""
    if images == 1:
        return failures[0]
    limit = 270 // min(3, len(failures))
    # cut at the front, which holds the folders of the path
    lines = [line if len(line) <= limit else f"…{line[1 - limit :]}" for line in failures[:3]]
    if len(failures) > 3:
        lines.append(f"and {len(failures) - 3} more")
    return f"{len(failures)} of {images} images could not be read, the others are done: {'; '.join(lines)}"
