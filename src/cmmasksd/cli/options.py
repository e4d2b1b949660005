"""Options and checks that several commands share."""

import os
from pathlib import Path
from typing import Any

from jsonargparse import (
    ActionConfigFile,  # pyright: ignore (documented, but not in its __all__)
    ArgumentParser,
    Namespace,
)

from cmmasksd.config import DATASETS, Config, DataConfig, DistillationConfig, ModelConfig, TrainingConfig
from cmmasksd.errors import UserError, shown

MODEL = "folder of a trained model, hub id, or scenes: the one that ships"
CONFIGS = Path(__file__).parents[1] / "configs"
MAX_WORKERS, MAX_SEED = 256, 2**63 - 1
"""Bounds of numbers on the command line: what is beyond them is a slip, and would take all memory or for ever."""


class ConfigFile(ActionConfigFile):
    """A file of settings by its path, or one of the package's by its name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, _config_file(values), option_string)


def config_names() -> list[str]:
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def _config_file(given: str) -> str:
    """What --config names: a file, or a configuration that the package has. (YAML itself is passed on too.)"""
    if os.path.exists(given) or any(sign in given for sign in ":{\n"):
        return given
    if given not in config_names():
        raise UserError(f"there is no file {given}, nor a configuration of this name: {', '.join(config_names())}")
    return str(CONFIGS / f"{given}.yaml")


def add_config(parser: ArgumentParser) -> None:
    """Add the options of a training run."""
    parser.add_argument("--resume", action="store_true", help="resume the run in training.out")
    for kind, key in (
        (DataConfig, "data"),
        (ModelConfig, "model"),
        (DistillationConfig, "distillation"),
        (TrainingConfig, "training"),
    ):
        parser.add_class_arguments(kind, key)


def run_config(settings: Namespace) -> Config:
    """The settings of a training run."""
    config = Config(settings.data, settings.model, settings.distillation, settings.training)
    require_dataset(config.data.name, "--data.name")
    config.training.resume |= settings.resume
    return config


def is_main_process() -> bool:
    """Whether this process prints what all processes of a launch have computed."""
    return os.environ.get("RANK", "0") == "0"


def require_dataset(name: str, option: str) -> None:
    """Refuse an unknown data set before torch is imported, which takes seconds."""
    if name not in DATASETS:
        raise UserError(f"{option} {shown(name)} is an unknown data set: choose one of {', '.join(DATASETS)}")


def require_between(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{option} is {value}: give a whole number from {least} to {most}")


def require_words(texts: list[str]) -> None:
    from cmmasksd.data.samples import require_expression

    for text in texts:
        require_expression(text, "--text")
