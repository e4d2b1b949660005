"""Labelling tools' formats: one contract that the tests of each inherit, on samples as the tools write them.

All samples hold the same two images: in a.png a cup with two sentences, drawn as a polygon, and a plate with one, drawn
as the tool's mask where it has masks; in b.png a cup.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmmasksd import cli
from cmmasksd.data.masks import mask_to_rle
from cmmasksd.data.readers.annotated import AnnotatedImages
from cmmasksd.data.readers.manifest import ManifestDataset
from cmmasksd.errors import UserError

HEIGHT, WIDTH = 20, 32


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def bent() -> np.ndarray:
    """A region with a dent, which no rectangle is."""
    mask = box(18, 4, 28, 14)
    mask[4:8, 18:22] = False
    return mask


CUP, PLATE, OTHER = box(4, 2, 12, 10), bent(), box(8, 6, 24, 16)
CORNERS = {"cup": [(4, 2), (12, 2), (12, 10), (4, 10)], "other": [(8, 6), (24, 6), (24, 16), (8, 16)]}


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, masks in (("a.png", (CUP, PLATE)), ("b.png", (OTHER,))):
        pixels = np.full((HEIGHT, WIDTH, 3), 120, dtype=np.uint8)
        for mask, colour in zip(masks, ((200, 30, 30), (40, 60, 200)), strict=False):
            pixels[mask] = colour
        Image.fromarray(pixels).save(folder / name)


HALF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
}
"""EXIF orientations that keep the size, and what undoes them."""


def lay_down(file: Path, turn: int) -> None:
    """Store an image as a camera does that writes this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = turn
    with Image.open(file) as image:
        image.transpose(HALF_TURNS[turn]).save(file, exif=exif)


class ReaderContract:
    """Subclasses write a sample."""

    sentences = True
    any_tool = False
    """whether files of tools that ignore EXIF have this format, too"""

    def write(self, folder: Path) -> Path:
        """Write images and annotations; returns what users name."""
        raise NotImplementedError

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return self.write(tmp_path / "set")

    def test_images_classes_and_masks(self, path: Path):
        file = AnnotatedImages(path)
        assert [Path(image.file_name).name for image in file.images] == ["a.png", "b.png"]
        assert all((image.height, image.width) == (HEIGHT, WIDTH) for image in file.images)
        assert all(image.path is not None and image.path.is_file() for image in file.images)
        assert dict(file.categories) == {"cup": 2, "plate": 1}
        regions = [(a.category, file.mask(image, a)) for image in file.images for a in image.annotations]
        assert [category for category, _ in regions] == ["cup", "plate", "cup"]
        for (_, mask), wanted in zip(regions, (CUP, PLATE, OTHER), strict=True):
            np.testing.assert_array_equal(mask, wanted)

    def test_sentences_are_rows_of_a_manifest(self, path: Path):
        if not self.sentences:
            with pytest.raises(UserError):
                ManifestDataset(path, "all")
            return
        data = ManifestDataset(path, "all")
        rows = [([e.text for e in r.expressions], data.mask(r), data.image(r)) for r in data]
        assert [texts for texts, *_ in rows] == [["the red cup", "cup on the left"], ["the blue plate"]]
        np.testing.assert_array_equal(rows[0][1], CUP)
        np.testing.assert_array_equal(rows[1][1], PLATE)
        assert (rows[0][2][CUP] == (200, 30, 30)).all()

    def test_true_sentences_from_class_names(self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        out = tmp_path / "made.jsonl"
        given = ["--instances", str(path), "--out", str(out), "--val", "0", "--keep", "0"]
        assert cli.main(["data", "expressions", *given]) == 0, capsys.readouterr().err
        data = ManifestDataset(out, "all")
        assert {data.mask(r).tobytes() for r in data} == {mask.tobytes() for mask in (CUP, PLATE, OTHER)}
        assert "3 sentences for 3 objects of 2 images" in capsys.readouterr().out

    @pytest.mark.parametrize("turn", HALF_TURNS)
    def test_masks_lie_on_the_upright_image(self, path: Path, caplog: pytest.LogCaptureFixture, turn: int):
        file = AnnotatedImages(path)
        assert [file.is_upright(image) for image in file.images] == [False, False]
        for image in file.images:
            assert image.path is not None
            lay_down(image.path, turn)
        assert [file.is_upright(image) for image in file.images] == [True, True]
        assert len(caplog.records) == self.any_tool
        assert all(f"EXIF orientation {turn}" in record.getMessage() for record in caplog.records)

    def test_a_photograph_of_two_lies_down(self, path: Path, tmp_path: Path):
        photograph = AnnotatedImages(path).images[0].path
        assert photograph is not None
        lay_down(photograph, 3)
        out = tmp_path / "made.jsonl"
        given = ["--instances", str(path), "--out", str(out), "--val", "0", "--keep", "0"]
        assert cli.main(["data", "expressions", *given]) == 0
        data = ManifestDataset(out, "all")
        masks = {data.mask(r).tobytes(): data.image(r) for r in data}
        assert (masks[CUP.tobytes()][CUP] == (200, 30, 30)).all()
        assert (masks[OTHER.tobytes()][OTHER] == (200, 30, 30)).all()
        if self.sentences:
            data = ManifestDataset(path, "all")
            assert (data.image(data[0])[CUP] == (200, 30, 30)).all()

    def files(self, path: Path) -> list[Path]:
        """The files of the annotations."""
        root = path if path.is_dir() else path.parent
        return sorted(file for file in root.rglob("*") if file.suffix in (".json", ".xml", ".yaml", ".txt"))

    def read_all(self, path: Path) -> str:
        """Read everything; the message of a refusal."""
        said = ""
        try:
            file = AnnotatedImages(path)
            for image in file.images:
                for annotation in image.annotations:
                    file.mask(image, annotation)
        except UserError as error:
            said = str(error)
        if self.sentences:
            try:
                data = ManifestDataset(path, "all")
                for reference in data:
                    data.mask(reference)
                    data.image(reference)
            except UserError as error:
                said = said or str(error)
        assert said.isprintable()
        assert len(said.replace(str(path.parent), "")) < 500
        return said

    def test_a_truncated_file_is_read_or_refused(self, path: Path):
        for file in self.files(path):
            content = file.read_bytes()
            refused = 0
            for end in range(0, len(content), max(1, len(content) // 40)):
                file.write_bytes(content[:end])
                refused += bool(self.read_all(path))
            assert refused
            file.write_bytes(content)

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(data=st.data())
    def test_a_mutated_file_is_read_or_refused(self, path: Path, data: st.DataObject):
        file = data.draw(st.sampled_from(self.files(path)))
        content = file.read_bytes()
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 8))
        new = data.draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from(
                    [
                        *(b"9" * 5000, b"-1", b"1e400", b"nan", b"null", b"[]", b"{}", b'""', b"0", b"999999999"),
                        *(b"[" * 50_000, b"..", b"/etc/passwd", b"\xff\xfe", b"\\ud800", b"&x;", b"<a>" * 50_000),
                        *(b"&a " * 50, b"true"),
                    ]
                ),
            )
        )
        try:
            file.write_bytes(content[:start] + new + content[start + length :])
            self.read_all(path)
        finally:
            file.write_bytes(content)

    def test_a_name_that_leaves_the_folder_is_refused(self, path: Path):
        for file in self.files(path):
            content = file.read_bytes()
            if b"a.png" in content:
                file.write_bytes(content.replace(b"a.png", b"../../a.png"))
                assert "not a path inside" in self.read_all(path)


class TestCoco(ReaderContract):
    any_tool = True

    def write(self, folder: Path) -> Path:
        write_images(folder / "images")
        flat = {name: [float(v) for point in points for v in point] for name, points in CORNERS.items()}
        objects: list[dict[str, Any]] = [
            {
                "image_id": 1,
                "category_id": 1,
                "segmentation": [flat["cup"]],
                "expression": "the red cup|cup on the left",
            },
            {
                "image_id": 1,
                "category_id": 2,
                "segmentation": mask_to_rle(PLATE),
                "attributes": {"caption": "the blue plate"},
            },
            {"image_id": 2, "category_id": 1, "segmentation": [flat["other"]], "attributes": {"occluded": False}},
        ]
        content = {
            "images": [
                {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
                for i, name in ((1, "a.png"), (2, "b.png"))
            ],
            "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}],
            "annotations": [record | {"id": i, "iscrowd": 0} for i, record in enumerate(objects, start=1)],
        }
        (folder / "instances.json").write_text(json.dumps(content))
        return folder / "instances.json"

    @pytest.mark.parametrize(
        "field",
        [
            {"expressions": ["the red cup", "cup on the left"]},
            {"caption": "the red cup | cup on the left"},
            {"sentences": [{"raw": "the red cup", "sent_id": 3}, {"sent": "cup on the left"}]},
        ],
    )
    def test_sentences_have_several_names(self, path: Path, field: dict[str, object]):
        content = json.loads(path.read_text())
        del content["annotations"][0]["expression"]
        content["annotations"][0].update(field)
        path.write_text(json.dumps(content))
        data = ManifestDataset(path, "all")
        assert [e.text for e in data[0].expressions] == ["the red cup", "cup on the left"]

    def test_a_file_without_sentences_says_what_writes_them(self, path: Path):
        content = json.loads(path.read_text())
        for record in content["annotations"]:
            record.pop("expression", None)
            record.pop("attributes", None)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="cmmasksd data expressions --instances"):
            ManifestDataset(path, "all")

    def test_a_path_is_looked_for_in_the_named_folder(self, path: Path, tmp_path: Path):
        images = path.parent / "images"
        content = json.loads(path.read_text())
        content["images"][0]["file_name"] = "../a.png"
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"not a path inside {images}:"):
            AnnotatedImages(path, images)

    @pytest.mark.parametrize("key", ["images", "annotations", "categories"])
    def test_an_entry_that_is_no_object_is_named(self, path: Path, key: str):
        content = json.loads(path.read_text())
        content[key].insert(1, 7)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"entry 2 of '{key}' is 7"):
            AnnotatedImages(path)


class TestYolo(ReaderContract):
    sentences = False

    def write(self, folder: Path) -> Path:
        write_images(folder / "images" / "train")
        (folder / "data.yaml").write_text("path: ../datasets/cups\ntrain: images/train\nnames:\n  0: cup\n  1: plate\n")
        labels = folder / "labels" / "train"
        labels.mkdir(parents=True)

        def line(number: int, points: list[tuple[int, int]]) -> str:
            return " ".join([str(number), *(f"{x / WIDTH} {y / HEIGHT}" for x, y in points)]) + "\n"

        plate = [(22, 4), (28, 4), (28, 14), (18, 14), (18, 8), (22, 8)]
        (labels / "a.txt").write_text(line(0, CORNERS["cup"]) + line(1, plate))
        (labels / "b.txt").write_text(line(0, CORNERS["other"]))
        return folder

    def test_roboflow_and_the_file_itself(self, path: Path):
        """Roboflow: a folder per split that holds images and labels, names as a list, an image without labels."""
        for kind in ("images", "labels"):
            (path / "train").mkdir(exist_ok=True)
            (path / kind / "train").rename(path / "train" / kind)
        (path / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: [cup, plate]\n")
        (path / "train" / "labels" / "b.txt").unlink()
        file = AnnotatedImages(path / "data.yaml")
        assert [len(image.annotations) for image in file.images] == [2, 0]
        assert file.images[0].file_name == "train/images/a.png"

    def test_a_box_is_a_region_that_no_sentence_names(self, path: Path):
        label = path / "labels" / "train" / "b.txt"
        label.write_text("0 0.5 0.5 0.5 0.5\n")
        (annotation,) = AnnotatedImages(path).images[1].annotations
        assert annotation.crowd

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("7 0 0 1 0 1 1", "data.yaml does not name"),
            ("0 0 0 1 0 1", "5 coordinates"),
            ("0 4 2 12 2 12 10", "shares of the image's sides"),
            ("0 0 0 x 0 1 1", "a coordinate 'x'"),
        ],
    )
    def test_mistakes(self, path: Path, line: str, said: str):
        (path / "labels" / "train" / "b.txt").write_text(line)
        with pytest.raises(UserError, match=said) as refused:
            AnnotatedImages(path)
        assert "b.txt, line 1" in str(refused.value)


class TestCvat(ReaderContract):
    def write(self, folder: Path) -> Path:
        write_images(folder / "images")
        rows = PLATE[4:14, 18:28].ravel().astype(int)
        edges = np.flatnonzero(np.diff(rows)) + 1
        runs = np.diff([0, *edges.tolist(), len(rows)]).tolist()
        rle = ", ".join(map(str, ([0] if rows[0] else []) + runs))

        def points(name: str) -> str:
            return ";".join(f"{x:.2f},{y:.2f}" for x, y in CORNERS[name])

        (folder / "annotations.xml").write_text(f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><name>cups</name><labels><label><name>cup</name></label></labels></task></meta>
  <image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">
    <polygon label="cup" source="manual" occluded="0" points="{points("cup")}" z_order="0">
      <attribute name="expression">the red cup|cup on the left</attribute>
      <attribute name="full">false</attribute>
    </polygon>
    <mask label="plate" source="manual" occluded="0" rle="{rle}" left="18" top="4" width="10" height="10" z_order="0">
      <attribute name="Expression">the blue plate</attribute>
    </mask>
  </image>
  <image id="1" name="b.png" width="{WIDTH}" height="{HEIGHT}">
    <polygon label="cup" source="manual" occluded="0" points="{points("other")}" z_order="0">
      <attribute name="expression"></attribute>
    </polygon>
    <points label="cup" source="manual" occluded="0" points="1.0,1.0" z_order="0"></points>
  </image>
</annotations>
""")
        return folder / "annotations.xml"

    def test_parts_of_a_group_are_one_object(self, path: Path):
        content = (
            path.read_text().replace('label="plate"', 'label="cup"').replace('z_order="0"', 'z_order="0" group_id="3"')
        )
        path.write_text(content)
        file = AnnotatedImages(path)
        (annotation,) = file.images[0].annotations
        np.testing.assert_array_equal(file.mask(file.images[0], annotation), CUP | PLATE)
        assert annotation.expressions == ("the red cup", "cup on the left", "the blue plate")

    def test_shapes_without_mask_are_counted(
        self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ):
        path.write_text(path.read_text().replace("<points", '<polyline label="cup" points="1,1;2,2"/><points'))
        left_out = {"points shapes without mask": 1, "polyline shapes without mask": 1}
        assert AnnotatedImages(path).left_out == left_out
        assert cli.main(["data", "expressions", "--instances", str(path), "--out", str(tmp_path / "made.jsonl")]) == 0
        assert "polyline shapes without mask (1)" in capsys.readouterr().out
        ManifestDataset(path, "all")
        assert "points shapes without mask (1)" in caplog.text

    def test_boxes_and_ellipses(self, path: Path):
        shapes = (
            '<box label="cup" xtl="4" ytl="2" xbr="12" ybr="10"/><ellipse label="cup" cx="16" cy="10" rx="8" ry="5"/>'
        )
        path.write_text(path.read_text().replace("<points", shapes + "<points"))
        file = AnnotatedImages(path)
        _, boxed, round_one = file.images[1].annotations
        assert (boxed.crowd, round_one.crowd) == (True, False)
        np.testing.assert_array_equal(file.mask(file.images[1], boxed), CUP)
        mask = file.mask(file.images[1], round_one)
        assert mask is not None
        assert abs(mask.sum() - np.pi * 40) < 12

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
    def test_entities_are_not_expanded(self, path: Path, tmp_path: Path, encoding: str):
        (tmp_path / "secret.txt").write_text("secret")
        bomb = '<!DOCTYPE a [<!ENTITY x SYSTEM "secret.txt"><!ENTITY y "&x;&x;&x;">]>'
        content = path.read_text().replace("<annotations>", f"{bomb}<annotations>").replace("the blue", "&y;")
        path.write_text(content, encoding=encoding)
        with pytest.raises(UserError, match=r"has a DTD|not UTF-8") as refused:
            AnnotatedImages(path)
        assert "secret" not in str(refused.value)

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("<annotations>", "<annotations><track/>", ""),
            ('width="10"', 'width="11"', "does not fill 11x10"),
            ('left="18"', 'left="30"', "leaves its image"),
            ('left="18"', 'left="-1"', "'left' '-1'"),
            (";12.00,2.00", ";12.00", "expected x,y"),
            ('label="cup"', 'name="cup"', "no label"),
            (f'height="{HEIGHT}"', 'height="999999999"', "pixels"),
            ("<image ", "<picture ", "not XML"),
        ],
    )
    def test_mistakes(self, path: Path, old: str, new: str, said: str):
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
        if not said:
            assert len(AnnotatedImages(path).images) == 2
            return
        with pytest.raises(UserError, match=said):
            AnnotatedImages(path)


def brush(mask: np.ndarray) -> list[int]:
    """A mask as Label Studio's editor packs it: runs of the bytes of RGBA; short ones byte by byte."""
    values = np.repeat((mask * 255).astype(np.uint8).ravel(), 4)
    sizes = (3, 4, 8, 16)
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for start, end in pairwise(edges):
        count = end - start
        choice = next(i for i, size in enumerate(sizes) if count <= 2**size)
        bits += f"{int(count > 8)}{choice:02b}{count - 1:0{sizes[choice]}b}"
        bits += f"{values[start]:08b}" * (1 if count > 8 else count)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


class TestLabelStudio(ReaderContract):
    def write(self, folder: Path) -> Path:
        write_images(folder / "images")
        size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "to_name": "image"}

        def polygon(region: str, name: str) -> dict[str, Any]:
            points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in CORNERS[name]]
            value = {"points": points, "closed": True, "polygonlabels": ["cup"]}
            return {**size, "id": region, "type": "polygonlabels", "from_name": "label", "value": value}

        def text(region: str, *texts: str) -> dict[str, Any]:
            return {**size, "id": region, "type": "textarea", "from_name": "words", "value": {"text": list(texts)}}

        value = {"format": "rle", "rle": brush(PLATE), "brushlabels": ["plate"]}
        plate = {**size, "id": "p", "type": "brushlabels", "from_name": "brush", "value": value}
        choice = {"id": "w", "type": "choices", "from_name": "q", "to_name": "image", "value": {"choices": ["good"]}}
        first = [
            polygon("c", "cup"),
            text("c", "the red cup", "cup on the left"),
            plate,
            text("p", "the blue plate"),
            choice,
        ]
        tasks = [
            {
                "id": 11,
                "data": {"image": "/data/upload/1/0a1b2c3d-a.png"},
                "annotations": [{"was_cancelled": True, "result": []}, {"was_cancelled": False, "result": first}],
            },
            {
                "id": 12,
                "data": {"image": "/data/local-files/?d=cups/b.png"},
                "annotations": [{"result": [polygon("d", "other")]}],
            },
        ]
        (folder / "export.json").write_text(json.dumps(tasks))
        return folder / "export.json"

    def test_a_name_that_leaves_the_folder_is_refused(self, path: Path):
        """Only the last part of a URL is used."""
        path.write_text(path.read_text().replace("0a1b2c3d-a.png", "../../../etc/a.png"))
        assert AnnotatedImages(path).images[0].file_name == "a.png"

    def test_rectangles_and_ellipses(self, path: Path):
        tasks = json.loads(path.read_text())
        size = {"original_width": WIDTH, "original_height": HEIGHT}
        square = {"x": 12.5, "y": 10, "width": 25, "height": 40, "rotation": 0, "rectanglelabels": ["cup"]}
        disc = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 25, "rotation": 0, "ellipselabels": ["cup"]}
        tasks[1]["annotations"][0]["result"] = [
            {**size, "id": "r", "type": "rectanglelabels", "value": square},
            {**size, "id": "e", "type": "ellipselabels", "value": disc},
        ]
        path.write_text(json.dumps(tasks))
        file = AnnotatedImages(path)
        boxed, disc_like = file.images[1].annotations
        assert (boxed.crowd, disc_like.crowd) == (True, False)
        np.testing.assert_array_equal(file.mask(file.images[1], boxed), CUP)
        mask = file.mask(file.images[1], disc_like)
        assert mask is not None
        assert abs(mask.sum() - np.pi * 40) < 12

    def test_key_points_are_counted(self, path: Path):
        tasks = json.loads(path.read_text())
        tasks[1]["annotations"][0]["result"].append(
            {"id": "k", "type": "keypointlabels", "value": {"x": 5, "y": 5, "keypointlabels": ["cup"]}}
        )
        path.write_text(json.dumps(tasks))
        assert AnnotatedImages(path).left_out == {"keypoint shapes without mask": 1}

    def test_the_small_export_is_refused(self, path: Path):
        path.write_text('[{"image": "/data/upload/1/a.png", "label": [], "id": 1}]')
        with pytest.raises(UserError, match="not as JSON-MIN"):
            AnnotatedImages(path)

    def test_a_damaged_brush(self, path: Path):
        tasks = json.loads(path.read_text())
        rle = tasks[0]["annotations"][1]["result"][2]["value"]["rle"]
        for damaged in (rle[:20], [255] * 40, rle[:4], [0, 0, 0, 4, *rle[4:]], "x", [1.5], []):
            tasks[0]["annotations"][1]["result"][2]["value"]["rle"] = damaged
            path.write_text(json.dumps(tasks))
            with pytest.raises(UserError, match="region 'p'"):
                AnnotatedImages(path)


class TestLabelme(ReaderContract):
    sentences = False

    def write(self, folder: Path) -> Path:
        write_images(folder)
        plate = [(22, 4), (28, 4), (28, 14), (18, 14), (18, 8), (22, 8)]
        for name, shapes in (("a", (("cup", CORNERS["cup"]), ("plate", plate))), ("b", (("cup", CORNERS["other"]),))):
            content = {
                "version": "5.5.0",
                "shapes": [
                    {"label": label, "points": points, "group_id": None, "shape_type": "polygon"}
                    for label, points in shapes
                ],
                "imagePath": f"{name}.png",
                "imageHeight": HEIGHT,
                "imageWidth": WIDTH,
            }
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    def test_sentences_are_rows_of_a_manifest(self, path: Path):
        """Labels are sentences there: see test_manifest."""
        assert len(ManifestDataset(path, "all")) == 3

    def test_objects_of_one_class(self, path: Path):
        """In a manifest, they would be refused as one sentence for two objects."""
        file = path / "a.json"
        file.write_text(file.read_text().replace("plate", "cup"))
        assert AnnotatedImages(path).categories == {"cup": 3}


del ReaderContract  # an abstract class is no test


@pytest.mark.parametrize(("name", "said"), [("absent.json", "do not exist"), ("", "has neither data.yaml")])
def test_what_is_not_an_annotation_file(tmp_path: Path, name: str, said: str):
    with pytest.raises(UserError, match=said):
        AnnotatedImages(tmp_path / name)
