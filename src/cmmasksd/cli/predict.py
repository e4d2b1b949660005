"""`cmmasksd predict`: masks for the sentences about an image."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MODEL, require_words
from cmmasksd.errors import UserError

HELP = "masks for the sentences about an image"
DESCRIPTION = "Find what sentences name in an image."


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
    from itertools import groupby, islice

    from tqdm import tqdm

    from cmmasksd.data.images import image_size, read_frames
    from cmmasksd.data.video import is_video, video_frames
    from cmmasksd.inference.batch import (
        FileNames,
        digest_of_model,
        digest_of_sources,
        find_sources,
        json_row,
        json_rows,
        read_sentences,
        require_free,
        save_pictures,
    )
    from cmmasksd.inference.predictor import load_segmenter
    from cmmasksd.model.locating import model_folder

    texts = [*settings.text, *(read_sentences(settings.texts) if settings.texts else [])]
    require_words(texts)
    sources = find_sources(settings.image, texts)
    if len(sources) == 1 and not is_video(sources[0].image):
        image_size(sources[0].image)  # a wrong path should not wait for the model
    to_stdout = [f"--{name}" for name in ("out", "json") if str(settings[name]) == "-"]
    if len(to_stdout) > 1:
        raise UserError("--out - and --json - both write to standard output: give a file or folder to one of them")
    if "--out" in to_stdout and (len(sources) > 1 or len(sources[0].texts) > 1):
        raise UserError("--out - writes the mask of one sentence in one image: give one of each, or use --json -")

    folder = settings.out or (None if settings.json else Path("."))
    if folder is not None and folder.is_dir() and settings.image.is_dir() and folder.samefile(settings.image):
        raise UserError(f"--out {folder} is the folder of images, and would mix masks with them: use --out out")
    rows_file: Path | None = None if "--json" in to_stdout else settings.json
    if rows_file is not None:
        require_free(rows_file, settings.resume)
    elif settings.resume:
        raise UserError("--resume continues the rows of a file: name it with --json")

    segmenter = load_segmenter(settings.model, device=settings.device, threshold=settings.threshold)
    run: dict[str, Any] = {}
    if rows_file is not None:
        run["model"] = digest_of_model(model_folder(settings.model))
        run["--threshold"] = settings.threshold
        run["--out"] = folder and str(folder)
        run["list of images and sentences"] = digest_of_sources(sources)
    failures: dict[Path | bytes, str] = {}  # what is wrong with an image, by its path
    names, at = FileNames(sources), 0
    with (
        json_rows(settings.json, run, resume=settings.resume) as (done, write),
        tqdm(total=len(sources), unit="image", disable=len(sources) == 1 or None) as bar,
    ):
        for number, (_, group) in enumerate(groupby(sources, key=lambda source: source.image)):
            rows = list(group)  # neighbouring rows about one image, which is encoded once for all of them
            try:
                image = rows[0].image
                frames = video_frames(image) if is_video(image) else read_frames(image)
                for frame, pixels in () if (number, None) in done else frames:
                    if (number, frame) in done:
                        continue
                    if "--out" in to_stdout and frame is not None:
                        raise UserError(f"{rows[0].name} has several frames: name a folder with --out, or use --json -")
                    encoded: Any = segmenter.encode([(pixels, [text for row in rows for text in row.texts])])
                    found, written = segmenter.decode(encoded), []
                    for nth_row, row in enumerate(rows):
                        stem = names.stem(at + nth_row, frame)
                        for nth, one in enumerate(islice(found, len(row.texts))):
                            files = save_pictures(one, nth, stem, folder)
                            written.append(json_row(row, frame, one))
                            if to_stdout:
                                continue
                            of = "" if len(sources) == 1 and frame is None else f"{stem}: "
                            share = 100 * float(one.mask.mean())
                            tqdm.write(f"{of}{one.text!r}: {share:.1f} % of the image, score {one.score:.2f}{files}")
                    write((number, frame), written)  # last: a row implies its masks and overlays
            except UserError as error:
                failures.setdefault(rows[0].image, str(error))
            at += len(rows)
            bar.update(len(rows))
    if failures:
        raise UserError(_failed(list(failures.values()), len({source.image for source in sources})))


def _failed(failures: list[str], of: int) -> str:
    """One line of less than 400 characters about all images that failed, if there are several images."""
    if of == 1:
        return failures[0]
    limit = 270 // min(3, len(failures))
    # cut at the front, which is the path's folders
    said = [text if len(text) <= limit else f"…{text[1 - limit :]}" for text in failures[:3]]
    if len(failures) > 3:
        said.append(f"and {len(failures) - 3} more")
    return f"{len(failures)} of {of} images could not be read, the others are done: {'; '.join(said)}"
