"""Formats: each is read back by the tool it is for, and gives the same masks."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import cmmasksd
from cmmasksd.data.masks import decode_segmentation
from cmmasksd.data.readers.manifest import ManifestDataset
from cmmasksd.errors import UserError
from cmmasksd.inference.base import Segmentation
from cmmasksd.inference.formats import merge_coco, overlay_all, to_coco, to_detections, to_labelme
from cmmasksd.inference.visualize import PALETTE

HEIGHT, WIDTH = 24, 40


def segmentation(mask: np.ndarray, text: str = "a thing", score: float = 0.75) -> Segmentation:
    image, probability = np.full((*mask.shape, 3), 90, np.uint8), mask.astype(np.float32)
    return Segmentation(text, mask, score, presence=0.5, present=True, image=image, probability=probability)


def ring() -> np.ndarray:
    """A square with a hole in it, and a spot that touches it at a corner only."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[4:14, 6:20] = True
    mask[7:10, 9:15] = False
    mask[14:16, 20:25] = True
    return mask


def empty() -> np.ndarray:
    return np.zeros((HEIGHT, WIDTH), dtype=bool)


def three() -> list[Segmentation]:
    corner = empty()
    corner[20:, 30:] = True
    return [
        segmentation(ring(), "the ring"),
        segmentation(empty(), "a unicorn", 0.0),
        segmentation(corner, "corner", 0.5),
    ]


masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14))


def test_one_segmentation():
    found = segmentation(ring())
    assert found.box == (6, 4, 25, 16)
    assert found.area == 10 * 14 - 3 * 6 + 2 * 5
    x0, y0, x1, y1 = found.box
    assert found.mask[y0:y1, x0:x1].sum() == found.area
    assert len(found.polygons) == 2
    nothing = segmentation(empty())
    assert (nothing.box, nothing.area, nothing.polygons) == (None, 0, [])


@settings(max_examples=60, deadline=None)
@given(masks)
def test_rle_and_polygons_are_the_mask(mask: np.ndarray):
    from pycocotools import mask as coco

    found = segmentation(mask)
    rle: Any = json.loads(json.dumps(found.rle))
    assert rle["size"] == list(mask.shape)
    np.testing.assert_array_equal(coco.decode(rle).astype(bool), mask)
    if mask.any():
        assert list(coco.toBbox(rle)) == [*found.box[:2], found.box[2] - found.box[0], found.box[3] - found.box[1]]
        np.testing.assert_array_equal(decode_segmentation(found.polygons, *mask.shape), mask)
    assert coco.area(rle) == found.area


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(hnp.arrays(bool, (9, 13)), st.sampled_from(["a", "b c", "ü"])), min_size=1, max_size=4))
def test_coco_is_read_by_pycocotools(tmp_path_factory: pytest.TempPathFactory, given: list):
    from pycocotools.coco import COCO

    found = [segmentation(mask, text) for mask, text in given]
    file = tmp_path_factory.mktemp("coco") / "instances.json"
    file.write_text(json.dumps(to_coco(found, file_name="x.jpg", image_id=7)))
    with contextlib.redirect_stdout(io.StringIO()):
        read = COCO(str(file))
    assert read.loadImgs(7)[0] == {"id": 7, "file_name": "x.jpg", "height": 9, "width": 13}
    wanted = [one for one in found if one.mask.any()]
    annotations = read.loadAnns(read.getAnnIds(imgIds=[7]))
    assert len(annotations) == len(wanted)
    for annotation, one in zip(annotations, wanted, strict=True):
        np.testing.assert_array_equal(read.annToMask(annotation).astype(bool), one.mask)
        assert read.loadCats(annotation["category_id"])[0]["name"] == one.text
        assert (annotation["area"], annotation["score"], annotation["presence"]) == (one.area, one.score, 0.5)
        x, y, width, height = annotation["bbox"]
        assert one.box == (x, y, x + width, y + height)


def test_a_sentence_of_an_empty_mask_stays_as_a_category():
    nothing = to_coco([segmentation(empty(), "a unicorn", 0.0)], file_name="b.jpg")
    merged = merge_coco([to_coco(three(), file_name="a.jpg"), nothing])
    assert [image["file_name"] for image in merged["images"]] == ["a.jpg", "b.jpg"]
    assert [category["name"] for category in merged["categories"]] == ["the ring", "a unicorn", "corner"]
    assert [(a["image_id"], a["category_id"]) for a in merged["annotations"]] == [(1, 1), (1, 3)]


def test_labelme_is_read_as_own_data(tmp_path: Path):
    """What was found, corrected in labelme, can be trained on."""
    found = three()
    Image.fromarray(found[0].image).save(tmp_path / "x.png")
    content = to_labelme(found, file_name="x.png")
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert [shape["group_id"] for shape in content["shapes"]] == [1, 1, 3]
    data = ManifestDataset(tmp_path, "all")
    assert [data[i].expressions[0].text for i in range(len(data))] == ["the ring", "corner"]
    np.testing.assert_array_equal(data.mask(data[0]), ring())
    np.testing.assert_array_equal(data.mask(data[1]), found[2].mask)


def test_labelme_files_have_what_labelme_asks_for():
    """The keys that its LabelFile.load and its Shape need, and how its own painter fills a polygon."""
    from PIL import ImageDraw

    content = to_labelme(three(), file_name="x.png")
    assert set(content) == {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"}
    painted = Image.new("1", (WIDTH, HEIGHT))
    for shape in content["shapes"][:2]:
        assert {"label", "points", "group_id", "description", "shape_type", "flags"} <= set(shape)
        ImageDraw.Draw(painted).polygon([tuple(point) for point in shape["points"]], outline=1, fill=1)
    wrong = np.asarray(painted) != ring()
    wide = np.pad(ring(), 1, mode="edge")
    around = [wide[y : y + HEIGHT, x : x + WIDTH] for y in range(3) for x in range(3)]
    border = np.logical_or.reduce(around) & ~np.logical_and.reduce(around)
    assert not (wrong & ~border).any(), "only pixels at the border may differ"


@dataclass
class Detections:
    """The fields of supervision's class that we fill, with its own checks of their shapes."""

    xyxy: np.ndarray
    mask: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    data: dict[str, np.ndarray]

    def __post_init__(self):
        count = len(self.xyxy)
        assert self.xyxy.shape == (count, 4)
        assert self.mask.ndim == 3
        assert self.mask.dtype == bool
        assert len(self.mask) == len(self.confidence) == len(self.class_id) == len(self.data["class_name"]) == count


@pytest.mark.parametrize("real", [False, True])
def test_detections(real: bool, monkeypatch: pytest.MonkeyPatch):
    if real:
        pytest.importorskip("supervision", reason="supervision is not installed")
    else:
        monkeypatch.setitem(sys.modules, "supervision", type(sys)("supervision"))
        monkeypatch.setattr(sys.modules["supervision"], "Detections", Detections, raising=False)
    found = [*three(), segmentation(ring(), "corner")]
    made = to_detections(found)
    assert made.xyxy.tolist() == [[6, 4, 25, 16], [30, 20, 40, 24], [6, 4, 25, 16]]
    np.testing.assert_array_equal(made.mask[0], ring())
    assert made.confidence.tolist() == [0.75, 0.5, 0.75]
    assert made.class_id.tolist() == [0, 2, 2]
    assert made.data["class_name"].tolist() == ["the ring", "corner", "corner"]
    assert to_detections([segmentation(empty())]).mask.shape == (0, HEIGHT, WIDTH)


def test_detections_without_supervision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        to_detections(three())


def test_overlay_of_several():
    found = three()
    plain = overlay_all(found, labels=False)
    assert plain.shape == (HEIGHT, WIDTH, 3)
    assert tuple(plain[3, 6]) == PALETTE[0]
    assert tuple(plain[19, 30]) == PALETTE[2]
    assert tuple(plain[0, 0]) == (40, 40, 40)
    drawn = overlay_all(found)
    assert drawn.shape == (HEIGHT * 9, WIDTH * 9, 3)  # enlarged: labels are legible
    colors = drawn.reshape(-1, 3).tolist()
    assert all(list(PALETTE[nth]) in colors for nth in range(3))  # the second is the border of its label


@pytest.mark.parametrize("make", [to_coco, lambda found: to_labelme(found, file_name="x"), overlay_all])
def test_segmentations_of_one_image(make: Any):
    with pytest.raises(UserError, match="is empty"):
        make([])
    other = segmentation(empty())
    other.image[0, 0] = 1
    with pytest.raises(UserError, match="of several images"):
        make([segmentation(empty()), other])


def test_the_package_offers_them():
    assert cmmasksd.to_coco is to_coco
    assert cmmasksd.to_labelme is to_labelme
    assert cmmasksd.to_detections is to_detections
    assert cmmasksd.overlay_all is overlay_all
