"""The settings: the configurations in the package, defaults, round trips through YAML, and values that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import cmmasksd
from cmmasksd.cli import build_parser
from cmmasksd.cli.options import run_config
from cmmasksd.config import DATASETS, Config, DataConfig, DistillationConfig, ModelConfig, TrainingConfig
from cmmasksd.errors import UserError

CONFIGS = sorted((Path(cmmasksd.__file__).parent / "configs").glob("*.yaml"))


def parse(*arguments: str) -> Config:
    """What `cmmasksd train` makes of its arguments."""
    parser = build_parser()
    settings = parser.instantiate(parser.parse_args(["train", *arguments]))
    return run_config(settings.train)


def test_there_is_a_config_for_every_benchmark():
    names = {parse("--config", str(path)).data.name for path in CONFIGS}
    assert names == {"scenes", "refcoco", "refcoco+", "refcocog-umd", "instances"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_says_what_the_run_does(path: Path):
    config = parse("--config", str(path))
    assert config.data.name in DATASETS
    given = yaml.safe_load(path.read_text())
    resolved = config.as_dict()
    for part, values in given.items():
        assert {key: resolved[part][key] for key in values} == values
    assert config.training.out == Path("runs", path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_has_a_name_but_a_file_of_this_name_wins(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", path.stem) == parse("--config", str(path))
    Path(path.stem).write_text("training: {epochs: 77}\n")
    assert parse("--config", path.stem).training.epochs == 77
    assert parse("--config", "{training: {epochs: 76}}").training.epochs == 76


def test_scenes_tiny_is_the_built_in_default():
    config = parse("--config", str(next(path for path in CONFIGS if path.stem == "scenes-tiny")))
    default = Config()
    assert config.data == default.data
    assert config.model == default.model
    assert config.distillation == default.distillation
    assert replace(config.training, out=default.training.out) == default.training


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_the_benchmarks_differ_in_data_sentences_and_folder_only(name: str):
    """Tables compare the benchmarks, so nothing else may differ by accident."""
    config = parse("--config", str(next(path for path in CONFIGS if path.stem == f"{name}-vit-b16")))
    base = parse("--config", str(next(path for path in CONFIGS if path.stem == "refcoco-vit-b16")))
    assert replace(config.data, name=base.data.name) == base.data
    assert replace(config.model, max_tokens=base.model.max_tokens) == base.model
    assert config.distillation == base.distillation
    assert replace(config.training, out=base.training.out) == base.training
    assert config.training.batch == 64


def test_defaults_of_the_command_line_are_those_of_the_dataclasses():
    assert parse() == Config()


def test_keys_win_over_the_file(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("training: {epochs: 7, lr: 0.5}\nmodel: {size: [64, 96]}\n")
    config = parse("--config", str(file), "--training.epochs", "3")
    assert (config.training.epochs, config.training.lr, config.model.size) == (3, 0.5, (64, 96))


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--training.resume"], True),
        (["--training.resume=true"], True),
        (["--training.resume=false"], False),
        (["--resume", "--config", "{training: {epochs: 3}}"], True),
        (["--config", "{training: {resume: true}}"], True),
        (["--resume", "--config", "{training: {resume: false}}"], True),
        (["--config", "{training: {resume: false}}", "--resume"], True),
        (["--config", "{training: {resume: true}}", "--training.resume=false"], False),
    ],
)
def test_resume_is_one_setting_with_two_names(arguments: list[str], resume: bool):
    assert parse(*arguments).training.resume is resume


def test_the_saved_text_gives_the_same_config(tmp_path: Path):
    config = parse(
        "--data.name=refcoco+", "--data.root=/data/a b", "--model.size=[96, 64]", "--distillation.vision=false",
        "--distillation.loss=mse", "--training.lr=3e-4", "--training.out=runs/näme", "--training.precision=bf16",
    )  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(config.as_yaml())
    assert parse("--config", str(file)) == config
    assert config.data.root == Path("/data/a b")
    assert config.model.size == (96, 64)
    assert not config.distillation.vision


def test_as_dict_holds_plain_values():
    config = Config(DataConfig(root=Path("/data")), ModelConfig(size=(64, 32)))
    plain = config.as_dict()
    assert plain["data"]["root"] == "/data"
    assert plain["model"]["size"] == [64, 32]
    assert plain["training"]["out"] == "runs/train"
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 50, float("nan")])
@pytest.mark.parametrize("name", ["vision_ratio", "language_ratio"])
def test_a_ratio_is_between_0_and_1(name: str, value: float):
    with pytest.raises(UserError, match=rf"distillation\.{name} must be between 0 and 1 \(exclusive\), got {value}"):
        DistillationConfig(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 1.5}, r"distillation\.warmup must be between 0 and 1, got 1\.5"),
        ({"warmup": -0.1}, r"distillation\.warmup must be between 0 and 1, got -0\.1"),
        ({"temperature": 0.0}, r"distillation\.temperature must be above 0, got 0\.0"),
    ],
)
def test_distillation_refuses(values: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        DistillationConfig(**values)


@pytest.mark.parametrize("name", ["epochs", "batch", "batch_size", "log_every", "validate_every"])
def test_training_counts_are_at_least_1(name: str):
    with pytest.raises(UserError, match=rf"training\.{name} must be at least 1, got 0"):
        TrainingConfig(**({"batch": 4} | {name: 0}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_image": 0}, r"data\.per_image must be at least 1, got 0"),
        ({"workers": -1}, r"data\.workers must be between 0 and 256, got -1"),
        ({"greyscale": 1.5}, r"data\.greyscale must be between 0 and 1, got 1\.5"),
        ({"greyscale": float("nan")}, r"data\.greyscale must be between 0 and 1, got nan"),
    ],
)
def test_data_refuses(values: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        DataConfig(**values)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            (TrainingConfig, name)
            for name in ("lr", "clip_lr_scale", "weight_decay", "final_lr_scale", "max_grad_norm")
        ),
        *((DistillationConfig, name) for name in ("temperature", "vision_weight", "language_weight", "ground_truth")),
    ],
)
def test_numbers_that_make_no_sense(kind: type, name: str, value: float):
    with pytest.raises(UserError, match=rf"\w+\.{name} must be .*, got {value}"):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"training\.lr must be above 0, got 0\.0$"),
        ({"max_grad_norm": 0.0}, r"training\.max_grad_norm must be above 0, got 0\.0"),
        ({"final_lr_scale": 1.5}, r"training\.final_lr_scale must be between 0 and 1, got 1\.5"),
        ({"warmup_steps": -1}, r"training\.warmup_steps must be at least 0, got -1"),
        ({"save_every": -1}, r"training\.save_every must be at least 0, got -1"),
        ({"seed": -1}, r"training\.seed must be between 0 and \d+, got -1"),
        ({"seed": 2**32}, r"training\.seed must be between 0 and 2147483647, got 4294967296"),
        ({"batch_size": 16}, r"batch_size 16 only limits .*: give training\.batch too"),
    ],
)
def test_training_refuses(values: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**values)  # pyright: ignore


def test_settings_that_may_change_are_a_list_or_comma_separated():
    keys = ["training.lr", "data.root"]
    assert parse("--training.allow_change", "training.lr").training.allow_change == keys[:1]
    assert parse("--training.allow_change", "training.lr,data.root").training.allow_change == keys
    assert parse("--training.allow_change", "[training.lr, data.root]").training.allow_change == keys
