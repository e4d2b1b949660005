"""Publishing a model: the files that go up, into a local folder or onto the Hugging Face hub.

Only the files named in `cmmasksd.model.locating` and the card go up: weights without pickle, JSON, YAML. Nothing of the
run (optimiser state, logs) is published. `--to ./folder` writes what would be uploaded, to be looked at first.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cmmasksd.errors import UserError
from cmmasksd.model.locating import FILES
from cmmasksd.publishing.card import CARD, check_folder, model_card, read_settings

if TYPE_CHECKING:
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor


def contents(folder: Path, card: str) -> dict[str, Path | bytes]:
    """The files of a model as they are published: name -> where it lies, or what it holds.

    Raises:
        UserError: when the folder lacks a file that loading needs, or holds another kind of model.
    """
    check_folder(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES if (folder / name).is_file()}
    if "config.yaml" in files:
        import yaml

        files["config.yaml"] = yaml.safe_dump(_without_paths(read_settings(folder)), sort_keys=False).encode()
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
    """Upload a model, its processor and a generated card; returns the address. `cmmasksd push` does it for a folder.

    Args:
        model: to be published.
        processor: the one it was trained with.
        repo_id: USER/NAME.
        results: of this model, as `read_results` gives them; they go into the card.
        licence: of the weights, by the hub's identifier.
        private: nobody else may see it.
        token: of the hub; None: the one that you are logged in with.

    Raises:
        UserError: when the hub refuses.
    """
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        files = contents(Path(folder), model_card(Path(folder), repo_id, results, licence=licence))
        return upload(files, repo_id, private=private, token=token)
