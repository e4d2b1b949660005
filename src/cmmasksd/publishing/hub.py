"""Publishing a model: onto the Hugging Face hub, or into a local folder to look at first.

Only the files named in `cmmasksd.model.locating` and the card are published: weights without pickle, JSON, YAML.
Nothing of the run (optimiser state, logs) goes with them, and no folder of this machine is named.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cmmasksd.errors import UserError
from cmmasksd.evaluation.results import read_results
from cmmasksd.files import whole_folder
from cmmasksd.model.locating import FILES, is_hub_id, model_folder, weights_digest
from cmmasksd.publishing.card import CARD, check_folder, model_card, read_settings

if TYPE_CHECKING:
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor


def publish(
    model: str | Path,
    to: str,
    *,
    results: Sequence[str | Path] = (),
    licence: str = "mit",
    card: str | Path | None = None,
    private: bool = False,
    token: str | bool | None = None,
) -> str:
    """Publish a trained model with its card.

    Args:
        model: folder of the model.
        to: USER/NAME on the hub, or a folder such as "./cups".
        results: folders that scoring wrote; their scores go into the card.
        licence: licence of the weights, by the hub's identifier.
        card: file to publish as README.md in place of the generated card.
        private: hide the repository from everybody else.
        token: token of the hub; None: that of the login.

    Returns:
        The address of the repository, or the folder.

    Raises:
        UserError: `to` may mean a folder or a hub id, the results are of other weights, the card is not UTF-8, the
            folder lacks a file that loading needs, or its target refuses it.
    """
    to_hub = is_hub_id(to)
    if to_hub and Path(to).parent.is_dir():
        raise UserError(f"{to} may be a folder or a hub id: write ./{to} for the folder")
    folder = model_folder(model)
    check_folder(folder)
    scores = [read_results(Path(path)) for path in results]
    digest = weights_digest(folder)
    for path, result in zip(results, scores, strict=True):
        if result.get("weights") != digest:
            raise UserError(f"{path} does not hold scores of {model}: score this model with `cmmasksd evaluate`")
    if card is None:
        text = model_card(folder, to if to_hub else Path(to).resolve().name, scores, licence=licence)
    else:
        try:
            text = Path(card).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{card} is not UTF-8 text: save it as UTF-8") from None
    files = contents(folder, text)
    if to_hub:
        return upload(files, to, private=private, token=token)
    write_folder(files, Path(to).expanduser())
    return to


def push_to_hub(
    model: CMMaskSDModel,
    processor: CMMaskSDProcessor,
    repo_id: str,
    *,
    results: Sequence[Mapping[str, Any]] = (),
    licence: str = "mit",
    private: bool = False,
    token: str | bool | None = None,
) -> str:
    """Upload a model from memory with its processor and a generated card; `publish` does it for a folder.

    Args:
        model: the model.
        processor: the processor that it was trained with.
        repo_id: USER/NAME.
        results: scores of this model for the card, as `cmmasksd.evaluation.results.read_results` gives them.
        licence: licence of the weights, by the hub's identifier.
        private: hide the repository from everybody else.
        token: token of the hub; None: that of the login.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub refuses.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        files = contents(folder, model_card(folder, repo_id, results, licence=licence))
        return upload(files, repo_id, private=private, token=token)


def contents(folder: Path, card: str) -> dict[str, Path | bytes]:
    """Collect the files of a model as they are published.

    Args:
        folder: folder of the model.
        card: text of README.md.

    Returns:
        File name -> its path or its content.

    Raises:
        UserError: the folder lacks a file that loading needs, or holds another kind of model.
    """
    check_folder(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES if (folder / name).is_file()}
    if "config.yaml" in files:
        files["config.yaml"] = public_settings(folder)
    return files | {CARD: card.encode()}


def public_settings(folder: Path) -> bytes:
    """A model's config.yaml without the folders of this machine: only the last name of an absolute path is left."""
    import yaml

    return yaml.safe_dump(_without_paths(read_settings(folder)), sort_keys=False).encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value


def write_folder(files: Mapping[str, Path | bytes], out: Path) -> None:
    """Write a model's files as a folder; a folder that an earlier call wrote is replaced at once.

    Args:
        files: see `contents`.
        out: the folder.

    Raises:
        UserError: the folder holds other files, or is the model's own.
    """
    if out.exists() and (not out.is_dir() or {file.name for file in out.iterdir()} - {*FILES, CARD}):
        raise UserError(f"{out} holds other files: choose a new folder")
    if any(isinstance(source, Path) and source.parent.resolve() == out.resolve() for source in files.values()):
        raise UserError(f"{out} is the model's own folder: choose a new one")
    with whole_folder(out) as folder:
        for name, source in files.items():
            if isinstance(source, bytes):
                (folder / name).write_bytes(source)
            else:
                shutil.copyfile(source, folder / name)


def upload(
    files: Mapping[str, Path | bytes], repo_id: str, *, private: bool = False, token: str | bool | None = None
) -> str:
    """Upload a model's files in one commit; the repository is created if it does not exist.

    Args:
        files: see `contents`.
        repo_id: USER/NAME.
        private: hide the repository from everybody else.
        token: token of the hub; None: that of the login.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub refuses, or a repository that should be private is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        # None, not False: the owner's default decides unless `private` is asked for
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise UserError(f"{repo_id} exists and is public: choose another name, or leave out --private")
        operations = [CommitOperationAdd(name, source) for name, source in files.items()]
        api.create_commit(repo_id, operations, commit_message="Model of cmmasksd")
    except Exception as error:
        is_network = type(error).__module__.startswith("httpx")  # the hub's library changed from httpx to httpx2
        if isinstance(error, UserError) or not (is_network or isinstance(error, OSError | ValueError)):
            raise
        raise UserError(
            f"the hub did not take {repo_id} ({error}); check the name, the connection, and that `hf auth login` or "
            "HF_TOKEN gives a token that may write"
        ) from error
    return str(url)
