"""Files of instances in, data sets out, which our own readers open and training learns from."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmmasksd import cli
from cmmasksd.config import ExpressionConfig
from cmmasksd.data.expressions import Instance, InstanceFile
from cmmasksd.data.expressions.dataset import generate
from cmmasksd.data.expressions.meaning import Meaning
from cmmasksd.data.expressions.writing import write_manifest
from cmmasksd.data.readers.manifest import ManifestDataset
from cmmasksd.data.readers.refer import ReferDataset
from cmmasksd.errors import UserError
from data.expressions.layouts import COLOURS, HEIGHT, WIDTH, instance, random_scene, write_instances


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images with objects of four classes."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    images = []
    while len(images) < 12:
        scene, pixels = random_scene(rng, ["dog", "cat", "couch", "gizmo"], certain=False)
        if scene:
            images.append((pixels, scene))
    write_instances(root, images)
    return root


def run(*arguments: object) -> int:
    return cli.main(["data", "expressions", *map(str, arguments)])


def test_manifest(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "all.jsonl"
    arguments = "--instances", folder / "instances.json", "--per_object", 2, "--no_target", 0.2, "--val", 0.2
    assert run(*arguments, "--out", out) == 0
    said = capsys.readouterr().out
    assert "sentences for" in said
    assert "not named: " in said
    assert f"--data.name manifest --data.root {out}" in said
    file = InstanceFile(folder / "instances.json")
    masks = {(image.file_name, x.mask.tobytes()): x.category for image in file.images for x in file.instances(image)}
    data = ManifestDataset(out, "all")
    empty = 0
    for reference in data:
        mask = data.mask(reference)
        assert data.image(reference).shape == (HEIGHT, WIDTH, 3)
        if mask.any():
            assert any(content == mask.tobytes() for _, content in masks)
        empty += not mask.any()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    sentences = sum(len(row["expressions"]) for row in rows)
    assert 0.08 < empty / sentences < 0.35
    assert max(len(row["expressions"]) for row in rows) == 2
    assert all(len(set(row["expressions"])) == len(row["expressions"]) for row in rows)
    by_image = {(row["image"], row["split"]) for row in rows}
    assert len(by_image) == len({image for image, _ in by_image})
    assert {split for _, split in by_image} == {"train", "val"}

    again = tmp_path / "again" / "all.jsonl"
    assert run(*arguments, "--out", again) == 0
    assert again.read_bytes() == out.read_bytes()
    assert run(*arguments, "--out", tmp_path / "other.jsonl", "--seed", 1) == 0
    assert (tmp_path / "other.jsonl").read_bytes() != out.read_bytes()


def test_a_manifest_beside_the_images_copies_none(folder: Path):
    out = folder / "beside.jsonl"
    assert run("--instances", folder / "instances.json", "--out", out) == 0
    assert not (folder / "beside-images").exists()
    assert len(ManifestDataset(out, "all")) > 5
    assert json.loads(out.read_text().splitlines()[0])["image"].startswith("images/")


def test_refer_release(folder: Path, tmp_path: Path):
    out = tmp_path / "release"
    assert run("--instances", folder / "instances.json", "--out", out, "--val", 0.2, "--test", 0.2) == 0
    made = generate([InstanceFile(folder / "instances.json")], ExpressionConfig(val=0.2, test=0.2))
    assert [split.split for split in made.splits] == ["train", "val", "test"]
    for split in made.splits:
        read = ReferDataset("refcoco", out, split.split)
        assert [r.expressions for r in read] == [r.expressions for r in split]
        assert all((read.mask(a) == split.mask(b)).all() for a, b in zip(read, split, strict=True))


def test_sentences_of_an_image_do_not_depend_on_the_others(folder: Path, tmp_path: Path):
    content = json.loads((folder / "instances.json").read_text())
    content["images"] = content["images"][3:6]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "part.json").write_text(json.dumps(content))

    def texts(file: InstanceFile) -> dict[str, list[str]]:
        made: dict[str, list[str]] = {}
        for split in generate([file], ExpressionConfig(val=0)).splits:
            for reference in split:
                name = split.source(reference).image.file_name
                made.setdefault(name, []).extend(expression.text for expression in reference.expressions)
        return made

    whole = texts(InstanceFile(folder / "instances.json"))
    part = texts(InstanceFile(tmp_path / "part.json", folder / "images"))
    assert part
    assert part.items() <= whole.items()


def test_without_images_colours_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scene = [instance("gizmo", 10, 40, 50, 80), instance("gizmo", 105, 40, 150, 80)]
    path = write_instances(tmp_path, [(None, scene)] * 3)
    assert run("--instances", path, "--out", tmp_path / "made.jsonl") == 0
    assert "colours are left out" in capsys.readouterr().out
    assert run("--instances", path, "--out", tmp_path / "release") == 2
    assert "--images" in capsys.readouterr().err


def test_exif_orientation_is_followed_where_masks_are_drawn_on_the_turned_image(tmp_path: Path):
    """Phones store images lying down; CVAT draws masks on the upright one, COCO's own on the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((WIDTH, HEIGHT, 3), dtype=np.uint8)
    upright[:40] = COLOURS["red"]
    stored = np.rot90(upright)
    scene = [Instance("gizmo", (upright[..., 0] > 100))]
    path = write_instances(tmp_path, [(upright, scene)] * 2)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "images/1.png", exif=exif)
    lying = [Instance("gizmo", (stored[..., 0] > 100))]
    other = write_instances(tmp_path / "stored", [(np.ascontiguousarray(stored), lying)] * 2)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "stored/images/1.png", exif=exif)
    square = np.full((HEIGHT, HEIGHT, 3), 120, np.uint8)
    square[:40] = COLOURS["red"]
    third = write_instances(tmp_path / "square", [(square, [Instance("gizmo", square[..., 0] > 130)])] * 2)
    Image.fromarray(np.ascontiguousarray(np.rot90(square))).save(tmp_path / "square/images/1.png", exif=exif)
    for file, name in ((path, "a"), (other, "b"), (third, "c")):
        out = tmp_path / "out" / f"{name}.jsonl"
        assert run("--instances", file, "--out", out, "--val", 0, "--keep", 1) == 0
        data = ManifestDataset(out, "all")
        assert len(data) == 2
        for reference in data:
            assert (data.image(reference)[data.mask(reference)] == COLOURS["red"]).all()


def test_several_files_and_synonyms(folder: Path, tmp_path: Path):
    scene = [instance("thingummy", 10, 40, 50, 80)]
    second = write_instances(tmp_path, [(np.full((HEIGHT, WIDTH, 3), 128, np.uint8), scene)] * 2)
    words = tmp_path / "words.json"
    words.write_text('{"thingummy": "widget"}')
    out = tmp_path / "made.jsonl"
    files = "--instances", folder / "instances.json", second
    assert run(*files, "--out", out, "--synonyms", words) == 0
    text = out.read_text()
    assert "widget" in text
    assert "thingummy" not in text
    words.write_text('{"thingumy": "widget"}')
    assert run(*files, "--out", tmp_path / "again.jsonl", "--synonyms", words) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["annotations"][0].update(category_id=99), "category_id 99"),
        (lambda c: c["annotations"][0].update(image_id=99), "names image 99"),
        (lambda c: c["annotations"][0].update(iscrowd=2), "'iscrowd' 2"),
        (lambda c: c["annotations"][0].update(iscrowd="x"), "'iscrowd' 'x'"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, "x"]]), "annotation 1"),
        (lambda c: c["annotations"][0].update(segmentation={"size": [1, 1], "counts": "0"}), "annotation 1"),
        (lambda c: c["annotations"][0].update(order=1.5), "'order' 1.5"),
        (lambda c: c["images"][0].update(file_name="../../etc/passwd"), "not a path inside"),
        (lambda c: c["images"][0].update(file_name=None), "missing"),
        (lambda c: c["images"][0].update(width=10**9), "pixels"),
        (lambda c: c["images"][0].update(width=7), "160x120 pixels and its annotations are for 7x120"),
        (lambda c: c["images"].append(c["images"][0]), "appears twice"),
        (lambda c: c["categories"][0].update(name=" "), "is empty"),
        (lambda c: c["categories"][0].update(name="\ud800"), "not UTF-8"),
        (lambda c: c["annotations"].clear(), "can be named"),
    ],
)
def test_damaged_files_say_so_in_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    said: str,
):
    content = json.loads((folder / "instances.json").read_text())
    change(content)
    (tmp_path / "instances.json").write_text(json.dumps(content))
    out = tmp_path / "made.jsonl"
    assert run("--instances", tmp_path / "instances.json", "--images", folder / "images", "--out", out) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--out made.csv", "FILE.jsonl"),
        ("--out release --no_target 0.1", "--no_target needs a manifest"),
        ("--out made.jsonl --val 0.6 --test 0.5", "leave no image"),
        ("--out made.jsonl --keep 2", "keep must be"),
        ("--out made.jsonl --per_object 0", "per_object must be"),
        ("--out made.jsonl --no_target nan", "--no_target"),
        ("--out made.jsonl --images a b", "2 folders for 1 files"),
        ("--out made.jsonl --images absent", "absent does not exist"),
        ("--out made.jsonl --synonyms absent", "absent does not exist"),
    ],
)
def test_mistakes_on_the_command_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    said: str,
):
    monkeypatch.chdir(tmp_path)
    assert run("--instances", folder / "instances.json", *arguments.split()) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_what_fails_leaves_nothing(folder: Path, tmp_path: Path):
    splits = generate([InstanceFile(folder / "instances.json")], ExpressionConfig()).splits
    out = tmp_path / "made.jsonl"
    write_manifest(out, splits)
    with pytest.raises(UserError, match="already exists"):
        write_manifest(out, splits)

    class Failing(type(splits[0])):
        def mask(self, reference: Any) -> np.ndarray:
            raise KeyboardInterrupt

    failing = Failing(splits[0].split, list(splits[0]), splits[0]._sources)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path / "other.jsonl", [failing])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made-images", "made.jsonl"]


def test_images_without_a_file_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = json.loads((folder / "instances.json").read_text())
    content["images"][0]["file_name"] = "absent.png"
    (tmp_path / "instances.json").write_text(json.dumps(content))
    file = tmp_path / "instances.json"
    assert run("--instances", file, "--images", folder / "images", "--out", tmp_path / "made.jsonl") == 0
    assert "images without a file (1)" in capsys.readouterr().out


def test_a_run_as_users_start_it_and_a_step_of_training(folder: Path, tmp_path: Path):
    command = [sys.executable, "-m", "cmmasksd", "data", "expressions", "--instances", str(folder / "instances.json")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "own.jsonl"), "--no_target", "0.2", "--val", "0.2"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "sentences for" in done.stdout
    settings = {
        "data.name": "manifest",
        "data.root": tmp_path / "own.jsonl",
        "data.workers": 0,
        "data.val_references": 4,
        "model.backbone": "tiny",
        "model.size": "[64,64]",
        "model.decoder_width": 32,
        "model.decoder_mlp": 48,
        "model.decoder_heads": 4,
        "model.head_width": 16,
        "training.epochs": 1,
        "training.batch": 8,
        "training.out": tmp_path / "run",
    }
    assert cli.main(["train", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    assert (tmp_path / "run" / "best").is_dir()


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["voc", "coco", "ccp", "nuts"])
def test_real_photographs(real_data: Path, name: str):
    """Every sentence singles its object out by a claim that is read again from its mask."""
    path = real_data / "photos" / name / "instances.json"
    if not path.is_file():
        pytest.skip(f"{path} does not exist: photographs with instances are not among the real data")
    file = InstanceFile(path)
    images = random.Random(0).sample(file.images, 12)
    file.images = images
    made = generate([file], ExpressionConfig(no_target=0.2, val=0.2))
    assert sum(len(split) for split in made.splits) > 12
    for split in made.splits:
        for reference in split:
            source = split.source(reference)
            if source.annotation is None:
                assert not split.mask(reference).any()
                continue
            mask = split.mask(reference)
            assert mask.mean() >= 0.004
            assert not source.annotation.crowd
            alike = [a for a in source.image.annotations if a.category == source.annotation.category]
            text = reference.expressions[0].text.removeprefix("the ")
            meaning = Meaning(file.instances(source.image))
            if text in meaning.vocabulary.nouns(source.annotation.category):
                assert len(alike) == 1, text
            if not source.annotation.verified:
                assert len(alike) == 1, text
