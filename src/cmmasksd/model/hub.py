"""Models on the Hugging Face hub: the files that make one, its generated card, upload and download.

Only the files named here ever go up or come down: weights without pickle, JSON, YAML, the card. No code is fetched, and
nothing of the run (optimiser state, logs) is published. A local folder is a hub too: `--to ./folder` writes what would
be uploaded, to be looked at first.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cmmasksd.assets import located
from cmmasksd.errors import UserError, reason, shown
from cmmasksd.model.auto import MODEL_TYPE

REQUIRED = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
FILES = (*REQUIRED, "config.yaml", "distillation.safetensors")
CARD = "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
JSON_BYTES, TOKENIZER_BYTES = 1 << 20, 32 << 20
"""How large a JSON file of a model may be, and one of its tokenizer. CLIP's tokenizer.json has 2 MB."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can only be a hub id: USER/NAME, and no folder. "./scenes" and "/models/a" are folders."""
    text = str(name)
    is_path = text.startswith((".", "/", "~")) or ":" in text or Path(text).is_dir()
    return text.count("/") == 1 and not is_path


def model_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a model of ours: a shipped one, a local folder, or the download of a hub id.

    Args:
        name: "scenes", a folder, or USER/NAME.
        revision, token, cache_dir, local_files_only, force_download: of the hub, as `snapshot_download` has them.

    Raises:
        UserError: when there is no such folder, or the hub does not give the files.
    """
    hub = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    return files_of(name, FILES, **hub)


def files_of(name: str | Path, patterns: Iterable[str], **hub: Any) -> Path:
    """The folder of any model: a shipped one, a local folder, or the download of these files of a hub id.

    Raises:
        UserError: when there is no such folder, or the hub does not give the files.
    """
    name = located(name)
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise UserError(f"there is no model folder {name}: give the folder of a trained model or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), **hub))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load {name}: there is no such folder, and the hub does not give it ({reason(error)})"
        ) from error


def require(
    folder: Path,
    files: Iterable[str] = REQUIRED,
    remedy: str = "give the folder of a trained model, such as runs/…/best",
) -> None:
    """Stop where a folder lacks files that its model needs.

    Raises:
        UserError: with their names.
    """
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing[:5])}: {remedy}")


def small(file: Path, limit: int) -> Path:
    """The file, if it is there and has at most `limit` bytes.

    Raises:
        UserError: otherwise.
    """
    if not file.is_file():
        raise UserError(f"there is no {file}: get it again, or give another folder")
    if (size := file.stat().st_size) > limit:
        raise UserError(f"{file} has {size} bytes, expected at most {limit}: get it again, or give another folder")
    return file


def read_json(file: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that may be a stranger's.

    Args:
        file: to be read.
        limit: the most bytes it may have.

    Raises:
        UserError: when there is no such file, it is too large, nested too deep, not UTF-8, or no JSON object.
    """
    remedy = "get it again, or give another folder"
    small(file, limit)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({reason(error)}): {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {shown(found)}, expected a JSON object: {remedy}")
    return found


@contextmanager
def no_panic() -> Iterator[None]:
    """A panic of the tokenizers library, which damaged files cause, as an Exception: it is none by itself."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library broke off: {error}") from None


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights; `evaluate` stores it, so that no card shows another model's scores."""
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- what is published


def contents(folder: Path, card: str) -> dict[str, Path | bytes]:
    """The files of a model as they are published: name -> where it lies, or what it holds.

    Raises:
        UserError: when the folder lacks a file that loading needs, or holds another kind of model.
    """
    _check(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES if (folder / name).is_file()}
    if "config.yaml" in files:
        import yaml

        files["config.yaml"] = yaml.safe_dump(_without_paths(_settings(folder)), sort_keys=False).encode()
    return files | {CARD: card.encode()}


def write_folder(files: Mapping[str, Path | bytes], out: Path) -> None:
    """Write a model's files as a folder; one that an earlier call wrote is replaced at once.

    Raises:
        UserError: when the folder holds anything else.
    """
    if out.exists() and (not out.is_dir() or {file.name for file in out.iterdir()} - {*FILES, CARD}):
        raise UserError(f"{out} holds other files: choose a new folder")
    if any(isinstance(source, Path) and source.parent.resolve() == out.resolve() for source in files.values()):
        raise UserError(f"{out} is the model's own folder: choose a new one")
    aside, old = (out.with_name(out.name + end) for end in (".new", ".old"))
    for rest in (aside, old):
        shutil.rmtree(rest, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, source in files.items():
        if isinstance(source, bytes):
            (aside / name).write_bytes(source)
        else:
            shutil.copyfile(source, aside / name)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def upload(
    files: Mapping[str, Path | bytes], repo_id: str, *, private: bool = False, token: str | bool | None = None
) -> str:
    """Upload a model's files in one commit; the repository is made if it is not there. Returns its address.

    Raises:
        UserError: when the hub refuses, or a repository that should be private is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        # None, not False: without the wish to hide it, the owner's own default holds
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise UserError(f"{repo_id} is there already and is public: choose another name, or leave out --private")
        operations = [CommitOperationAdd(name, source) for name, source in files.items()]
        api.create_commit(repo_id, operations, commit_message="Model of cmmasksd")
    except Exception as error:
        of_the_net = type(error).__module__.startswith("httpx")  # the hub's library changed from httpx to httpx2
        if isinstance(error, UserError) or not (of_the_net or isinstance(error, OSError | ValueError)):
            raise
        raise UserError(
            f"the hub did not take {repo_id} ({error}); check the name, the connection, and that `hf auth login` or "
            "HF_TOKEN gives a token that may write"
        ) from error
    return str(url)


# -- the card


def model_card(folder: Path, name: str, results: Sequence[Mapping[str, Any]] = (), *, licence: str = "mit") -> str:
    """The README.md of a model, from its files and its scores.

    Args:
        folder: of the model.
        name: USER/NAME, or what the folder is called.
        results: as `cmmasksd.evaluation.results.read_results` gives them, one per scored split.
        licence: of the weights, by the hub's identifier.

    Raises:
        UserError: as `contents`.
    """
    import yaml

    _check(folder)
    settings = _settings(folder)
    header: dict[str, Any] = {
        "license": licence,
        "library_name": "cmmasksd",
        "pipeline_tag": "image-segmentation",
        "tags": ["referring-image-segmentation", "clip", "cm-masksd"],
    }
    if results:
        header["model-index"] = [{"name": name.split("/")[-1], "results": [_index_entry(one) for one in results]}]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    scenes = str(settings.get("data", {}).get("name", "")).startswith("scenes")
    parts = [
        f"---\n{front}---\n",
        f"# {name}\n",
        "Referring image segmentation: an image and a sentence in, the mask of what the sentence names out. Made with "
        "cmmasksd, a public implementation of [CM-MaskSD](https://arxiv.org/abs/2305.11481).\n",
        "## Use\n",
        "```python\nfrom cmmasksd import Segmenter  # pip install cmmasksd\n"
        f'segmenter = Segmenter.from_pretrained("{name}")\n'
        'mask = segmenter.segment("picture.jpg", "the red circle on the left")[0].mask  # (H, W) bool\n```\n',
        "## Scores\n",
        *_scores(results, scenes),
        "## Data\n",
        _data(settings),
        "## Configuration\n",
        *_configuration(folder, settings),
        "## Limits\n",
        *_limits(folder, scenes),
        "## Licence\n",
        f"The weights: {licence}. CM-MaskSD is the work of its authors; cmmasksd is independent of them.\n",
    ]
    return "\n".join(parts)


def _check(folder: Path) -> None:
    require(folder)
    if (kind := read_json(folder / "config.json").get("model_type")) != MODEL_TYPE:
        raise UserError(f"{folder} is a {shown(kind)} model, not a {MODEL_TYPE!r}: give the folder of a trained model")


def _metrics(result: Mapping[str, Any]) -> list[str]:
    return ["oIoU", "mIoU", *sorted(key for key in result if key.startswith("P@"))]


def _index_entry(result: Mapping[str, Any]) -> dict[str, Any]:
    data, split = str(result.get("data", "unknown")), str(result["split"])
    return {
        "task": {"type": "image-segmentation", "name": "Referring image segmentation"},
        "dataset": {"name": f"{data} {split}", "type": data, "split": split, "args": dict(result["protocol"])},
        "metrics": [{"type": key, "name": key, "value": round(100 * result[key], 2)} for key in _metrics(result)],
    }


def _scores(results: Sequence[Mapping[str, Any]], scenes: bool) -> Iterable[str]:
    if not results:
        yield "None were given when this card was written.\n"
        return
    columns = _metrics(results[0])
    yield f"| data | split | expressions | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 3)}"
    for result in results:
        cells = [str(result.get("data", "?")), str(result["split"]), str(result["expressions"])]
        yield f"| {' | '.join([*cells, *(f'{100 * result[key]:.2f}' for key in columns)])} |"
    yield (
        "\nIn percent. oIoU is the sum of intersections over the sum of unions, mIoU the mean over sentences; papers "
        "print either as IoU."
    )
    for protocol in dict.fromkeys(tuple(result["protocol"].items()) for result in results):
        yield "Protocol: " + ", ".join(f"{key} `{value}`" for key, value in protocol) + "."
    if any(str(result.get("data", "")).startswith("scenes") for result in results) or scenes:
        yield "Scores on generated scenes compare with no published figure."
    yield ""


def _data(settings: Mapping[str, Any]) -> str:
    data = settings.get("data", {})
    if "name" not in data:
        return "The model's folder does not record it.\n"
    if str(data["name"]).startswith("scenes"):
        return (
            f"Generated scenes of coloured shapes (style `{data['name']}`, {data.get('train_references')} references, "
            f"seed {data.get('scene_seed')}); the best checkpoint was chosen on their `{data.get('val_split')}`.\n"
        )
    name = "Pictures labelled by the author (`manifest`)" if data["name"] == "manifest" else f"`{data['name']}`"
    return (
        f"{name}, trained on `{data.get('train_split')}`; the best checkpoint was chosen on "
        f"`{data.get('val_split')}`. The images have their own terms of use.\n"
    )


def _configuration(folder: Path, settings: Mapping[str, Any]) -> Iterable[str]:
    from safetensors import safe_open

    from cmmasksd.model.configuration import read_config
    from cmmasksd.model.processing import CMMaskSDProcessor

    config, processor = read_config(folder), CMMaskSDProcessor.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 (no mapping)
        kinds = sorted({one.get_dtype() for one in slices})
        count = sum(math.prod(one.get_shape()) for one in slices)
    height, width = processor.size
    yield "| | |\n|---|---|"
    yield f"| weights | {count / 1e6:.1f} M, {', '.join(kinds)} |"
    yield f"| input | {height}×{width} pixels (`{processor.resize}`), at most {processor.max_tokens} tokens |"
    joint = config.clip_config.projection_dim
    yield f"| CLIP | patches of {processor.patch_size} pixels, joint width {joint} |"
    yield f"| decoder | {config.decoder_layers} layers of width {config.decoder_width} |"
    if how := settings.get("distillation"):
        on = [name for key, name in (("vision", "LMVSD"), ("language", "VMLSD")) if how.get(key)]
        said = f"{' and '.join(on)}, loss `{how.get('loss')}`" if on else "none"
        yield f"| masked branches, while training | {said} |"
    yield "\nEvery setting is in `config.yaml`.\n" if settings else ""


def _limits(folder: Path, scenes: bool) -> Iterable[str]:
    if scenes:
        yield "- It knows generated scenes of coloured shapes and is of no use on photographs."
    yield "- A sentence that names nothing in the picture may still get a mask."
    yield "- A score is the mean probability inside the mask, not a calibrated confidence."
    longest = read_json(folder / "processor_config.json")["max_tokens"]
    yield f"- A sentence is cut after {longest} tokens. Words that its training did not have are guesses.\n"


def _settings(folder: Path) -> dict[str, Any]:
    """config.yaml, or nothing where there is none."""
    import yaml

    file = folder / "config.yaml"
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}): give a folder that training wrote") from None
    if not isinstance(read, dict) or not all(isinstance(read.get(key, {}), dict) for key in ("data", "distillation")):
        raise UserError(f"{file} holds no settings: give a folder that training wrote")
    return read


def _without_paths(value: Any) -> Any:
    """Settings without the folders of the machine: of an absolute path, its last name is left."""
    if isinstance(value, dict):
        return {key: _without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value
