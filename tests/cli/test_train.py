"""`cmmasksd train`: what a run leaves on disk, on every kind of data, and runs that cannot go on."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cli.commands import lines, main
from cmmasksd.data.masks import mask_to_polygons
from cmmasksd.data.readers.refer import ReferDataset
from cmmasksd.data.scenes import SceneDataset
from data.expressions.layouts import random_scene, write_instances


def test_print_config(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """What is printed can be given back as --config."""
    with pytest.raises(SystemExit, match="0"):
        main("train", "--training.epochs", 3, "--print_config")
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["training"]["epochs"] == 3
    (tmp_path / "again.yaml").write_text(shown)
    with pytest.raises(SystemExit, match="0"):
        main("train", "--config", tmp_path / "again.yaml", "--print_config")
    assert capsys.readouterr().out == shown


def test_train_leaves_a_run(run: Path):
    text = (run / "config.yaml").read_text()
    for folder in ("best", "last"):
        assert (run / folder / "config.yaml").read_text() == text
        assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= set(
            os.listdir(run / folder)
        )
    rows = lines(run / "metrics.jsonl")
    assert any("loss" in row for row in rows)
    assert any("oIoU" in row and "mIoU" in row for row in rows)


def test_the_saved_config_is_the_config_of_the_run(
    run: Path, micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shown = []
    for given in (
        ["--config", run / "best" / "config.yaml"],
        [*micro, "--model.resize", "warp", "--training.out", run],
    ):
        with pytest.raises(SystemExit, match="0"):
            main("train", *given, "--print_config")
        shown.append(yaml.safe_load(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert not shown[0]["training"].pop("resume")
    assert not shown[0]["training"].pop("allow_change")
    assert shown[0] == yaml.safe_load((run / "config.yaml").read_text())


def test_resume_of_a_finished_run_changes_nothing(
    run: Path, micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(run, tmp_path / "run")
    assert main("train", *micro, "--training.out", copy, "--resume") == 0
    assert "oIoU" in capsys.readouterr().out
    assert (copy / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert (copy / "last/model.safetensors").read_bytes() == (run / "last/model.safetensors").read_bytes()


def test_a_run_that_cannot_be_written(place: dict[str, Path], micro: list[str], capsys: pytest.CaptureFixture[str]):
    assert main("train", *micro, "--training.out", place["file"] / "run") == 2
    err = capsys.readouterr().err
    assert "text.jpg" in err
    assert "Not a directory" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a matter of POSIX")
def test_a_full_disk(micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Files may not grow beyond a hundred kilobytes: the model's weights do not fit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = main("train", *micro, "--training.out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("cmmasksd train: a file could not be written")
    assert not (tmp_path / "run" / "best").exists()  # no half of a model


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_a_training_in_one_line(
    workers: int, release: Path, micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also where another process finds it, whose traceback torch would send along."""
    broken = shutil.copytree(release, tmp_path / "data")
    for image in (broken / "images/train2014").iterdir():
        image.write_bytes(image.read_bytes()[:300])
    given = ["--data.name=refcoco", f"--data.root={broken}", f"--training.out={tmp_path / 'run'}"]
    assert main("train", *micro, *given, f"--data.workers={workers}") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"cmmasksd train: image {broken}")
    assert "does not decode" in err


def test_train_and_evaluate_on_a_release(release: Path, micro: list[str], tmp_path: Path):
    given = ["--data.name=refcoco", f"--data.root={release}", "--data.per_image=3", "--distillation.warmup=0"]
    assert main("train", *micro, *given, "--training.out", tmp_path / "run") == 0
    scored = ["--data", "refcoco", "--root", release, "--split", "testB", "--out", tmp_path / "testB"]
    assert main("evaluate", "--model", tmp_path / "run" / "best", *scored) == 0
    results = json.loads((tmp_path / "testB" / "results.json").read_text())
    data = ReferDataset("refcoco", release, "testB")
    assert results["data"] == "refcoco"
    assert results["expressions"] == sum(len(data[i].expressions) for i in range(len(data)))
    page = tmp_path / "page.html"
    given = ["--model", tmp_path / "run" / "best", "--results", tmp_path / "testB", "--root", release, "--out", page]
    assert main("report", *given) == 0
    assert "refcoco testB" in page.read_text()


@pytest.mark.parametrize("kind", ["jsonl", "labelme"])
def test_train_evaluate_and_report_on_own_data(kind: str, micro: list[str], tmp_path: Path):
    """No row names a split; --data.root is a file, or a folder of labelme files."""
    scenes, own = SceneDataset("scenes", "train", 18, scene_size=64), tmp_path / "own"
    own.mkdir()
    rows = []
    for group in scenes.groups():
        name = f"{group[0]:02}.png"
        Image.fromarray(scenes.image(scenes[group[0]])).save(own / name)
        shapes = []
        for index in group:
            texts, polygons = [e.text for e in scenes[index].expressions], mask_to_polygons(scenes.mask(scenes[index]))
            rows.append({"image": name, "expressions": texts, "polygon": polygons})
            points = [np.reshape(polygon, (-1, 2)).tolist() for polygon in polygons]
            shapes += [{"label": texts[0], "points": p, "group_id": index, "shape_type": "polygon"} for p in points]
        if kind == "labelme":
            (own / name).with_suffix(".json").write_text(json.dumps({"shapes": shapes, "imagePath": name}))
    if kind == "jsonl":
        (own / "cups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = own / "cups.jsonl" if kind == "jsonl" else own
    given = ["--data.name=manifest", f"--data.root={root}", "--training.out", tmp_path / "run"]
    assert main("train", *micro, *given) == 0
    model = ["--model", tmp_path / "run" / "best"]
    scored = ["--data", "manifest", "--root", root, "--split", "test", "--out", tmp_path / "test"]
    assert main("evaluate", *model, *scored) == 0
    said = [row["sentence"] for row in lines(tmp_path / "test" / "expressions.jsonl")]
    assert said
    assert set(said) <= {text for row in rows for text in row["expressions"]}
    page = tmp_path / "page.html"
    assert main("report", *model, "--results", tmp_path / "test", "--root", root, "--out", page) == 0
    assert "manifest test" in page.read_text()


def test_train_evaluate_and_report_on_masks_with_class_names(micro: list[str], tmp_path: Path):
    """Sentences are made while training; presence is trained by those that name nothing."""
    rng, images = random.Random(3), []
    while len(images) < 16:
        scene, pixels = random_scene(rng, ["dog", "cat", "couch"], certain=True)
        if scene:
            images.append((pixels, scene))
    root = write_instances(tmp_path / "own", images)
    given = ["--data.name=instances", f"--data.root={root}", "--data.per_image=4", "--distillation.presence=0.2"]
    assert main("train", *micro, *given, "--training.freeze_image=true", "--training.out", tmp_path / "run") == 0
    row = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["presence"] > 0
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "last", backbone(micro))]
    trained = {name.removeprefix("clip."): value for name, value in weights[0].items()}
    for name, value in weights[1].items():  # the image tower is as it was, the text tower is not
        if name.startswith("vision_model.") and value.is_floating_point():
            torch.testing.assert_close(trained[name], value.float(), msg=name)
    name = "text_model.final_layer_norm.weight"
    assert not torch.equal(trained[name], weights[1][name].float())
    model = ["--model", tmp_path / "run" / "best"]
    assert (
        main("evaluate", *model, "--data", "instances", "--root", root, "--split", "val", "--out", tmp_path / "v") == 0
    )
    assert json.loads((tmp_path / "v" / "results.json").read_text())["expressions"] > 0
    assert main("report", *model, "--results", tmp_path / "v", "--root", root, "--out", tmp_path / "page.html") == 0
    assert "instances val" in (tmp_path / "page.html").read_text()


def backbone(micro: list[str]) -> Path:
    return Path(next(text.split("=")[1] for text in micro if text.startswith("--model.backbone=")))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_step_of_the_full_size(precision: str, tmp_path: Path):
    """ViT-B/16 at 480x480 with the benchmark's settings: it fits together, whatever it learns."""
    from accelerate.state import AcceleratorState
    from transformers import CLIPConfig, CLIPModel

    from cmmasksd.model.tokenizing import load_tokenizer

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the case before
    tokenizer = load_tokenizer("tiny")  # fewer pieces than CLIP's 49408, so its ids fit
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={"projection_dim": 512, **ends},  # 12 layers of 512, 77 positions, 49408 pieces
        vision_config={"patch_size": 16, "projection_dim": 512},  # 12 layers of 768, 224 pixels
        projection_dim=512,
    )
    assert config.text_config.vocab_size == 49408  # pyright: ignore
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    data, out = tmp_path / "data", tmp_path / "run"
    assert main("data", "scenes", "--out", data, "--train", 2, "--test", 1, "--size", 320) == 0
    given = {
        "data.root": data, "data.workers": 0, "model.backbone": tmp_path / "clip", "training.out": out,
        "training.epochs": 1, "training.batch": 2, "training.precision": precision,
        "distillation.start": 0.0, "distillation.warmup": 0.0,
    }  # fmt: skip
    assert main("train", "--config", "refcoco-vit-b16", *(f"--{key}={value}" for key, value in given.items())) == 0
    row = next(row for row in lines(out / "metrics.jsonl") if "loss" in row)
    assert all(np.isfinite(row[key]) and row[key] > 0 for key in ("loss", "seg", "lmvsd", "vmlsd", "grad_norm"))
    assert (out / "best" / "model.safetensors").stat().st_size > 600_000_000  # some 160 million weights of 4 bytes
