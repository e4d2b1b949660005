"""Model name to folder: a shipped model, a local folder, or a download from the Hugging Face hub.

Only the files named here are downloaded: weights without pickle, JSON, YAML. No code is fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmmasksd.assets import located
from cmmasksd.errors import UserError, reason, shown
from cmmasksd.files import safe_path, sha256

MODEL_TYPE = "cmmasksd"
"""`model_type` in the config.json of our models."""
REQUIRED = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
FILES = (*REQUIRED, "config.yaml", "distillation.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
HUB_PREFIX = "hf-hub:"
"""What open_clip's names of models on the hub begin with."""
OPEN_CLIP_CONFIG = "open_clip_config.json"
WEIGHTS = "model.safetensors"
REMEDY = "choose a backbone in transformers' format, or name one in open_clip's hf-hub:USER/NAME"
PREPROCESSOR = "preprocessor_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
JSON_BYTES, TOKENIZER_BYTES = 1 << 20, 64 << 20
"""Size limits of a model's JSON files and of its tokenizer's files. CLIP's tokenizer.json has 2 MB, SigLIP 2's 34."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is a hub id, USER/NAME, and not a folder. "./scenes" and "/models/a" are folders."""
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
    """The folder of a trained model: shipped, local, or downloaded from the hub.

    Args:
        name: "scenes", a folder, or USER/NAME.
        revision, token, cache_dir, local_files_only, force_download: passed to huggingface_hub's `snapshot_download`.

    Raises:
        UserError: there is no such folder, and the files cannot be downloaded.
    """
    hub = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    return files_of(name, (*FILES, *TOKENIZER_FILES, PREPROCESSOR), **hub)


def files_of(name: str | Path, patterns: Iterable[str], **hub: Any) -> Path:
    """The folder of any model: shipped, local, or downloaded from the hub.

    Args:
        name: "scenes", a folder, or USER/NAME.
        patterns: files to download.
        **hub: passed to huggingface_hub's `snapshot_download`.

    Raises:
        UserError: there is no such folder, and the files cannot be downloaded.
    """
    name = located(name)
    if Path(name).is_dir():
        return Path(name)
    if is_checkpoint(name):
        raise UserError(
            f"{name} is not a model folder: if it is a CLIP of OpenAI or open_clip, train on it with "
            f"--model.backbone {name}, or convert it with cmmasksd convert {name} --out FOLDER"
        )
    if not is_hub_id(name):
        raise UserError(f"there is no model folder {name}: give the folder of a trained model or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), **hub))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load {name}: there is no such folder, and the hub does not give it ({reason(error)})"
        ) from error


def is_checkpoint(name: str | Path) -> bool:
    """Whether a name is a CLIP in the format of OpenAI or open_clip: a file of weights, or hf-hub:USER/NAME."""
    return str(name).startswith(HUB_PREFIX) or (Path(name).suffix in _WEIGHT_SUFFIXES and Path(name).is_file())


def checkpoint_file(name: str | Path) -> Path:
    """The weights of a CLIP in the format of OpenAI or open_clip (see `is_checkpoint`), downloaded if need be.

    Raises:
        UserError: the files cannot be downloaded, or there are none.
    """
    if not str(name).startswith(HUB_PREFIX):
        return Path(name)
    for file in _OPEN_CLIP_WEIGHTS:
        folder = backbone_folder(name, (OPEN_CLIP_CONFIG, file))
        if (folder / file).is_file():
            require(folder, (OPEN_CLIP_CONFIG,), "give the id of a CLIP of open_clip")
            return folder / file
    raise UserError(f"{name} has neither {' nor '.join(_OPEN_CLIP_WEIGHTS)}: give the id of a CLIP of open_clip")


def open_clip_settings(folder: Path, section: str) -> dict[str, Any]:
    """A section of the open_clip_config.json in a folder; empty where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / OPEN_CLIP_CONFIG
    content = read_json(file).get(section, {}) if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: {section} is {shown(content)}, expected an object: get the file again")
    return content


def backbone_folder(name: str | Path, patterns: Iterable[str]) -> Path:
    """The folder of a backbone, as `files_of` gives it, or the folder that a checkpoint is in (see `is_checkpoint`).

    Raises:
        UserError: there is no such folder, and the files cannot be downloaded.
    """
    if str(name).startswith(HUB_PREFIX):
        hub_id = str(name).removeprefix(HUB_PREFIX)
        if not is_hub_id(hub_id):
            raise UserError(f"{shown(str(name))} is not a name on the hub: expected {HUB_PREFIX}USER/NAME")
        return files_of(hub_id, patterns)
    return Path(name).parent if is_checkpoint(name) else files_of(name, patterns)


def require(
    folder: Path,
    files: Iterable[str] = REQUIRED,
    remedy: str = "give the folder of a trained model, such as runs/…/best",
) -> None:
    """Refuse a folder that lacks files of its model.

    Raises:
        UserError: names the missing files.
    """
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing[:5])}: {remedy}")


def small(file: Path, limit: int) -> Path:
    """The file, if it is there and has at most `limit` bytes.

    Raises:
        UserError: it is missing or larger.
    """
    if not file.is_file():
        raise UserError(f"there is no {file}: get it again, or give another folder")
    if (size := file.stat().st_size) > limit:
        raise UserError(f"{file} has {size} bytes, expected at most {limit}: get it again, or give another folder")
    return file


def read_json(file: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that a stranger may have written.

    Args:
        file: the file.
        limit: maximum size in bytes.

    Raises:
        UserError: there is no such file, it is too large, nested too deep, not UTF-8, or not a JSON object.
    """
    remedy = "get it again, or give another folder"
    small(file, limit)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({reason(error)}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {shown(value)}, expected a JSON object: {remedy}")
    return value


@contextmanager
def no_panic() -> Iterator[None]:
    """Turn a panic of the tokenizers library, which damaged files cause, into an Exception: by itself it is not one."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library failed: {error}") from None


def model_type(folder: Path) -> str:
    """The `model_type` in config.json; "" where there is none."""
    if not (folder / "config.json").is_file():
        return ""
    return str(read_json(folder / "config.json").get("model_type", ""))


def weight_files(folder: Path) -> list[Path]:
    """The weights of a model in transformers' format: one file, or the files in its folder that an index names.

    Raises:
        UserError: a file is missing.
    """
    names = [name for kind in (WEIGHTS, "pytorch_model.bin") for name in (kind, f"{kind}.index.json")]
    name = next((name for name in names if (folder / name).is_file()), WEIGHTS)
    if not name.endswith(".json"):
        require(folder, (name,), REMEDY)
        return [folder / name]
    index = folder / name
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: weight_map is {shown(weight_map)}, expected an object: get the file again")
    in_cache = folder.resolve().parent.name == "snapshots"  # of the hub: every file is a link to a blob beside it
    files = {safe_path(folder, file, f"{index}: weight", outward_links=in_cache) for file in weight_map.values()}
    require(folder, sorted(str(file.relative_to(folder)) for file in files), "get the missing files too")
    return sorted(files)


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights. Results store it, so that a card cannot show another model's scores."""
    digests = [sha256(file) for file in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
