"""The command line: demo | train | evaluate | compare | predict | export | serve | explain | data | examples |
pretrain | push | report.

Exit codes: 0 when the command did its work, 2 for a user's mistake or a disk that refuses (one line on standard error
says what is wrong and how to mend it), 130 when interrupted, 141 when the reader of its output went away, 143 when
training got SIGTERM. Programming errors keep their traceback. Heavy imports live inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmmasksd.config import (
    DATASETS,
    MAX_REFERENCES,
    MAX_SCENE_SIZE,
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    PretrainConfig,
    TrainingConfig,
)
from cmmasksd.errors import UserError, shown
from cmmasksd.evaluation.protocols import METRIC_NAMES
from cmmasksd.serving.settings import KEY_VARIABLE, ServeSettings, checked_key

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SCENE_REFERENCES = 1500
"""References of a generated split, where a command is not told how many."""
CONFIGS = Path(__file__).parent / "configs"
MAX_RESAMPLES, MAX_WORKERS, MAX_SEED = 10_000_000, 256, 2**63 - 1
"""Bounds of numbers on the command line: what is beyond them is a slip, and would take all memory or for ever."""
MODEL = "folder of a trained model, hub id, or scenes: the one that ships"


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    import yaml
    from jsonargparse import (
        ActionConfigFile,  # pyright: ignore (documented, but not in its __all__)
        ArgumentParser,
        get_loader,
        set_loader,
        set_parsing_settings,
    )

    from cmmasksd import __version__

    class ConfigFile(ActionConfigFile):
        """A file of settings by its path, or one of the package's by its name."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            super().__call__(parser, cfg, _config_file(values), option_string)

    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    # a file's name that is not UTF-8 is no YAML either, as which every value is tried first
    set_loader("yaml", get_loader("yaml"), (yaml.YAMLError, UnicodeEncodeError))
    parser = ArgumentParser(
        prog="cmmasksd",
        description="Type a sentence, get the mask of the object it names.",
        version=__version__,
        exit_on_error=False,  # main says it in one line
    )
    commands = parser.add_subcommands(dest="command", required=True)

    demo = ArgumentParser(description="Train on generated scenes, score, and write a page to look at.")
    demo.add_argument("--config", action=ConfigFile, help="settings of the run; the built-in ones train in minutes")
    demo.add_argument(
        "--trained", type=str | None, help="score this model and train none, such as scenes: the one that ships"
    )
    _add_config(demo)
    commands.add_subcommand("demo", demo, help="train on generated scenes, score, and write report.html")

    train = ArgumentParser(description="Train a model. Settings come from --config and from single --keys.")
    train.add_argument(
        "--config", action=ConfigFile, help=f"YAML file of settings, or the name of one: {', '.join(_config_names())}"
    )
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
        help="write a line of JSON for every sentence to this file as it is found, or with - to standard output",
    )
    predict.add_argument(
        "--resume", action="store_true", help="continue the file of --json after its run was interrupted or killed"
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
        description="A web page and an HTTP API for a model. With CMMASKSD_API_KEY set, both ask for that key."
    )
    serve.add_argument("--model", default="scenes", help=MODEL)
    serve.add_argument("--device", type=str | None, help="such as cpu or cuda; by itself a GPU where there is one")
    serve.add_class_arguments(ServeSettings, skip={"allowed_hosts"})
    serve.add_argument(
        "--allowed_hosts",
        nargs="+",
        type=str,
        default=[],
        help="host names in the addresses that clients use, beside IP addresses and localhost (default: --host, or any"
        " name where that is the address of a network)",
    )
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

    examples = ArgumentParser(description="Write example images, with sentences to try on them.")
    examples.add_argument("--out", type=Path, default=Path("."), help="folder for the images")
    commands.add_subcommand("examples", examples, help="write example images to try the commands on")

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


def _config_names() -> list[str]:
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def _config_file(given: str) -> str:
    """What --config names: a file, or a configuration that the package has. (YAML itself is passed on too.)"""
    if os.path.exists(given) or any(sign in given for sign in ":{\n"):
        return given
    if given not in _config_names():
        raise UserError(f"there is no file {given}, nor a configuration of this name: {', '.join(_config_names())}")
    return str(CONFIGS / f"{given}.yaml")


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
    _require_dataset(config.data.name, "--data.name")
    config.training.resume |= getattr(settings, "resume", False)
    return config


def _require_dataset(name: str, option: str) -> None:
    """Refuse an unknown data set before torch is imported, which takes seconds."""
    if name not in DATASETS:
        raise UserError(f"{option} {shown(name)} is an unknown data set: choose one of {', '.join(DATASETS)}")


def _require_between(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{option} is {value}: give a whole number from {least} to {most}")


def _demo(settings: Namespace, parser: ArgumentParser) -> None:
    config = _config(settings, parser)
    from cmmasksd.data.scenes import STYLES

    if config.data.name not in STYLES:
        raise UserError(f"demo runs on generated scenes, not {config.data.name}: use `cmmasksd train` for other data")
    from cmmasksd.evaluation.results import format_table, read_results
    from cmmasksd.training.checkpoint import STATE
    from cmmasksd.training.loop import train

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
    _require_dataset(settings.data, "--data")
    _require_between("--references", settings.references, 1, MAX_REFERENCES)
    _require_between("--scene_size", settings.scene_size, 64, MAX_SCENE_SIZE)
    _require_between("--workers", settings.workers, 0, MAX_WORKERS)
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
    from cmmasksd.evaluation.results import RESULTS_FILE, read_expressions, read_results
    from cmmasksd.files import write_text

    _require_between("--resamples", settings.resamples, 100, MAX_RESAMPLES)
    _require_between("--seed", settings.seed, 0, MAX_SEED)
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
        write_text(settings.out, json.dumps(rows, indent=2) + "\n")
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

    from cmmasksd.data.datasets import open_dataset
    from cmmasksd.evaluation.evaluate import evaluate, make_accelerator
    from cmmasksd.evaluation.protocols import ORIGINAL
    from cmmasksd.evaluation.results import write_results
    from cmmasksd.model.hub import model_folder, weights_digest
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

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
    from cmmasksd.model.hub import model_folder

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


def _serve(settings: Namespace) -> None:
    from dataclasses import fields
    from ipaddress import ip_address

    limits = ServeSettings(**{one.name: settings[one.name] for one in fields(ServeSettings)})
    key = checked_key(os.environ.get(KEY_VARIABLE))
    try:
        from cmmasksd.serving.api import create_app, make_server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'cmmasksd[serve]'") from None
    from cmmasksd.inference.predictor import Segmenter

    segmenter = Segmenter.from_pretrained(settings.model, device=settings.device)
    folder = Path(settings.model)
    name = folder.name if folder.is_dir() else settings.model  # clients need no path of ours
    server, listening = make_server(create_app(segmenter, name, limits, key), limits)
    host, port = listening.getsockname()[:2]
    if key is None and not ip_address(host).is_loopback:
        print(f"warning: anyone who reaches {host}:{port} can use the model: set {KEY_VARIABLE}", file=sys.stderr)
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
    _require_words(settings.text)
    _require_between("--seed", settings.seed, 0, MAX_SEED)
    import torch

    from cmmasksd.data.images import read_image
    from cmmasksd.explain import explain, load_objective
    from cmmasksd.inference.batch import refuse_url, slug
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

    refuse_url(settings.image)
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
    from cmmasksd.data.samples import is_blank, is_text

    for text in texts:
        if is_blank(text):
            raise UserError("--text is empty: give a sentence of at least one word")
        if not is_text(text):
            raise UserError(f"--text {text!r} is not UTF-8 text: type it again")


def _data(settings: Namespace) -> None:
    how = settings.scenes
    _require_between("--train", how.train, 1, MAX_REFERENCES)
    _require_between("--test", how.test, 1, MAX_REFERENCES)
    _require_between("--size", how.size, 64, MAX_SCENE_SIZE)
    from cmmasksd.data.datasets import open_dataset
    from cmmasksd.data.readers.refer_release import write_refer_release

    counts = {"train": how.train, "val": how.test, "testA": how.test, "testB": how.test}
    splits = [
        open_dataset(how.name, split, references=count, seed=how.seed, canvas=how.size)
        for split, count in counts.items()
    ]
    write_refer_release(how.out, splits)
    print(f"{sum(map(len, splits))} references in {how.out}; read them with --data refcoco --root {how.out}")


def _examples(settings: Namespace) -> None:
    from cmmasksd.data.scenes.examples import write_examples

    for file, sentences in write_examples(settings.out):
        print(f"{file}: {', '.join(map(repr, sentences))}")


def _pretrain(settings: Namespace, parser: ArgumentParser) -> None:
    from cmmasksd.pretraining.loop import pretrain

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
    from cmmasksd.data.datasets import open_dataset
    from cmmasksd.evaluation.examples import choose_examples, collect_examples
    from cmmasksd.evaluation.report import read_log, write_report
    from cmmasksd.evaluation.results import read_expressions, read_results
    from cmmasksd.inference.predictor import Segmenter
    from cmmasksd.model.hub import model_folder, weights_digest

    results = [read_results(folder) for folder in folders]
    first = results[0]
    if "data" not in first:
        raise UserError(f"{folders[0]} does not say which data set was scored: score it with `cmmasksd evaluate`")
    if first.get("weights", digest := weights_digest(model_folder(model))) != digest:
        raise UserError(f"{folders[0]} holds the scores of another model: score {model} with `cmmasksd evaluate`")
    rows = read_log(metrics) if metrics is not None else []
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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be text that the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
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
            "examples": lambda: _examples(chosen),
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
    if group := re.match(r"(--\w+): Unable to load config", line):  # such as `--data photos`
        keys = {"--data": ["name"], "--model": ["backbone", "weights"]}.get(group[1], ["KEY"])
        named = " or ".join(f"{group[1]}.{key}" for key in keys)
        line = f"{group[1]} stands for a group of settings: name one of them, {named}"
    if line.startswith("the following arguments are required: "):
        line = re.sub(r"(?:\w+\.)+(\w+)", r"--\1", line)
    if "training.accumulate" in line:  # a setting of earlier versions
        line += "; it follows from training.batch, the references per update over all processes"
    line = str(UserError(line))  # without control characters
    return line if len(line) < 700 else f"{line[:400]} … {line[-200:]}"


def _refusal(error: Exception) -> str | None:
    """What the operating system refused, in one line; None where the error is a mistake in the program."""
    if isinstance(error, OSError):
        reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        where = "" if error.filename is None else str(error.filename)
        where = f"{where if len(where) < 300 else shown(where, 100)}: " if where else ""
    elif "inline_container" in str(error) or "(os error " in str(error):  # how torch and safetensors fail to write
        reason, where = " ".join(str(error).split()), "a file could not be written: "
    else:
        return None
    return str(UserError(f"{where}{reason}; check the path, its permissions and the free space"))


if __name__ == "__main__":
    sys.exit(main())
