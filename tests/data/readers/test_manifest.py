"""One's own data: every way to give a mask, splits that do not leak, and one line with file and line for a mistake."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cmmasksd.config import SplitConfig
from cmmasksd.data import images
from cmmasksd.data.datasets import open_dataset
from cmmasksd.data.masks import mask_to_polygons, mask_to_rle
from cmmasksd.data.readers.manifest import ManifestDataset
from cmmasksd.data.readers.rows import read_rows
from cmmasksd.data.samples import is_blank
from cmmasksd.errors import UserError

OTHER = [12.0, 2.0, 15.0, 2.0, 15.0, 8.0, 12.0, 8.0]
SQUARE = [4.0, 2.0, 10.0, 2.0, 10.0, 8.0, 4.0, 8.0]
HEIGHT, WIDTH = 16, 24


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[2:8, 4:10] = True
    return mask


def png(mask: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images a.png … l.png of 24x16 pixels, all different; the mask square.png."""
    for nth, name in enumerate("abcdefghijkl"):
        Image.new("RGB", (WIDTH, HEIGHT), (20 * nth, 9, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "square.png").write_bytes(png(square()))
    return tmp_path


def row(**keys: object) -> dict:
    return {"image": "a.png", "expressions": ["a thing"], "polygon": [SQUARE]} | keys


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return file


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def test_every_kind_of_mask_is_the_same_mask(folder: Path):
    packed = mask_to_rle(square())
    counts, value, run = [], False, 0
    for pixel in square().T.ravel():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    plain = {"size": [HEIGHT, WIDTH], "counts": [*counts, run]}
    kinds = [{"polygon": [SQUARE]}, {"rle": packed}, {"rle": plain}, {"mask": "square.png"}]
    rows = [{"image": "a.png", "text": f"sentence {nth}"} | kind for nth, kind in enumerate(kinds)]
    data = ManifestDataset(write(folder / "m.jsonl", *rows), "all")
    assert len(data) == 4
    for reference in (data[i] for i in range(4)):
        found = data.mask(reference)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, square())
    assert data.groups() == [[0, 1, 2, 3]]


def test_csv_is_the_same_data(folder: Path):
    """As Excel writes it, too: a byte order mark, semicolons, quoted cells."""
    rows = [
        row(expressions=["left cup", 'the "red" cup'], split="val", id=7),
        row(image="b.png", split="train", id=3, polygon=[SQUARE, [12, 2, 14, 2, 14, 8, 12, 8]]),
    ]
    wanted = ManifestDataset(write(folder / "m.jsonl", *rows), "all")
    for separator, start in ((",", ""), (";", "\ufeff"), ("\t", "")):
        lines = [["image", "expressions", "polygon", "split", "id"]]
        lines += [[r["image"], "|".join(r["expressions"]), json.dumps(r["polygon"]), r["split"], r["id"]] for r in rows]
        text = start
        for line in lines:
            text += separator.join('"' + str(cell).replace('"', '""') + '"' for cell in line) + "\r\n"
        (folder / "m.csv").write_text(text + "\r\n", encoding="utf-8", newline="")
        data = ManifestDataset(folder / "m.csv", "all")
        assert [data[i] for i in range(2)] == [wanted[i] for i in range(2)]
        assert all((data.mask(data[i]) == wanted.mask(wanted[i])).all() for i in range(2))


def test_ids_and_sentences(folder: Path):
    rows = [row(id=40, expressions="  one \n text "), row(id="7", image="b.png", expressions=["x", "y"])]
    data = ManifestDataset(write(folder / "m.jsonl", *rows), "all")
    assert [data[i].ref_id for i in range(2)] == [40, 7]
    assert [[(e.sent_id, e.text) for e in data[i].expressions] for i in range(2)] == [
        [(1, "one text")],
        [(2, "x"), (3, "y")],
    ]
    assert data[0].image_id != data[1].image_id
    named = ManifestDataset(write(folder / "m.jsonl", row(id="cup-1"), row(id="cup-2")), "all")
    assert [named[i].ref_id for i in range(2)] == [1, 2]
    assert [one.id for one in read_rows(folder / "m.jsonl")] == ["cup-1", "cup-2"]
    alike = ManifestDataset(write(folder / "m.jsonl", row(id="7"), row(id="07"), row(id="٧")), "all")
    assert [alike[i].ref_id for i in range(3)] == [1, 2, 3]  # int() would make one of all


def test_a_photograph_lies_upright(folder: Path):
    """Labelling tools show it as its EXIF orientation says, and draw the mask there."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("p.jpg", "p.png", "p.webp"):
        Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), dtype=np.uint8)).save(folder / name, exif=exif)
        data = ManifestDataset(write(folder / "m.jsonl", row(image=name, mask="square.png", polygon=None)), "all")
        assert data.image(data[0]).shape[:2] == data.mask(data[0]).shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_modes_of_a_mask(folder: Path, mode: str):
    mask = square()
    if mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16))
    elif mode == "P":
        image = Image.fromarray(mask.astype(np.uint8)).convert("P")
        image.putdata(mask.ravel().astype(int).tolist())
        image.putpalette([255, 0, 0, 0, 0, 0])  # the colours say nothing, the indices do
    else:
        image = Image.fromarray(mask.astype(np.uint8) * 255).convert(mode)
    image.save(folder / "odd.png")
    data = ManifestDataset(write(folder / "m.jsonl", row(mask="odd.png", polygon=None)), "all")
    np.testing.assert_array_equal(data.mask(data[0]), mask)


@settings(max_examples=30, deadline=None)
@given(
    masks=st.lists(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)), min_size=1, max_size=4),
    texts=st.lists(st.text(min_size=1).filter(lambda text: not is_blank(text)), min_size=1, max_size=3),
    kind=st.sampled_from(["polygon", "rle", "mask"]),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, masks: list, texts: list[str], kind: str):
    place = tmp_path_factory.mktemp("trip")
    rows = []
    for nth, mask in enumerate(masks):
        if kind == "polygon" and not mask.any():
            mask[:] = True
        Image.new("RGB", mask.shape[::-1]).save(place / f"{nth}.png")
        (place / f"mask{nth}.png").write_bytes(png(mask))
        values = {"polygon": mask_to_polygons, "rle": mask_to_rle, "mask": lambda _, nth=nth: f"mask{nth}.png"}
        rows.append({"image": f"{nth}.png", "expressions": texts, kind: values[kind](mask)})
    data = ManifestDataset(write(place / "m.jsonl", *rows), "all")
    assert len(data) == len(masks)
    for nth, mask in enumerate(masks):
        assert [e.text for e in data[nth].expressions] == [" ".join(text.split()) for text in texts]
        assert data.image(data[nth]).shape[:2] == mask.shape
        np.testing.assert_array_equal(data.mask(data[nth]), mask)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def of_split(root: Path) -> dict[str, set[str]]:
    found = {}
    for split in ("train", "val", "test"):
        data = ManifestDataset(root, split)
        assert {data[i].split for i in range(len(data))} == {split}
        found[split] = {e.text for i in range(len(data)) for e in data[i].expressions}
    return found


def test_splits_by_name(folder: Path):
    rows = [row(image=f"{x}.png", text=x, expressions=None) for x in "abcd"]
    rows[1]["split"], rows[2]["split"] = "val", "test"
    found = of_split(write(folder / "m.jsonl", *rows))
    assert found == {"train": {"a", "d"}, "val": {"b"}, "test": {"c"}}


def test_splits_by_file(folder: Path):
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        write(folder / f"{split}.jsonl", row(image=f"{name}.png", text=split, expressions=None))
    assert of_split(folder) == {"train": {"train"}, "val": {"val"}, "test": {"test"}}
    write(folder / "val.jsonl", row(text="val", expressions=None))
    with pytest.raises(UserError, match=r"val.jsonl, line 1: image .*a.png is in val, and by .*train.jsonl, line 1"):
        ManifestDataset(folder, "val")


def test_splits_by_content(folder: Path):
    """Every row once, no image twice; the same for the same images under other names and in another order."""
    rows = [row(image=f"{x}.png", text=f"{x}{k}", expressions=None) for x in "abcdefghijkl" for k in range(2)]
    found = of_split(write(folder / "m.jsonl", *rows))
    assert sum(map(len, found.values())) == 24
    assert all(found.values())
    assert set.union(*found.values()) == {r["text"] for r in rows}
    pictures = [{text[0] for text in texts} for texts in found.values()]
    assert sum(map(len, pictures)) == 12
    for name in "abcdefghijkl":
        (folder / f"{name}.png").rename(folder / f"x{name}.png")
    for one in rows:
        one["image"] = f"x{one['image']}"
    assert of_split(write(folder / "other.csv.jsonl", *reversed(rows))) == found


def test_few_images_still_have_every_split(folder: Path):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    rows = [row(image=f"{x}.png", text=x, expressions=None) for x in ("a", "copy", "b", "c")]
    found = of_split(write(folder / "m.jsonl", *rows))
    assert {len(texts) for texts in found.values()} == {1, 2}
    assert any({"a", "copy"} == texts for texts in found.values()), "equal files stay together"
    with pytest.raises(UserError, match="2 different images are too few"):
        ManifestDataset(write(folder / "m.jsonl", *rows[:3]), "val")
    assert len(ManifestDataset(folder / "m.jsonl", "all")) == 3


# ---------------------------------------------------------------------------------------------------------------------
# labelme


def label(label: str, **keys: object) -> dict:
    points = np.reshape(SQUARE, (-1, 2)).tolist()
    return {"label": label, "points": points, "group_id": None, "shape_type": "polygon", "flags": {}} | keys


def labelme(file: Path, *shapes: dict, **keys: object) -> Path:
    content = {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": "a.png", "imageData": None}
    file.write_text(json.dumps(content | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | keys))
    return file


def test_labelme(folder: Path):
    right = [[12, 2], [14, 8]]
    inside = {"points": [[4, 2], [9, 7]], "mask": base64.b64encode(png(np.ones((6, 6), bool))).decode()}
    labelme(
        folder / "a.json",
        label("two parts", group_id=7),
        label("one | eins", group_id=1, points=[[4, 2], [10, 8]], shape_type="rectangle"),
        label("two parts", group_id=7, points=right, shape_type="rectangle"),
        label("the one", group_id=2, shape_type="mask", **inside),
    )
    (folder / "below").mkdir()
    labelme(
        folder / "below" / "b.json",
        label("disc", points=[[8, 8], [8, 12]], shape_type="circle"),
        imagePath="..\\b.png",
    )
    data = ManifestDataset(folder, "all")
    said = [[e.text for e in data[i].expressions] for i in range(len(data))]
    assert said == [["two parts"], ["one", "eins"], ["the one"], ["disc"]]
    parts = square()
    parts[2:8, 12:14] = True
    for index, wanted in enumerate([parts, square(), square()]):
        np.testing.assert_array_equal(data.mask(data[index]), wanted)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    disc = (x - 8) ** 2 + (y - 8) ** 2 < 16
    assert (data.mask(data[3]) ^ disc).sum() <= 4
    assert data.image(data[3])[0, 0].tolist() == [20, 9, 9]
    assert data.groups() == [[0, 1, 2], [3]]


@pytest.mark.parametrize("groups", [(None, None), (1, 2), (1, None)])
def test_shapes_are_one_object_only_by_their_group(folder: Path, groups: tuple):
    """The same label does not make one of two shapes; but what it then names is ambiguous."""
    other = np.reshape(OTHER, (-1, 2)).tolist()
    file = labelme(folder / "a.json", label("cup", group_id=groups[0]), label("cup", group_id=groups[1], points=other))
    with pytest.raises(UserError, match="shape 2: the sentence 'cup' also names shape 1: give both the same group_id"):
        ManifestDataset(folder, "all")
    labelme(file, label("cup|left cup", group_id=groups[0]), label("cup", group_id=groups[1], points=other))
    with pytest.raises(UserError, match="shape 2: the sentence 'cup' also names shape 1"):
        ManifestDataset(folder, "all")
    labelme(file, label("Cup", group_id=groups[0]), label("cup", group_id=groups[1], points=other))
    with pytest.raises(UserError, match="shape 2: the sentence 'cup' also names shape 1"):
        ManifestDataset(folder, "all")
    labelme(file, label("left cup", group_id=groups[0]), label("right cup", group_id=groups[1], points=other))
    data = ManifestDataset(folder, "all")
    assert [data.mask(data[i]).sum() for i in range(2)] == [36, 18]
    labelme(file, label("cup", group_id=3), label("cup", group_id=3, points=other))
    labelme(folder / "b.json", label("cup"), imagePath="b.png")  # of another picture
    data = ManifestDataset(folder, "all")
    assert [data.mask(data[i]).sum() for i in range(2)] == [54, 36]


def test_sentences_that_name_two_rows_of_a_image_are_told(folder: Path, caplog: pytest.LogCaptureFixture):
    rows = [row(text="cup", expressions=None), row(image="b.png", expressions=["cup", "cup"])]
    file = write(folder / "m.jsonl", *rows)
    assert len(ManifestDataset(file, "all")) == 2
    assert not caplog.text
    write(file, *rows, row(expressions=["red cup", "cup"], polygon=[OTHER]), row(expressions=["red cup"]))
    assert len(ManifestDataset(file, "all")) == 4
    assert f"name more than one object of their image: 2, such as 'cup' in {file}, line 1 and {file}, line 3" in (
        caplog.text
    )


# ---------------------------------------------------------------------------------------------------------------------
# Paths


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (WIDTH, HEIGHT)).save(place / "secret.png")
    return place


def test_a_link_may_not_lead_out_of_the_folder(folder: Path, outside: Path):
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "below").symlink_to(outside, target_is_directory=True)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "inside.png").symlink_to(folder / "a.png")
    for keys in (
        {"image": "link.png"},
        {"image": "below/secret.png"},
        {"mask": "link.png", "polygon": None},
        {"mask": "below/secret.png", "polygon": None},
    ):
        write(folder / "m.jsonl", row(), row(**keys))
        with pytest.raises(UserError, match=r"m.jsonl, line 2: (image|mask) '.*' is a link to a place outside"):
            ManifestDataset(folder / "m.jsonl", "all")
    with pytest.raises(UserError, match="is a link to a place outside"):
        read_rows(write(folder / "m.jsonl", row(image="link.png")))
    with pytest.raises(UserError, match="does not exist"):
        ManifestDataset(write(folder / "m.jsonl", row(image="loop.png")), "all")
    assert len(ManifestDataset(write(folder / "m.jsonl", row(image="inside.png")), "all")) == 1
    (outside / "to").symlink_to(folder, target_is_directory=True)  # the user's own way to the folder
    assert len(ManifestDataset(outside / "to" / "m.jsonl", "all")) == 1
    (folder / "m.jsonl").unlink()
    labelme(folder / "a.json", label("x"), imagePath="below/secret.png")
    with pytest.raises(UserError, match=r"imagePath './below/secret.png' is a link to a place outside"):
        ManifestDataset(folder, "all")


def test_names_that_are_not_utf8(folder: Path):
    """Such a name is written as Python's JSON has it; messages show it escaped."""
    odd = os.fsdecode(b"caf\xe9")
    try:
        (folder / odd).mkdir()
        (folder / "a.png").rename(folder / odd / f"{odd}.png")
    except OSError:
        pytest.skip("this system has no such names")
    file = write(folder / "m.jsonl", row(image=f"{odd}/{odd}.png"))
    data = ManifestDataset(file, "all")
    assert data.image(data[0]).shape == (HEIGHT, WIDTH, 3)
    assert read_rows(file)[0].image.is_file()
    write(file, row(image=f"{odd}/absent.png"))
    with pytest.raises(UserError, match=r"caf\\udce9/absent.png does not exist"):
        ManifestDataset(file, "all")
    file.unlink()
    labelme(folder / odd / f"{odd}.json", label("x"), imagePath=f"{odd}.png")
    data = ManifestDataset(folder, "all")
    assert data.mask(data[0]).sum() == 36
    labelme(folder / odd / f"{odd}.json", label("x"), imagePath="\ud800.png")
    with pytest.raises(UserError, match="is not a path inside"):
        ManifestDataset(folder, "all")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

ROWS = [
    ({"image": None}, "has no image"),
    ({"image": "absent.png"}, "absent.png does not exist"),
    ({"image": "../a.png"}, "'../a.png' is not a path inside"),
    ({"image": "x/../../a.png"}, "not a path inside"),
    ({"image": "/etc/passwd"}, "not a path inside"),
    ({"image": "C:\\a.png"}, "not a path inside"),
    ({"image": "\\\\server\\a.png"}, "not a path inside"),
    ({"image": "a\0.png"}, "not a path inside"),
    ({"image": "."}, "not a path inside"),
    ({"image": 5}, "image is 5: expected a path"),
    ({"image": "m.jsonl"}, "not an image"),
    ({"expressions": None}, "give its sentences as either"),
    ({"text": "b"}, "either .expressions. or"),
    ({"expressions": []}, "expected a list of texts"),
    ({"expressions": [""]}, "a sentence is empty"),
    ({"expressions": ["a", " \t"]}, "a sentence is empty"),
    ({"expressions": ["\x1c\u3000\u200b\ufeff"]}, "a sentence is empty"),
    ({"image": "x" * 300}, "not a path inside"),
    ({"image": "\ud800"}, "not a path inside"),
    ({"polygon": [[4, 2, 10, 2, 6, 2]]}, "covers no pixel"),
    ({"polygon": [[50, 50, 60, 50, 60, 60]]}, "covers no pixel"),
    ({"polygon": [[-200, -200, 220, 230] * 30000]}, "pixels long"),
    ({"x" * 10**6: 1}, r"unknown key 'x*\.\.\."),
    ({"expressions": [3]}, "expected a list of texts"),
    ({"expressions": ["\ud800"]}, "a sentence is not UTF-8 text"),
    ({"polygon": None}, "no mask: give one of mask, polygon, rle"),
    ({"mask": "square.png"}, "has mask and polygon"),
    ({"polygon": []}, "segmentation is empty"),
    ({"polygon": [[1, 2, 3, 4]]}, "polygon of 4 numbers"),
    ({"polygon": [[1, 2, 3, 4, 5, 1e9]]}, "far outside its image"),
    ({"polygon": SQUARE}, "expected a flat list"),
    ({"polygon": {}}, r"polygon is {}: expected \[\[x0"),
    ({"polygon": None, "rle": {"size": [3, 3], "counts": [9]}}, "expected size"),
    ({"polygon": None, "rle": {"size": [HEIGHT, WIDTH], "counts": [9]}}, "do not add up"),
    ({"polygon": None, "rle": [1]}, "rle is"),
    ({"polygon": None, "rle": {"labelme": []}}, "lacks 'size' or 'counts'"),
    ({"polygon": None, "mask": "absent.png"}, "absent.png does not exist"),
    ({"polygon": None, "mask": "small.png"}, "5x4 pixels and its image 24x16"),
    ({"polygon": None, "mask": "turned.png"}, "16x24 pixels and its image 24x16"),
    ({"polygon": None, "mask": "../square.png"}, "not a path inside"),
    ({"sentence": "a"}, "unknown key 'sentence': expected some of image, expressions"),
    ({"split": "tset"}, "split 'tset': choose one of train, val, test"),
    ({"split": ["val"]}, "choose one of train, val, test"),
    ({"id": 1.5}, "id 1.5"),
    ({"id": True}, "id True"),
]


@pytest.mark.parametrize(("keys", "said"), ROWS, ids=[said for _, said in ROWS])
def test_a_mistake_names_file_and_line(folder: Path, keys: dict, said: str):
    (folder / "small.png").write_bytes(png(np.ones((4, 5), bool)))
    (folder / "turned.png").write_bytes(png(square().T.copy()))
    file = write(folder / "m.jsonl", row(), "", row(image="b.png") | keys)
    with pytest.raises(UserError, match=said) as found:
        ManifestDataset(file, "all")
    assert f"{file}, line 3" in str(found.value)


def test_mistakes_of_whole_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(said: str, root: Path, split: str = "all"):
        with pytest.raises(UserError, match=said):
            ManifestDataset(root, split)

    m = folder / "m.jsonl"
    refused("m.jsonl does not exist", m)
    refused("holds no manifest", folder)
    refused("has no row", write(m))
    refused("line 2 is not JSON", write(m, row(), "{"))
    refused("line 1 is not JSON", write(m, "[" * 100_000))
    refused("line 1 holds 3", write(m, "3"))
    refused("line 3 has the id '5', as .*line 1 has", write(m, row(id=5), row(id=6), row(id="5")))
    refused("no split 'tset': choose one of train, val, test, all", write(m, row()), "tset")
    refused("no row of the split 'val', only of test, train", write(m, row(split="test"), row(image="b.png")), "val")
    refused("line 2: image .* must not be scored", write(m, row(split="test"), row()), "test")
    m.write_bytes(json.dumps(row()).encode("utf-16"))
    refused("not UTF-8", m)
    refused("is not a manifest", folder / "a.png")
    write(m, row())
    write(folder / "n.jsonl", row())
    refused("holds 2 manifests", folder)
    write(m, row())
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    refused("line 1: .*megapixels", m)


def test_mistakes_of_csv(folder: Path):
    def refused(said: str, *lines: str):
        with pytest.raises(UserError, match=said):
            ManifestDataset(write(folder / "m.csv", *lines), "all")

    refused("line 1 names a column twice", "image,image")
    refused("unknown key 'masks'", "image,text,masks", "a.png,x,square.png")
    refused("line 2 has 4 cells and the header 3", "image,text,mask", "a.png,x, y,square.png")
    refused("line 2 is not CSV", "image,text,mask", 'a.png,"x,square.png')
    refused("line 2: rle is not JSON", "image,text,rle", "a.png,x,{")
    refused("line 2: a sentence is empty", "image,expressions,mask", "a.png,x|,square.png")
    refused("line 2 has no mask", "image,expressions,mask", "a.png,x,")


def test_mistakes_of_labelme(folder: Path):
    def refused(said: str, *shapes: dict, **keys: object):
        file = labelme(folder / "a.json", *shapes, **keys)
        with pytest.raises(UserError, match=said) as found:
            ManifestDataset(folder, "all")
        assert str(file) in str(found.value)

    refused("not a labelme file", shapes=None)
    refused("not a labelme file", imagePath=None)
    refused("imagePath './../a.png' is not a path inside", label("x"), imagePath="../a.png")
    refused("shape 1: .*absent.png does not exist", label("x"), imagePath="absent.png")
    refused("shape 2 has no label", label("x"), {"points": []})
    refused(r"shape 1 has the group_id \[\[\[", label("x", group_id=[[[[[]]]]]))
    refused("shape 1: its outline covers no pixel", label("x", points=[[1, 2], [3, 2], [8, 2]]))
    refused("its points are", label("x", points=[[1, 2**2000]] * 3))
    refused("its points are", label("x", points=[[1, True]] * 3))
    refused("shape 2: a sentence is empty", label("x"), label(" "))
    refused("labelled at 100x16 pixels and its image has 24x16", label("x"), imageWidth=100)
    refused("shape 1: a shape of the type 'line' has no area", label("x", shape_type="line"))
    refused("its points are", label("x", points=[[1, 2, 3]]))
    refused("its points are", label("x", points=[[1, float("nan")]] * 3))
    refused("a circle has 4 points", label("x", shape_type="circle"))
    refused("polygon of 4 numbers", label("x", points=[[1, 2], [3, 4]]))
    two = {"points": [[20, 2], [25, 8]], "shape_type": "mask"}
    refused("has no 'mask'", label("x", **two))
    refused("not base64", label("x", mask="#", **two))
    refused("not base64", label("x", mask="é", **two))
    refused("does not decode", label("x", mask="AAAA", **two))
    refused("does not fit its points", label("x", mask=base64.b64encode(png(square())).decode(), **two))
    (folder / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a.json is not JSON .*labelme"):
        ManifestDataset(folder, "all")


def test_a_damaged_image_or_mask_names_its_row(folder: Path):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    content = (folder / "noise.png").read_bytes()
    (folder / "noise.png").write_bytes(content[: len(content) // 2])
    rows = [row(), row(image="noise.png"), row(mask="noise.png", polygon=None)]
    data = ManifestDataset(write(folder / "m.jsonl", *rows), "all")
    with pytest.raises(UserError, match=r"m.jsonl, line 2: image .*noise.png does not decode"):
        data.image(data[1])
    with pytest.raises(UserError, match=r"m.jsonl, line 3: image .*noise.png does not decode"):
        data.mask(data[2])


def test_it_is_a_data_set_by_name(folder: Path):
    write(folder / "m.jsonl", row())
    data = open_dataset(SplitConfig("manifest", "all", root=folder))
    assert (data.name, data.split, len(data)) == ("manifest", "all", 1)
    with pytest.raises(UserError, match=r"--root.*\.jsonl"):
        open_dataset(SplitConfig("manifest", "all"))


def test_predictions_need_no_masks(folder: Path):
    write(folder / "m.jsonl", {"image": "a.png", "text": "x"}, {"image": "b.png", "expressions": ["y", "z"], "id": "k"})
    rows = read_rows(folder / "m.jsonl")
    assert [(r.image.name, r.expressions, r.id) for r in rows] == [("a.png", ("x",), None), ("b.png", ("y", "z"), "k")]
