"""The command line: demo | train | evaluate | compare | predict | export | serve | explain | data | pretrain | push |
report.

Exit codes: 0 when the command did its work, 2 for a user's mistake or a disk that refuses (one line on standard error
says what is wrong and how to mend it), 130 when interrupted, 141 when the reader of its output went away, 143 when
training got SIGTERM. Programming errors keep their traceback. Heavy imports live inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmmasksd.config import (
    DATASETS,
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    PretrainConfig,
    TrainingConfig,
)
from cmmasksd.errors import UserError
from cmmasksd.evaluation.protocols import METRIC_NAMES
from cmmasksd.serving.settings import KEY_VARIABLE, ServeSettings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SCENE_REFERENCES = 1500
"""References of a generated split, where a command is not told how many."""
MODEL = "folder of a trained model, hub id, or scenes: the one that ships"


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from cmmasksd import __version__

    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    parser = ArgumentParser(
        prog="cmmasksd",
        description="Type a sentence, get the mask of the object it names.",
        version=__version__,
        exit_on_error=False,  # main says it in one line
    )
    commands = parser.add_subcommands(dest="command", required=True)

    demo = ArgumentParser(description="Train on generated scenes, score, and write a page to look at.")
    demo.add_argument("--config", action="config", help="settings of the run; the built-in ones train in minutes")
    demo.add_argument(
        "--trained", type=str | None, help="score this model and train none, such as scenes: the one that ships"
    )
    _add_config(demo)
    commands.add_subcommand("demo", demo, help="train on generated scenes, score, and write report.html")

    train = ArgumentParser(description="Train a model. Settings come from --config and from single --keys.")
    train.add_argument("--config", action="config", help="YAML file of settings (see configs/)")
    train.add_argument("--resume", action="store_true", help="resume the run in training.out")
    _add_config(train)
    commands.add_subcommand("train", train, help="train a model")

    evaluate = ArgumentParser(description="Score a model on every sentence of a split, at the images' own size.")
    evaluate.add_argument("--model", required=True, help=MODEL)
    evaluate.add_argument("--data", required=True, help=f"one of {', '.join(DATASETS)}")
    evaluate.add_argument("--root", type=Path | None, help="folder of RefCOCO; for manifest: its file or folder")
    evaluate.add_argument("--split", required=True, help="such as val, testA, testB or test")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for results.json and expressions.jsonl")
    evaluate.add_argument("--references", type=int, default=SCENE_REFERENCES, help="of generated scenes: how many")
    evaluate.add_argument("--scene_seed", type=int, default=0, help="of generated scenes: their seed")
    evaluate.add_argument(
        "--scene_size", type=int, default=128, help="of generated scenes: side of the image in pixels"
    )
    evaluate.add_argument("--threshold", type=float, default=0.5, help="a pixel above this probability is in the mask")
    evaluate.add_argument("--workers", type=int, default=0, help="processes that read images")
    commands.add_subcommand("evaluate", evaluate, help="score a model on a split")

    compare = ArgumentParser(
        description="Compare two models that were scored on the same split: differences with bootstrap intervals."
    )
    compare.add_argument("a", type=Path, help="expressions.jsonl of the first model, or its folder")
    compare.add_argument("b", type=Path, help="expressions.jsonl of the second model, or its folder")
    compare.add_argument(
        "--metrics", nargs="+", type=Literal[METRIC_NAMES], default=["oIoU", "mIoU", "P@0.5"], help="what to compare"
    )
    compare.add_argument(
        "--unit",
        type=Literal["image", "expression"],
        default="image",
        help="what the bootstrap draws: whole images with all their sentences, or single sentences",
    )
    compare.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
    compare.add_argument("--seed", type=int, default=0, help="of the draws")
    compare.add_argument("--out", type=Path | None, help="also write the comparison as JSON")
    commands.add_subcommand("compare", compare, help="compare two models on one split")

    predict = ArgumentParser(description="Find what sentences name in an image.")
    predict.add_argument("--model", required=True, help=MODEL)
    predict.add_argument(
        "--image",
        required=True,
        type=Path,
        help="image, animation (GIF, WebP, PNG) or video; folder of images; .jsonl or .csv file with a row of `image` "
        "and `expressions` each; or - for an image on standard input",
    )
    predict.add_argument("--text", action="append", type=str, default=[], help="a sentence; give it again for more")
    predict.add_argument("--texts", type=Path | None, help="text file with a sentence in every line")
    predict.add_argument(
        "--out",
        type=Path | None,
        help="folder for masks and overlays (default: this one, or none with --json); - writes the one mask of one "
        "sentence to standard output, as PNG",
    )
    predict.add_argument(
        "--json",
        type=Path | None,
        help="write a line of JSON for every sentence to this file, or with - to standard output",
    )
    predict.add_argument("--threshold", type=float, default=0.5, help="a pixel above this probability is in the mask")
    predict.add_argument("--device", type=str | None, help="such as cpu or cuda; by itself a GPU where there is one")
    commands.add_subcommand("predict", predict, help="masks for the sentences about an image")

    export = ArgumentParser(
        description="Write a model as graphs that run without this package: two encoders and the decoder, checked."
    )
    export.add_argument("--model", required=True, help=MODEL)
    export.add_argument("--out", type=Path, required=True, help="folder for the files; an export in it is replaced")
    export.add_argument(
        "--format",
        type=Literal["onnx", "pt2", "web"],
        default="onnx",
        help="onnx: for onnxruntime and `predict --model FOLDER`; pt2: programs of torch.export; web: a static page"
        " that runs the model in the browser",
    )
    export.add_argument("--int8", action="store_true", help="quantise the weights (onnx and web)")
    export.add_argument(
        "--ort", type=Path | None, help="of web: the folder node_modules/onnxruntime-web/dist of `npm install`"
    )
    commands.add_subcommand("export", export, help="write a model for onnxruntime, torch.export or the browser")

    serve = ArgumentParser(
        description="A web page and an HTTP API for a model. With CMMASKSD_API_KEY set, the API asks for that key."
    )
    serve.add_argument("--model", default="scenes", help=MODEL)
    serve.add_argument("--device", type=str | None, help="such as cpu or cuda; by itself a GPU where there is one")
    serve.add_class_arguments(ServeSettings)
    commands.add_subcommand("serve", serve, help="a web page and an HTTP API for a model")

    explain = ArgumentParser(
        description="Show what the masked branches see: the correlation, what is hidden, and what each branch predicts."
    )
    explain.add_argument("--model", required=True, help="folder that training wrote, or scenes")
    explain.add_argument("--image", type=Path, required=True, help="image file")
    explain.add_argument("--text", action="append", type=str, required=True, help="a sentence; give it again for more")
    explain.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    explain.add_argument("--seed", type=int, default=0, help="of masks that are chosen at random")
    commands.add_subcommand("explain", explain, help="show what the masked branches see")

    data = ArgumentParser(description="Make and look at data.")
    commands.add_subcommand("data", data, help="write generated scenes to files")
    kinds = data.add_subcommands(dest="kind", required=True)
    scenes = ArgumentParser(
        description="Write generated scenes as a REFER release: refs(unc).p, instances.json, images."
    )
    scenes.add_argument("--out", type=Path, required=True, help="folder for the release")
    scenes.add_argument("--name", type=Literal["scenes", "scenes+", "scenesg"], default="scenes", help="style")
    scenes.add_argument("--train", type=int, default=1500, help="references of the training split")
    scenes.add_argument("--test", type=int, default=300, help="references of val, testA and testB each")
    scenes.add_argument("--seed", type=int, default=0, help="of the scenes")
    scenes.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    kinds.add_subcommand("scenes", scenes, help="write generated scenes as a REFER release")

    pretrain = ArgumentParser(description="Train a small CLIP on generated scenes and their captions.")
    pretrain.add_argument("--config", action="config", help="YAML file of settings")
    pretrain.add_class_arguments(PretrainConfig, "pretrain")
    commands.add_subcommand("pretrain", pretrain, help="train the small CLIP that the package ships")

    push = ArgumentParser(description="Publish a model with a generated card: on the Hugging Face hub, or as a folder.")
    push.add_argument("--model", required=True, help="folder of a trained model")
    push.add_argument("--to", required=True, help="USER/NAME on the hub, or ./folder to look at first")
    push.add_argument("--results", type=Path, nargs="+", default=[], help="folders that evaluate wrote, for the card")
    push.add_argument("--license", default="mit", help="of the weights, by the hub's identifier")
    push.add_argument("--card", type=Path | None, help="your own README.md in place of the generated one")
    push.add_argument("--private", action="store_true", help="nobody else may see it on the hub")
    commands.add_subcommand("push", push, help="publish a model with its card")

    report = ArgumentParser(description="Write a page of overlays, scores and curves for a scored split.")
    report.add_argument("--model", required=True, help=MODEL)
    report.add_argument("--results", type=Path, required=True, help="folder that evaluate wrote")
    report.add_argument("--root", type=Path | None, help="folder of the data, as given to evaluate")
    report.add_argument("--metrics", type=Path | None, help="metrics.jsonl of the training, for its curves")
    report.add_argument("--out", type=Path, required=True, help="the HTML file")
    commands.add_subcommand("report", report, help="a page of overlays for a scored split")

    completion = ArgumentParser(
        description="Print a script that makes a shell complete cmmasksd's commands and options."
    )
    completion.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="for which shell")
    commands.add_subcommand("completion", completion, help="tab completion for a shell")
    return parser


def _add_config(parser: ArgumentParser) -> None:
    for kind, key in (
        (DataConfig, "data"),
        (ModelConfig, "model"),
        (DistillationConfig, "distillation"),
        (TrainingConfig, "training"),
    ):
        parser.add_class_arguments(kind, key)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def _config(settings: Namespace, parser: ArgumentParser) -> Config:
    """The settings as dataclasses."""
    made: Any = parser.instantiate(settings)
    config = Config(made.data, made.model, made.distillation, made.training)
    config.training.resume |= getattr(settings, "resume", False)
    return config


def _demo(settings: Namespace, parser: ArgumentParser) -> None:
    config = _config(settings, parser)
    from cmmasksd.data.scenes import STYLES
    from cmmasksd.evaluation.results import format_table, read_results
    from cmmasksd.training.checkpoint import STATE
    from cmmasksd.training.loop import train

    if config.data.name not in STYLES:
        raise UserError(f"demo runs on generated scenes, not {config.data.name}: use `cmmasksd train` for other data")
    out = Path(config.training.out)
    data, model, log = config.data, settings.trained, None
    if model is None:
        config.training.resume = (out / "last" / STATE).is_file()  # a second `demo` goes on, or only scores
        train(config)
        model, log = str(out / "best"), out / "metrics.jsonl"
    results = []
    for split in (data.val_split, "testB"):
        _score(
            model=model,
            name=data.name,
            root=data.root,
            split=split,
            out=out / split,
            references=SCENE_REFERENCES,
            seed=data.scene_seed,
            size=data.scene_size,
            workers=data.workers,
        )
        results.append(read_results(out / split))
    page = _write_report(model, [out / data.val_split, out / "testB"], data.root, log, out / "report.html")
    print(format_table(results))
    print(f"These are scores on generated scenes. Look at the pictures: {page}")


def _train(settings: Namespace, parser: ArgumentParser) -> None:
    config = _config(settings, parser)
    from cmmasksd.training.loop import train

    scores = train(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"last validation: oIoU {100 * scores['oIoU']:.2f}  mIoU {100 * scores['mIoU']:.2f}  "
            f"(best mIoU {100 * scores['best']:.2f}); models: {config.training.out}/best and last"
        )


def _evaluate(settings: Namespace) -> None:
    from cmmasksd.evaluation.results import format_table, read_results

    main = _score(
        model=settings.model,
        name=settings.data,
        root=settings.root,
        split=settings.split,
        out=settings.out,
        references=settings.references,
        seed=settings.scene_seed,
        size=settings.scene_size,
        threshold=settings.threshold,
        workers=settings.workers,
    )
    if main:
        print(format_table([read_results(settings.out)]))


def _compare(settings: Namespace) -> None:
    import json
    from dataclasses import asdict

    from cmmasksd.evaluation.compare import compare, format_comparison
    from cmmasksd.evaluation.protocols import ORIGINAL, ScoringProtocol
    from cmmasksd.evaluation.results import RESULTS_FILE, read_expressions, read_results, write_atomically

    if settings.resamples < 100:
        raise UserError(f"--resamples is {settings.resamples}: an interval needs at least 100")
    protocols = []
    for path in (settings.a, settings.b):
        beside = (path if path.is_dir() else path.parent) / RESULTS_FILE
        protocols.append(ScoringProtocol(**read_results(beside)["protocol"]) if beside.is_file() else ORIGINAL)
    if protocols[0] != protocols[1]:
        raise UserError(f"{settings.a} and {settings.b} were scored by different protocols: score both by the same")
    found = compare(
        read_expressions(settings.a),
        read_expressions(settings.b),
        protocols[0],
        metrics=settings.metrics,
        resamples=settings.resamples,
        unit=settings.unit,
        seed=settings.seed,
    )
    if settings.out is not None:
        rows = [asdict(one) | {"difference": one.difference} for one in found]
        write_atomically(settings.out, json.dumps(rows, indent=2) + "\n")
    print(format_comparison(found))
    print(f"A = {settings.a}\nB = {settings.b}\npaired bootstrap over {settings.unit}s, {settings.resamples} resamples")


def _score(
    *,
    model: str,
    name: str,
    root: Path | None,
    split: str,
    out: Path,
    references: int,
    seed: int,
    size: int,
    threshold: float = 0.5,
    workers: int = 0,
) -> bool:
    """Score a split and write its result files; true in the process that wrote them."""
    from dataclasses import replace

    from cmmasksd.data.loading import open_dataset
    from cmmasksd.evaluation.evaluate import evaluate, make_accelerator
    from cmmasksd.evaluation.protocols import ORIGINAL
    from cmmasksd.evaluation.results import write_results
    from cmmasksd.model.hub import model_folder, weights_digest
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

    if workers < 0:
        raise UserError(f"--workers is {workers}: give 0 to read images in this process, or more")
    protocol = replace(ORIGINAL, threshold=threshold)
    data = open_dataset(name, split, root=root, references=references, seed=seed, canvas=size)
    accelerator = make_accelerator()
    network = CMMaskSDModel.from_pretrained(model).to(accelerator.device)
    processor = CMMaskSDProcessor.from_pretrained(model)
    out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made must not cost the scores
    rows, scores, truncated = evaluate(
        network, processor, data, protocol=protocol, accelerator=accelerator, workers=workers
    )
    if accelerator.is_main_process:
        extra: dict[str, Any] = {"data": name, "model": model, "truncated_expressions": truncated}
        extra["weights"] = weights_digest(model_folder(model))
        if root is None:
            extra |= {"references": len(data), "scene_seed": seed, "scene_size": size}
        write_results(out, split, rows, scores, protocol, extra)
    return accelerator.is_main_process


def _predict(settings: Namespace) -> None:
    from itertools import groupby, islice

    from tqdm import tqdm

    from cmmasksd.data.images import image_size, read_frames
    from cmmasksd.data.video import is_video, video_frames
    from cmmasksd.inference.batch import FileNames, find_sources, json_lines, json_row, read_sentences, save_pictures
    from cmmasksd.inference.predictor import load_segmenter

    texts = [*settings.text, *(read_sentences(settings.texts) if settings.texts else [])]
    _require_words(texts)
    sources = find_sources(settings.image, texts)
    if len(sources) == 1 and not is_video(sources[0].image):
        image_size(sources[0].image)  # a wrong path should not wait for the model
    to_stdout = [f"--{name}" for name in ("out", "json") if str(settings[name]) == "-"]
    if len(to_stdout) > 1:
        raise UserError("--out - and --json - both write to standard output: give a file or folder to one of them")
    if "--out" in to_stdout and (len(sources) > 1 or len(sources[0].texts) > 1):
        raise UserError("--out - writes the mask of one sentence in one image: give one of each, or use --json -")

    segmenter = load_segmenter(settings.model, device=settings.device, threshold=settings.threshold)
    folder = settings.out or (None if settings.json else Path("."))
    names, failures, done = FileNames(), [], 0
    with (
        json_lines(settings.json) as write,
        tqdm(total=len(sources), unit="image", disable=len(sources) == 1 or None) as bar,
    ):
        for _, group in groupby(sources, key=lambda source: source.image):
            rows = list(group)  # neighbouring rows about one image, which is encoded once for all of them
            try:
                image = rows[0].image
                for frame, pixels in video_frames(image) if is_video(image) else read_frames(image):
                    if "--out" in to_stdout and frame is not None:
                        raise UserError(f"{rows[0].name} has several frames: name a folder with --out, or use --json -")
                    encoded: Any = segmenter.encode([(pixels, [text for row in rows for text in row.texts])])
                    found = segmenter.decode(encoded)
                    for row in rows:
                        stem = names.stem(row, frame)
                        for nth, one in enumerate(islice(found, len(row.texts))):
                            write(json_row(row, frame, one))
                            files = save_pictures(one, nth, stem, folder)
                            done += 1
                            if to_stdout:
                                continue
                            of = "" if len(sources) == 1 and frame is None else f"{stem}: "
                            share = 100 * float(one.mask.mean())
                            line = f"{of}{one.text!r}: {share:.1f} % of the image, score {one.score:.2f}{files}"
                            tqdm.write(line.encode(errors="backslashreplace").decode())
            except UserError as error:
                failures.append(str(error))
            bar.update(len(rows))
        if failures and not done:
            raise UserError(_failed(failures, len(sources)))  # here: a file of results that is there stays
    if failures:
        raise UserError(_failed(failures, len(sources)))


def _failed(failures: list[str], of: int) -> str:
    if of == 1:
        return failures[0]
    more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
    return f"{len(failures)} of {of} images could not be read, the others are done: {'; '.join(failures[:5])}{more}"


def _serve(settings: Namespace) -> None:
    from dataclasses import fields

    limits = ServeSettings(**{one.name: settings[one.name] for one in fields(ServeSettings)})
    try:
        from cmmasksd.serving.api import create_app, make_server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'cmmasksd[serve]'") from None
    from cmmasksd.inference.predictor import Segmenter

    segmenter = Segmenter.from_pretrained(settings.model, device=settings.device)
    key = os.environ.get(KEY_VARIABLE)
    folder = Path(settings.model)
    name = folder.name if folder.is_dir() else settings.model  # clients need no path of ours
    server, listening = make_server(create_app(segmenter, name, limits, key), limits)
    host, port = listening.getsockname()[:2]
    page = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    print(f"{settings.model} is served at {page} (Ctrl+C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in good order by then
        server.run(sockets=[listening])


def _export(settings: Namespace) -> None:
    if settings.ort is not None and settings.format != "web":
        raise UserError("--ort goes with --format web: leave it out")

    def say(line: str) -> None:
        print(f"{line} …", file=sys.stderr)

    if settings.format == "web":
        from cmmasksd.serving.site import write_site

        done = write_site(settings.model, settings.out, ort=settings.ort, int8=settings.int8, progress=say)
        size = sum(file.stat().st_size for file in settings.out.rglob("*") if file.is_file())
        how = f"try it: python -m http.server --directory {settings.out}"
    else:
        from cmmasksd.inference.export import export

        done = export(settings.model, settings.out, format=settings.format, int8=settings.int8, progress=say)
        size = sum(file.stat().st_size for file in settings.out.iterdir())
        how = f"try it: cmmasksd predict --model {settings.out} …" if settings.format == "onnx" else "torch.export.load"
    parity = ", ".join(f"{name} {value:.2g}" for name, value in done.parity.items())
    print(f"{settings.out}: {size / 1e6:.1f} MB; compared with torch: {parity}; {how}")


def _explain(settings: Namespace) -> None:
    import torch

    from cmmasksd.data.images import read_image
    from cmmasksd.explain import explain, load_objective
    from cmmasksd.inference.batch import slug
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

    _require_words(settings.text)
    pixels = read_image(settings.image, exif=True)
    model = CMMaskSDModel.from_pretrained(settings.model)
    objective = load_objective(settings.model, model)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    found = explain(objective, CMMaskSDProcessor.from_pretrained(settings.model), pixels, settings.text)
    for nth, one in enumerate(found):
        picture = settings.out / f"{settings.image.stem}_{nth + 1}_{slug(one.text)}_explained.png"
        one.picture().save(picture)
        print(f"{one.text!r} -> {picture}")


def _require_words(texts: list[str]) -> None:
    for text in texts:
        if not text.strip():
            raise UserError("--text is empty: give a sentence of at least one word")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of the shell that are not UTF-8
            raise UserError(f"--text {text!r} is not UTF-8 text: type it again")


def _data(settings: Namespace) -> None:
    from cmmasksd.data.loading import open_dataset
    from cmmasksd.data.refer import write_refer_release

    how = settings.scenes
    for name, count in (("--train", how.train), ("--test", how.test)):
        if count < 1:
            raise UserError(f"{name} is {count}: every split needs at least 1 reference")
    counts = {"train": how.train, "val": how.test, "testA": how.test, "testB": how.test}
    splits = [
        open_dataset(how.name, split, references=count, seed=how.seed, canvas=how.size)
        for split, count in counts.items()
    ]
    write_refer_release(how.out, splits)
    print(f"{sum(map(len, splits))} references in {how.out}; read them with --data refcoco --root {how.out}")


def _pretrain(settings: Namespace, parser: ArgumentParser) -> None:
    from cmmasksd.training.pretrain import pretrain

    made: Any = parser.instantiate(settings)
    print(f"the CLIP is in {pretrain(made.pretrain)}")


def _push(settings: Namespace) -> None:
    from cmmasksd.evaluation.results import read_results
    from cmmasksd.model import hub

    to_hub = hub.is_hub_id(settings.to)
    if to_hub and Path(settings.to).parent.is_dir():
        raise UserError(f"--to {settings.to} may be a folder or a hub id: write ./{settings.to} for the folder")
    folder = hub.model_folder(settings.model)
    results = []
    for path in settings.results:
        results.append(read_results(path))
        if results[-1].get("weights") != hub.weights_digest(folder):
            raise UserError(f"{path} does not hold scores of {settings.model}: score this model with cmmasksd evaluate")
    name = settings.to if to_hub else Path(settings.to).resolve().name
    if settings.card is None:
        card = hub.model_card(folder, name, results, licence=settings.license)
    else:
        card = settings.card.read_text(encoding="utf-8")
    files = hub.contents(folder, card)
    if to_hub:
        print(hub.upload(files, settings.to, private=settings.private))
    else:
        hub.write_folder(files, Path(settings.to).expanduser())
        print(f"{', '.join(files)} in {settings.to}; the card is {Path(settings.to) / hub.CARD}")


def _report(settings: Namespace) -> None:
    print(_write_report(settings.model, [settings.results], settings.root, settings.metrics, settings.out))


def _write_report(model: str, folders: list[Path], root: Path | None, metrics: Path | None, out: Path) -> Path:
    """A page for the first folder's split (examples), with the scores of all folders."""
    import json

    from cmmasksd.data.loading import open_dataset
    from cmmasksd.evaluation.report import choose_examples, collect_examples, write_report
    from cmmasksd.evaluation.results import read_expressions, read_results
    from cmmasksd.inference.predictor import Segmenter

    results = [read_results(folder) for folder in folders]
    first = results[0]
    if "data" not in first:
        raise UserError(f"{folders[0]} does not say which data set was scored: score it with `cmmasksd evaluate`")
    rows = []
    if metrics is not None:
        if not metrics.is_file():
            raise UserError(f"there is no log {metrics}: leave out --metrics, or give the metrics.jsonl of a run")
        try:
            rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise UserError(f"{metrics} is no log of a run ({error}): give the metrics.jsonl of a run") from None
    data = open_dataset(
        first["data"],
        first["split"],
        root=root,
        references=first.get("references", 0),
        seed=first.get("scene_seed", 0),
        canvas=first.get("scene_size", 128),
    )
    segmenter = Segmenter.from_pretrained(model, threshold=first["protocol"]["threshold"])
    chosen = choose_examples(read_expressions(folders[0]), 12)
    return write_report(
        out,
        title=f"CM-MaskSD on {first['data']} {first['split']}",
        results=results,
        examples=collect_examples(data, segmenter, chosen),
        curves=rows,
        facts={"model": model},
    )


def _completion(settings: Namespace) -> None:
    from importlib.util import find_spec

    if find_spec("shtab") is None:
        raise UserError("completions are written by the package shtab: pip install 'cmmasksd[completion]'")
    print(build_parser().get_completion_script(f"shtab-{settings.shell}"))


# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    parsers = parser._subcommands_action._name_parser_map  # pyright: ignore
    name = f"cmmasksd {arguments[0]}" if arguments and arguments[0] in parsers else "cmmasksd"
    try:
        settings = parser.parse_args(arguments)
        command = settings.command
        chosen: Namespace = settings[command]
        own = parsers[command]
        run: dict[str, Callable[[], None]] = {
            "demo": lambda: _demo(chosen, own),
            "train": lambda: _train(chosen, own),
            "evaluate": lambda: _evaluate(chosen),
            "compare": lambda: _compare(chosen),
            "predict": lambda: _predict(chosen),
            "serve": lambda: _serve(chosen),
            "explain": lambda: _explain(chosen),
            "export": lambda: _export(chosen),
            "data": lambda: _data(chosen),
            "pretrain": lambda: _pretrain(chosen, own),
            "push": lambda: _push(chosen),
            "report": lambda: _report(chosen),
            "completion": lambda: _completion(chosen),
        }
        run[command]()
    except ArgumentError as error:
        return _fail(f"{name}: {_usage_mistake(error)} (see {name} --help)", 2)
    except UserError as error:
        return _fail(f"{name}: {error}", 2)
    except KeyboardInterrupt:
        return _fail(f"{name}: interrupted", 130)
    except SystemExit as left:
        if left.code != 143:  # argparse leaves so after --help
            raise
        return _fail(f"{name}: terminated", 143)
    except BrokenPipeError:  # as `| head` does; without this, Python complains once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if (refusal := _refusal(error)) is None:
            raise
        return _fail(f"{name}: {refusal}", 2)
    return 0


def _fail(line: str, code: int) -> int:
    """Say one line below whatever progress bar is shown; the code is passed on."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    print(line, file=sys.stderr)
    return code


def _usage_mistake(error: ArgumentError) -> str:
    """The parser's message as one line in the user's words: no class names, options as they are typed."""
    line = " ".join(str(error).split()).removesuffix(".")
    line = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", line)
    line = re.sub(r"<class '([\w.]+)'>", r"\1", line)
    optional = r" - Expected a NoneType Given value type: .*? Given value: "
    line = re.sub(rf"Does not validate .*? Errors: - (.*?)(?:\. Got value: .*?)?{optional}", r"\1. Got value: ", line)
    line = re.sub(r'Parser key "([\w.]+)"', r"--\1", line)
    if line.startswith("the following arguments are required: "):
        line = re.sub(r"(?:\w+\.)+(\w+)", r"--\1", line)
    if "training.accumulate" in line:  # a setting of earlier versions
        line += "; it follows from training.batch, the references per update over all processes"
    return line


def _refusal(error: Exception) -> str | None:
    """What the operating system refused, in one line; None where the error is a mistake in the program."""
    if isinstance(error, OSError):
        reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        where = f"{error.filename}: " if error.filename is not None else ""
    elif "inline_container" in str(error) or "(os error " in str(error):  # how torch and safetensors fail to write
        reason, where = " ".join(str(error).split()), "a file could not be written: "
    else:
        return None
    return f"{where}{reason}; check the path, its permissions and the free space"


if __name__ == "__main__":
    sys.exit(main())
