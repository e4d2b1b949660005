"""`cmmasksd predict`: masks for the sentences about an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import DEVICE, MODEL, require_words
from cmmasksd.errors import UserError
from cmmasksd.model.presence import MIN_SCORE

if TYPE_CHECKING:
    from cmmasksd.inference.predict import Prediction
    from cmmasksd.inference.sources import Source

HELP = "segment the objects that sentences name in an image"
DESCRIPTION = "Segment the objects that sentences name in an image."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="photos", help=MODEL)
    parser.add_argument(
        "--image",
        required=True,
        type=Path,
        help="image, animation (GIF, WebP, PNG) or video; folder of images; quoted pattern such as 'photos/*.jpg'; "
        ".jsonl or .csv file with `image` and `expressions` in every row; or -, an image on standard input",
    )
    parser.add_argument("--text", action="append", type=str, default=[], help="sentence about an object; repeatable")
    parser.add_argument("--texts", type=Path | None, help="text file with one sentence per line")
    parser.add_argument(
        "--out",
        type=Path | None,
        help="folder for masks, overlays, drawings of all sentences about an image, and videos of overlays (default: "
        "this one, or none with --json, --labelme or --coco); or -, the mask of a single sentence as PNG on standard "
        "output",
    )
    parser.add_argument(
        "--json",
        type=Path | None,
        help="file for one line of JSON per sentence, written as it is predicted; or -, standard output",
    )
    parser.add_argument(
        "--labelme",
        type=Path | None,
        metavar="FOLDER",
        help="folder for labelme files and copies of the images, to correct the masks and train on them",
    )
    parser.add_argument(
        "--coco", type=Path | None, metavar="FILE", help="COCO file of all masks, each with its sentence"
    )
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run that wrote --json")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is in the mask")
    parser.add_argument(
        "--min_score",
        type=float,
        default=MIN_SCORE,
        help="presence, from 0 to 1, below which the mask of a sentence is empty: how sure the model must be that the "
        "image holds what the sentence names",
    )
    parser.add_argument("--device", type=str | None, help=DEVICE)


def run(settings: Namespace) -> None:
    from cmmasksd.inference.outputs import AnnotationWriter, FileNames, LabelledOutput, output_folder, write_images
    from cmmasksd.inference.predict import Failure, failure_summary, predict
    from cmmasksd.inference.predictor import load_segmenter
    from cmmasksd.inference.rows import json_row, require_free, row_writer
    from cmmasksd.inference.sources import STDOUT

    sources = _sources(settings)
    annotated = settings.labelme is not None or settings.coco is not None
    folder = output_folder(settings.out, settings.json, settings.image, sources, annotations=annotated)
    names = FileNames(sources)
    annotations = AnnotationWriter(settings.labelme, settings.coco, sources, names, resume=settings.resume)
    require_free(settings.json, settings.resume)
    limits = {"threshold": settings.threshold, "min_score": settings.min_score}
    segmenter = load_segmenter(settings.model, device=settings.device, **limits)
    options = limits | {"out": folder and str(folder)}
    failures, rows = [], []
    labelled = LabelledOutput(sources, names, folder)
    with row_writer(settings.json, settings.model, sources, resume=settings.resume, **options) as (done, write_rows):
        for result in predict(segmenter, sources, done=done, progress=True):
            if isinstance(result, Failure):
                failures.append(result.reason)
                labelled.fail(result.image)
                annotations.fail()
                rows = []
                continue
            stem = names.stem(result.index, result.frame)
            files = write_images(result, stem, folder)
            labelled.add(result)
            annotations.add(result)
            if STDOUT not in (settings.out, settings.json):
                _print_line(result, "" if len(sources) == 1 and result.frame is None else f"{stem}: ", files)
            rows.append(json_row(result))
            if result.last:
                write_rows(result.unit, rows)  # last: a row implies its files
                rows = []
        labelled.write_videos(done)
    annotations.close()
    if failures:
        raise UserError(failure_summary(failures, len({source.image for source in sources})))


def _sources(settings: Namespace) -> list[Source]:
    """The images and their sentences. A single image is opened at once: a wrong path must not wait for the model."""
    from cmmasksd.data.images import image_size
    from cmmasksd.data.video import is_video
    from cmmasksd.inference.sources import find_sources, read_sentences

    texts = [*settings.text, *(read_sentences(settings.texts) if settings.texts else [])]
    require_words(texts)
    sources = find_sources(settings.image, texts)
    if len(sources) == 1 and not is_video(sources[0].image):
        image_size(sources[0].image)
    return sources


def _print_line(prediction: Prediction, prefix: str, files: list[Path]) -> None:
    """Print a line about a sentence, above the progress bar."""
    from tqdm import tqdm

    segmentation = prediction.segmentation
    outcome = f"{100 * float(segmentation.mask.mean()):.1f} % of the image, score {segmentation.score:.2f}"
    if not segmentation.present:
        outcome = f"not found (presence {segmentation.presence:.2f})"
    written = f" -> {', '.join(map(str, files))}" if files else ""
    tqdm.write(f"{prefix}{segmentation.text!r}: {outcome}{written}")
