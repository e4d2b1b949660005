"""Options and checks that several commands share."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import (
    ActionConfigFile,  # pyright: ignore (documented, but not in its __all__)
    ArgumentParser,
    Namespace,
)

from cmmasksd.config import Config, DataConfig, DistillationConfig, ModelConfig, TrainingConfig
from cmmasksd.errors import UserError

MODEL = "folder of a trained model, hub id, or a shipped model: photos, for photographs, or scenes, for coloured shapes"
DEVICE = "device, such as cpu or cuda; default: a GPU if there is one"
CONFIGS = Path(__file__).parents[1] / "configs"
MAX_SEED = 2**63 - 1
"""Largest seed that torch takes."""


class ConfigFile(ActionConfigFile):
    """A file of settings by its path, or a configuration in the package by its name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        resume = cfg.get("training.resume")
        try:
            super().__call__(parser, cfg, _config_file(values), option_string)
        except UnicodeDecodeError:
            raise UserError(f"{values} is not UTF-8 text: save it as UTF-8") from None
        if resume:  # --resume before --config: config.yaml of earlier versions says `resume: false`
            cfg["training.resume"] = True


def config_names() -> list[str]:
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def _config_file(name: str) -> str:
    """The file that --config names: by its path, or a configuration in the package. YAML itself is passed on."""
    if os.path.exists(name) or any(sign in name for sign in ":{\n"):
        return name
    if name not in config_names():
        raise UserError(f"there is no file {name} and no such configuration: choose from {', '.join(config_names())}")
    return str(CONFIGS / f"{name}.yaml")


def add_config(parser: ArgumentParser) -> None:
    """Add the options of a training run."""
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_class_arguments(DistillationConfig, "distillation")
    parser.add_class_arguments(TrainingConfig, "training", skip={"resume"})
    add_resume(parser, "training")


def add_resume(parser: ArgumentParser, key: str) -> None:
    """Add the setting `resume` of a group of settings, with --resume as its short name."""
    parser.add_argument(
        "--resume",
        f"--{key}.resume",
        dest=f"{key}.resume",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help=f"resume the run in {key}.out from its last checkpoint, with the same settings",
    )


def run_config(settings: Namespace) -> Config:
    """The settings of a training run."""
    return Config(settings.data, settings.model, settings.distillation, settings.training)


def field_values(kind: Any, settings: Namespace) -> dict[str, Any]:
    """The values of the options that `add_class_arguments` made of a dataclass."""
    return {field.name: settings[field.name] for field in fields(kind)}


def is_main_process() -> bool:
    """Whether this process prints the results of a launch of several processes."""
    return os.environ.get("RANK", "0") == "0"


def require_words(texts: list[str]) -> None:
    from cmmasksd.data.samples import require_expression

    for text in texts:
        require_expression(text, "--text")
