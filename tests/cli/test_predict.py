"""`cmmasksd predict`: files, folders, manifests, videos, standard input, and runs that are killed and resumed."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.commands import lines, main, photo
from cmmasksd.data.masks import decode_segmentation
from cmmasksd.data.readers.manifest import ManifestDataset
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.inference import predict
from cmmasksd.inference.predictor import Segmenter


def test_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)).save(tmp_path / "a b.png")
    texts = ["the red circle", "true", "a: [star] / Stern", "红色的圆", "true"]
    given = [part for text in texts for part in ("--text", text)]
    out = tmp_path / "out" / "masks"
    assert main("predict", "--model", run / "best", "--image", tmp_path / "a b.png", *given, "--out", out) == 0
    shown = capsys.readouterr().out.splitlines()
    masks, overlays = sorted(out.glob("*_mask.png")), sorted(out.glob("*_overlay.png"))
    assert len(masks) == len(overlays) == len(shown) == len(texts)
    assert len(list(out.iterdir())) == 2 * len(texts) + 1
    with Image.open(out / "a b_labelled.png") as pixels:
        assert pixels.size == (360, 148)
    for text, line, mask, overlay in zip(texts, shown, masks, overlays, strict=True):
        assert repr(text) in line
        with Image.open(mask) as pixels:
            assert (pixels.mode, pixels.size) == ("L", (90, 37))
            assert set(np.unique(pixels)) <= {0, 255}
        with Image.open(overlay) as pixels:
            assert (pixels.mode, pixels.size) == ("RGB", (90, 37))


def test_predict_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A damaged file among many costs itself only; names do not collide; frames of an animation are images."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for nth, name in enumerate(("a.png", "A.jpg", "b.gif")):
        photo(folder / name, nth)
    (folder / "aa.jpg").write_bytes((folder / "A.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("not an image")
    (tmp_path / "texts.txt").write_text("red circle\n\nstar\n")
    given = ["--image", folder, "--text", "the left one", "--texts", tmp_path / "texts.txt", "--threshold", 0.1]
    assert main("predict", "--model", run / "best", *given, "--out", out, "--json", out / "rows.jsonl") == 2
    shown, said = capsys.readouterr()
    assert said.startswith("cmmasksd predict: 1 of 4 images could not be read, the others are done: image ")
    assert "aa.jpg does not decode" in said
    rows = lines(out / "rows.jsonl")
    texts = ["the left one", "red circle", "star"]
    wanted = [("A.jpg", None), ("a.png", None), ("b.gif", 1), ("b.gif", 2), ("b.gif", 3)]
    assert [(Path(row["image"]).name, row.get("frame"), row["text"]) for row in rows] == [
        (*one, text) for one in wanted for text in texts
    ]
    assert len(shown.splitlines()) == len(rows) == 15
    pictures = {file.name for file in out.glob("*.png")}
    assert len({name.casefold() for name in pictures}) == 35
    assert {"A_labelled.png", "a_2_labelled.png", "b_f0003_labelled.png"} <= pictures
    stems = ("A", "a_2", "b_f0001", "b_f0002", "b_f0003")
    for nth, row in enumerate(rows):
        with Image.open(out / f"{stems[nth // 3]}_{nth % 3 + 1}_{row['text'].replace(' ', '-')}_mask.png") as image:
            mask = np.asarray(image) > 0
        np.testing.assert_array_equal(decode_segmentation(row["rle"], *row["size"]), mask)
        assert row["area"] == mask.sum()
        assert (row["box"] is None) == (not mask.any())
        assert 0 <= row["score"] <= 1


def test_a_name_that_is_not_utf_8(tiny_model_folder: Path, tmp_path: Path):
    """Shown escaped, in a process of its own: here pytest has the standard output."""
    folder = tmp_path / "in"
    folder.mkdir()
    photo(tmp_path / "a.png")
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "a.png").rename(folder / name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    command = [sys.executable, "-m", "cmmasksd", "predict", "--model", tiny_model_folder]
    out, rows_file = tmp_path / os.fsdecode(b"\xe9"), tmp_path / os.fsdecode(b"\xe9.jsonl")
    for image, target in ((folder, rows_file), (folder / name, "-")):
        given = ["--image", image, "--text", "left one", "--out", out, "--json", target]
        done = subprocess.run([*command, *given], capture_output=True, timeout=600, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        done.stdout.decode("utf-8")
        text = done.stdout if target == "-" else rows_file.read_bytes()
        assert Path(json.loads(text)["image"]) == folder / name
        assert {file.name for file in out.iterdir()} == {f"caf-_1_left-one_{kind}.png" for kind in ("mask", "overlay")}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_predict_a_manifest(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", 1)
    rows = [("a.png", "left|right", "k1"), ("a.png", "star", "k2"), ("absent.png", "x", "k3"), ("b.png", "y", "k4")]
    if kind == "csv":
        text = "image,expressions,id\n" + "".join(",".join(row) + "\n" for row in rows)
    else:
        keys = ("image", "expressions", "id")
        text = "".join(json.dumps(dict(zip(keys, (i, t.split("|"), k), strict=True))) + "\n" for i, t, k in rows)
    (tmp_path / f"m.{kind}").write_text(text)
    encoded, encode = [], Segmenter.encode
    monkeypatch.setattr(Segmenter, "encode", lambda *given: encoded.append(1) or encode(*given))
    monkeypatch.chdir(tmp_path)
    assert main("predict", "--model", run / "best", "--image", f"m.{kind}", "--json", "-") == 2
    shown, said = capsys.readouterr()
    found = [json.loads(line) for line in shown.splitlines()]
    assert [(row["id"], row["text"]) for row in found] == [
        ("k1", "left"), ("k1", "right"), ("k2", "star"), ("k4", "y")
    ]  # fmt: skip
    assert {row["image"] for row in found} == {"a.png", "b.png"}
    assert "line 3" not in said
    assert "absent.png does not exist" in said
    assert len(encoded) == 2  # the two rows about a.png share it
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "b.png", f"m.{kind}"}  # --json alone: no pictures


def test_images_that_cannot_be_read_are_counted_and_named_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "a.png")
    Path("m.csv").write_text("image,expressions\n" + "absent.png,x\na.png,x\n" * 12)
    assert main("predict", "--model", run / "best", "--image", "m.csv", "--json", "rows.jsonl") == 2
    said = capsys.readouterr().err
    assert "1 of 2 images could not be read" in said
    assert said.count("absent.png") == 1
    assert len(lines(Path("rows.jsonl"))) == 12
    names = [f"{'long' * 40}/{nth}.png" for nth in range(12)]
    Path("m.csv").write_text("image,expressions\n" + "".join(f"{name},x\n" for name in names))
    assert main("predict", "--model", run / "best", "--image", "m.csv", "--json", "new.jsonl") == 2
    said = capsys.readouterr().err
    assert "12 of 12 images" in said
    assert "/2.png" in said
    assert "and 9 more" in said
    assert len(said) < 400


def test_predict_from_standard_input_to_standard_output(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
):
    photo(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    given = ["predict", "--model", run / "best", "--text", "the red circle", "--threshold", "0.1"]
    assert main(*given, "--image", "a.png", "--out", "out") == 0
    capsysbinary.readouterr()
    content = Path("a.png").read_bytes()
    with Image.open("out/a_1_the-red-circle_mask.png") as image:
        wanted = np.asarray(image)
    for target in ("--out", "--json"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(*given, "--image", "-", target, "-") == 0
        shown, said = capsysbinary.readouterr()
        assert said == b""
        if target == "--out":
            with Image.open(io.BytesIO(shown)) as image:
                np.testing.assert_array_equal(np.asarray(image), wanted)
        else:
            (row,) = (json.loads(line) for line in shown.splitlines())
            assert row["image"] == "-"
            np.testing.assert_array_equal(decode_segmentation(row["rle"], *row["size"]), wanted > 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "out"]


def test_a_video_frame_by_frame(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    av = pytest.importorskip("av", reason="the extra data is not installed")
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in (av.VideoFrame(64, 48, "yuv420p"), av.VideoFrame(64, 48, "yuv420p"), None):
            for packet in stream.encode(frame):
                video.mux(packet)
    given = ["predict", "--model", run / "best", "--text", "the red circle"]
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    assert main(*given, "--image", tmp_path / "clip.mp4", "--json", rows, "--out", out) == 0
    assert [row["frame"] for row in lines(rows)] == [1, 2]
    assert all(row["size"] == [48, 64] for row in lines(rows))
    assert sorted(file.name for file in out.iterdir()) == [
        *(f"clip_f000{nth}_1_the-red-circle_{kind}.png" for nth in (1, 2) for kind in ("mask", "overlay")),
        "clip_labelled.mp4",
    ]
    require_video(out / "clip_labelled.mp4", out, "clip_f000{}_1_the-red-circle_overlay.png", 2)
    assert main(*given, "--text", "star", "--image", tmp_path / "clip.mp4", "--out", tmp_path / "two") == 0
    require_video(tmp_path / "two" / "clip_labelled.mp4", tmp_path / "two", "clip_f000{}_labelled.png", 2)
    (out / "clip_labelled.mp4").unlink()  # as if the run had been killed just before it
    assert main(*given, "--image", tmp_path / "clip.mp4", "--json", rows, "--out", out, "--resume") == 0
    require_video(out / "clip_labelled.mp4", out, "clip_f000{}_1_the-red-circle_overlay.png", 2)
    capsys.readouterr()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert main(*given, "--image", tmp_path / "bad.mp4") == 2
    assert "does not decode after frame 0" in capsys.readouterr().err


def require_video(file: Path, folder: Path, pattern: str, count: int) -> None:
    """A video of the files that the pattern names, five per second."""
    import av

    with av.open(str(file)) as video:
        assert video.streams.video[0].average_rate == 5
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
    assert len(frames) == count
    for nth, frame in enumerate(frames, start=1):
        with Image.open(folder / pattern.format(nth)) as image:
            assert frame.shape[:2] == image.size[::-1]
            assert abs(frame - np.asarray(image)).mean() < 25


KILLED = """
import os, signal, sys
from PIL import Image
from cmmasksd import cli
from cmmasksd.inference import rows

def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)

where, nth = sys.argv[1], int(sys.argv[2])
class Dying:  # a file that dies with the process at its nth write, when half of it is on the disk
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *given): self.file.close()
    def write(self, content):
        global nth
        nth -= 1
        if nth == 0:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()
        self.file.write(content)
path_open = rows.Path.open
def opened(path, mode="r", *given, **named):
    file = path_open(path, mode, *given, **named)
    return Dying(file) if mode in ("ab", "a+b") and path.name == where else file
if where == "picture":
    save = Image.Image.save
    def saved(*given, **named):
        global nth
        nth -= 1
        if nth == 0:
            given[1].write_bytes(b"half")
            die()
        save(*given, **named)
    Image.Image.save = saved
else:
    rows.Path.open = opened
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_killed_prediction_resumes_without_a_row_lost_or_doubled(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Real SIGKILLs: in half a picture, in half a row, in half a line of the state. One image cannot be read."""
    monkeypatch.chdir(tmp_path)
    for nth, name in enumerate(("a.png", "b.gif", "c.png", "d.png")):
        photo(tmp_path / name, nth)
    names = ["a.png", "b.gif", "a.png", "absent.png", "c.png", "c.png", "d.png"]  # one twice, one in neighbouring rows
    rows = [{"image": name, "expressions": ["left one", "red circle"][: 1 + nth % 2]} for nth, name in enumerate(names)]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["predict", "--model", tiny_model_folder, "--image", "m.jsonl", "--device", "cpu"]
    assert main(*given, "--json", "whole.jsonl", "--out", "whole") == 2
    said = capsys.readouterr().err
    assert "1 of 5 images could not be read" in said

    command = [*map(str, given), "--json", "rows.jsonl", "--out", "out", "--resume"]
    sizes = []
    for where, nth in (("picture", 3), ("rows.jsonl", 2), ("rows.jsonl.resume", 2), ("rows.jsonl", 3)):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, where, str(nth), *command], capture_output=True, text=True, timeout=600
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        sizes.append(Path("rows.jsonl").stat().st_size)
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < sizes[-1] < Path("whole.jsonl").stat().st_size
    for _ in range(2):  # the second time nothing is left to do, but for the image that fails again
        assert main(*command) == 2
        assert capsys.readouterr().err == said
        assert Path("rows.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
        for file in Path("whole").iterdir():
            assert Path("out", file.name).read_bytes() == file.read_bytes()
        assert len(os.listdir("out")) == len(os.listdir("whole"))

    photo(tmp_path / "absent.png")
    assert main(*command) == 0
    assert len(lines(Path("rows.jsonl"))) == len(lines(Path("whole.jsonl"))) + 2
    capsys.readouterr()
    before = Path("rows.jsonl").read_bytes()
    for changed, name in (
        (["--threshold", "0.6"], "--threshold"),
        (["--min_score", "0.6"], "--min_score"),
        (["--out", "elsewhere"], "--out"),
        (["--model", "scenes"], "model"),
    ):
        assert main(*command, *changed) == 2
        assert f"rows.jsonl was begun with another {name}: " in capsys.readouterr().err
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert main(*command) == 2
    assert "another list of images and sentences" in capsys.readouterr().err
    assert main(*command[:-1]) == 2
    assert "rows.jsonl already holds rows: resume its run with --resume" in capsys.readouterr().err
    assert Path("rows.jsonl").read_bytes() == before


def test_an_interrupt_keeps_what_was_predicted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    read = predict.read_frames

    def frames(source: Path):
        if source.name == "c.png":
            raise KeyboardInterrupt
        return read(source)

    monkeypatch.setattr(predict, "read_frames", frames)
    given = ["--image", tmp_path, "--text", "x", "--json", tmp_path / "rows.jsonl"]
    assert main("predict", "--model", run / "best", *given) == 130
    assert [Path(row["image"]).name for row in lines(tmp_path / "rows.jsonl")] == ["a.png", "b.png"]


def test_min_score_empties_the_masks_of_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = SceneDataset("scenes", "val", 1)
    Image.fromarray(data.image(data[0])).save(tmp_path / "scene.png")
    text, frames = data[0].expressions[0].text, [Image.open(tmp_path / "scene.png")] * 2
    frames[0].save(tmp_path / "scene.gif", save_all=True, append_images=[frames[1].transpose(0)])
    given = ["--model", "scenes", "--text", text, "--text", "elephant", "--threshold", 0.01]
    json_file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    assert main("predict", *given, "--image", tmp_path / "scene.png", "--json", json_file) == 0
    here, absent = lines(json_file)
    assert 0 <= absent["presence"] < here["presence"] <= 1
    assert [here["present"], absent["present"]] == [True, True]
    assert min(here["area"], absent["area"]) > 0
    capsys.readouterr()
    given += ["--min_score", (here["presence"] + absent["presence"]) / 2, "--out", out]
    json_file.unlink()
    assert main("predict", *given, "--image", tmp_path / "scene.png", "--json", json_file) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"{text!r}: {100 * here['area'] / 128**2:.1f} % of the image, score {here['score']:.2f} -> " in first
    assert f"'elephant': not found (presence {absent['presence']:.2f}) -> " in second
    found, empty = lines(json_file)
    assert found == here
    assert empty == absent | {"present": False, "area": 0, "score": 0.0, "box": None, "rle": empty["rle"]}
    assert not decode_segmentation(empty["rle"], *empty["size"]).any()
    with Image.open(out / "scene_2_elephant_mask.png") as mask:
        assert mask.getextrema() == (0, 0)
    assert main("predict", *given, "--image", tmp_path / "scene.gif") == 0
    assert capsys.readouterr().out.count("'elephant': not found (presence 0.") == 2


def test_predict_on_a_real_photograph(real_data: Path, run: Path, tmp_path: Path):
    photograph = min((real_data / "refer-mini" / "images" / "train2014").glob("*.jpg"))
    assert main("predict", "--model", run / "best", "--image", photograph, "--text", "man", "--out", tmp_path) == 0
    with Image.open(photograph) as image:
        size = image.size
    for file in tmp_path.iterdir():
        with Image.open(file) as image:
            assert image.size == size
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("where", ["apart", "beside"])
def test_predictions_are_corrected_in_labelme_and_trained_on(run: Path, tmp_path: Path, where: str):
    """predict -> labelme -> train: the folder that predict writes is a data set."""
    folder = tmp_path / "in"
    out = folder if where == "beside" else tmp_path / "out" / "labels"
    folder.mkdir()
    for nth, name in enumerate(("a.png", "A.jpg", "c.jpg", "d.png")):
        photo(folder / name, nth)
    given = ["--model", run / "best", "--image", folder, "--text", "left", "--text", "top", "--threshold", 0.01]
    assert main("predict", *given, "--labelme", out) == 0
    assert len(list(out.glob("*.json"))) == 4
    assert len(list(out.iterdir())) == 8
    data = ManifestDataset(out, "all")
    assert len(data) == 8
    for reference in data:
        assert reference.expressions[0].text in ("left", "top")
        assert data.image(reference).shape[:2] == data.mask(reference).shape == (24, 32)
    file = out / "c.json"
    content = json.loads(file.read_text())
    content["shapes"] = [content["shapes"][0] | {"label": "corner", "points": [[1, 1], [9, 1], [9, 9], [1, 9]]}]
    file.write_text(json.dumps(content))  # as somebody corrects it
    corrected = ManifestDataset(out, "all")
    assert sum(r.expressions[0].text == "corner" and corrected.mask(r).sum() == 64 for r in corrected) == 1
    small = ["--model.size", "[64,64]", "--model.decoder_width", 32, "--model.decoder_mlp", 48]
    small += ["--model.decoder_heads", 4, "--model.head_width", 16, "--model.backbone", "tiny"]
    small += ["--data.workers", 0, "--data.val_references", 0, "--training.epochs", 1, "--training.batch", 2]
    assert (
        main("train", "--data.name", "manifest", "--data.root", out, *small, "--training.out", tmp_path / "fitted") == 0
    )
    assert (tmp_path / "fitted" / "best").is_dir()


def test_labelme_and_coco_are_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.gif")
    given = ["--model", run / "best", "--image", tmp_path / "a.png", "--text", "left", "--threshold", 0.01]
    out, file = tmp_path / "out", tmp_path / "made.json"
    assert main("predict", *given, "--labelme", out, "--coco", file) == 0
    content = json.loads(file.read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png"]
    assert content["annotations"][0]["expression"] == content["categories"][0]["name"] == "left"
    data = ManifestDataset(file, "all")  # corrected in another tool, it can be trained on
    assert [data[i].expressions[0].text for i in range(len(data))] == ["left"]
    assert data.mask(data[0]).sum() == content["annotations"][0]["area"]
    assert not list(tmp_path.glob("*_mask.png"))
    capsys.readouterr()
    for more, said in (
        (["--labelme", out], "already holds JSON files"),
        (["--coco", file], "already exists"),
        (["--coco", tmp_path / "new.json", "--json", tmp_path / "rows.jsonl", "--resume"], "leave out --coco"),
        (["--coco", tmp_path / "new.json", "--image", tmp_path / "b.gif"], "use --labelme"),
        (["--coco", "-"], "do not write to standard output"),
    ):
        assert main("predict", *given, *more) == 2
        assert said in capsys.readouterr().err
    assert main("predict", *given, "--image", tmp_path / "b.gif", "--labelme", tmp_path / "frames") == 0
    assert len(list((tmp_path / "frames").glob("b_f000*.png"))) == 3


def test_coco_of_many_images(run: Path, tmp_path: Path):
    for nth, name in enumerate(("a/1.png", "b/1.png", "b/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo(tmp_path / name, nth)
    rows = [{"image": name, "text": text} for name in ("a/1.png", "b/1.png", "b/2.png") for text in ("left", name)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", run / "best", "--image", tmp_path / "rows.jsonl", "--threshold", 0.01]
    assert main("predict", *given, "--coco", tmp_path / "elsewhere" / "all.json", "--labelme", tmp_path / "l") == 0
    content = json.loads((tmp_path / "elsewhere" / "all.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a/1.png", "b/1.png", "b/2.png"]
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert len(names) == 4
    assert [names[a["category_id"]] for a in content["annotations"]] == [row["text"] for row in rows]
    assert [a["image_id"] for a in content["annotations"]] == [1, 1, 2, 2, 3, 3]
    assert len({a["id"] for a in content["annotations"]}) == 6
    labels = [json.loads(file.read_text()) for file in (tmp_path / "l").glob("*.json")]
    assert len({label["imagePath"] for label in labels}) == 3
    assert len(ManifestDataset(tmp_path / "l", "all")) == 6


def test_probabilities_are_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Many sentences about a large image would need four bytes for each of its pixels and sentences."""
    photo(tmp_path / "a.png")
    segment, alive = predict._segment, []

    def watched(*arguments):
        for prediction in segment(*arguments):
            alive.append(weakref.ref(prediction.segmentation.probability))
            yield prediction
            del prediction
            gc.collect()
            assert sum(probability() is not None for probability in alive) <= 1

    monkeypatch.setattr(predict, "_segment", watched)
    texts = [part for nth in range(5) for part in ("--text", f"{nth}")]
    outputs = [
        "--out",
        tmp_path / "out",
        "--json",
        tmp_path / "j",
        "--coco",
        tmp_path / "c",
        "--labelme",
        tmp_path / "l",
    ]
    assert main("predict", "--model", run / "best", "--image", tmp_path / "a.png", *texts, *outputs) == 0
    assert len(alive) == 5
