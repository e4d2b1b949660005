"""REFER files: read as released (traps 5, 6, 12, 13), never run (trap 18), wrong input named, written and read."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmmasksd.data.masks import usable_segmentation
from cmmasksd.data.readers import instances, refer
from cmmasksd.data.readers.refer import NAMES, ReferDataset
from cmmasksd.data.readers.refer_release import write_refer_release
from cmmasksd.data.samples import Expression, Reference
from cmmasksd.errors import UserError

LEFT, RIGHT = [2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0], [8.0, 4.0, 20.0, 4.0, 20.0, 9.0, 8.0, 9.0]
CROWD = {"size": [16, 24], "counts": [16 * 4, 16 * 2, 16 * 18]}  # columns 4 and 5


def ref(ref_id: int, image_id: int, split: str, *texts: str, **changes) -> dict:
    """One entry of a refs file; its annotation has the id 10 * ref_id, its sentences 100 * ref_id and so on."""
    sentences = [
        {"sent_id": 100 * ref_id + i, "sent": text, "raw": text.upper() + "!", "tokens": text.split()}
        for i, text in enumerate(texts or ("the thing",))
    ]
    entry = {
        "ref_id": ref_id,
        "ann_id": 10 * ref_id,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{10 * ref_id}.jpg",  # names no file, as in the release
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }
    return entry | changes


SHARED: list = []  # its repr() has 2**60 parts
for _ in range(60):
    SHARED = [SHARED, SHARED]

REFS = [
    ref(1, 7, "train", "left square"),
    ref(2, 9, "train", "  crowd of \n people ", "men"),
    ref(3, 7, "train", "two parts"),
    ref(4, 7, "testA"),
    ref(5, 9, "testB"),
]


def instances_of(refs: list[dict]) -> dict:
    """An instances.json for refs, and some images and annotations that nobody refers to."""
    segmentations = {20: CROWD, 30: [LEFT, RIGHT]}
    images = {entry["image_id"] for entry in refs} | {1000, 1001}
    return {
        "info": {},
        "licenses": [],
        "categories": [{"id": 1, "name": "object"}],
        "images": [
            {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 16, "width": 24} for i in sorted(images)
        ],
        "annotations": [
            {
                "id": entry["ann_id"],
                "image_id": entry["image_id"],
                "iscrowd": int(entry["ann_id"] in segmentations),
                "segmentation": segmentations.get(entry["ann_id"], [LEFT]),
            }
            for entry in [*refs, ref(500, 1000, "none")]
        ],
    }


def write_files(root: Path, refs=REFS, instances=None, folder: str = "refcoco", by: str = "unc") -> Path:
    """A release by hand; refs and instances may be bytes, to be written as they are."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    content = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2)
    (root / folder / f"refs({by}).p").write_bytes(content)
    if instances is None:
        instances = instances_of(refs if isinstance(refs, list) else REFS)
    content = instances if isinstance(instances, bytes) else json.dumps(instances).encode()
    (root / folder / "instances.json").write_bytes(content)
    images = root / "images" / "train2014"
    images.mkdir(parents=True, exist_ok=True)
    for image_id in (7, 9):
        pixels = np.full((16, 24, 3), 10 * image_id, dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"COCO_train2014_{image_id:012d}.jpg", quality=95)
    return root


def says(message: str):
    """A UserError in one line."""
    return pytest.raises(UserError, match=f"^(?!.*\n).*{message}")


# -------------------------------------------------------------------------------------------------------------- reading


def test_reads_references_texts_images_and_masks(tmp_path):
    data = ReferDataset("refcoco", write_files(tmp_path), "train")
    assert (data.name, data.split, len(data)) == ("refcoco", "train", 3)
    assert data[0] == Reference(1, 7, (10,), "train", (Expression(100, "left square"),))
    assert data.groups() == [[0, 2], [1]]
    assert data.image(data[1]).shape == (16, 24, 3)
    assert abs(int(data.image(data[1])[8, 8, 0]) - 90) < 3, "the image by its id, not by the ref's file_name"
    expected = np.zeros((16, 24), dtype=bool)
    expected[2:12, 2:12] = True
    np.testing.assert_array_equal(data.mask(data[0]), expected)


def test_text_is_the_cleaned_sentence_with_even_white_space(tmp_path):
    texts = [e.text for e in ReferDataset("refcoco", write_files(tmp_path), "train")[1].expressions]
    assert texts == ["crowd of people", "men"]


def test_parts_are_united_and_crowds_decoded(tmp_path):
    data = ReferDataset("refcoco", write_files(tmp_path), "train")
    parts = np.zeros((16, 24), dtype=bool)
    parts[2:12, 2:12] = parts[4:9, 8:20] = True
    np.testing.assert_array_equal(data.mask(data[2]), parts)
    crowd = np.zeros((16, 24), dtype=bool)
    crowd[:, 4:6] = True
    np.testing.assert_array_equal(data.mask(data[1]), crowd)
    both = dataclasses.replace(data[2], ann_ids=(30, 10))
    np.testing.assert_array_equal(data.mask(both), parts)


@pytest.mark.parametrize(
    "style", [{}, {"indent": 1}, {"indent": "\t"}, {"separators": (",", ":")}, {"sort_keys": True}]
)
def test_masks_do_not_depend_on_how_the_json_is_laid_out(tmp_path, style):
    instances = instances_of(REFS)
    instances["info"] = {"note": 'a string with "segmentation": [[1, 2, 3]] in it', "é": "\u2028"}
    plain = ReferDataset("refcoco", write_files(tmp_path / "a"), "train")
    content = json.dumps(instances, ensure_ascii=False, **style).encode()
    data = ReferDataset("refcoco", write_files(tmp_path / "b", instances=content), "train")
    for reference in plain:
        np.testing.assert_array_equal(data.mask(reference), plain.mask(reference))


def test_splits_are_matched_by_their_whole_name(tmp_path):
    write_files(tmp_path)
    assert len(ReferDataset("refcoco", tmp_path, "train")) == 3
    assert [r.ref_id for r in ReferDataset("refcoco", tmp_path, "testA")] == [4]
    assert [r.ref_id for r in ReferDataset("refcoco", tmp_path, "testB")] == [5]
    for wrong in ("test", "testa", "val", "", "A"):
        with says(rf"refcoco has no split '{wrong}': .* holds train \(3\), testA \(1\), testB \(1\)"):
            ReferDataset("refcoco", tmp_path, wrong)


@pytest.mark.parametrize(
    ("name", "folder", "by"),
    [
        ("refcoco", "refcoco", "unc"),
        ("refcoco+", "refcoco+", "unc"),
        ("refcocog-umd", "refcocog", "umd"),
        ("refcocog-google", "refcocog", "google"),
    ],
)
def test_each_name_has_its_file(tmp_path, name, folder, by):
    assert name in NAMES
    write_files(tmp_path, folder=folder, by=by)
    assert len(ReferDataset(name, tmp_path, "train")) == 3
    for other in set(NAMES) - {name}:
        with says("which does not exist"):
            ReferDataset(other, tmp_path, "train")


def test_images_may_lie_elsewhere(tmp_path):
    write_files(tmp_path / "a")
    (tmp_path / "a/images/train2014").rename(tmp_path / "pictures")
    with says("image folder .*images/train2014 or .* does not exist"):
        ReferDataset("refcoco", tmp_path / "a", "train")
    for kind in ("folder", "files"):
        folder = tmp_path / "a/images/train2014"
        if kind == "folder":
            folder.symlink_to(tmp_path / "pictures", target_is_directory=True)
        else:
            folder.unlink()
            folder.mkdir()
            for file in (tmp_path / "pictures").iterdir():
                (folder / file.name).symlink_to(file)
        data = ReferDataset("refcoco", tmp_path / "a", "train")
        assert data.image(data[0]).shape == (16, 24, 3), kind
    shutil.rmtree(folder)
    toolbox = tmp_path / "a/images/mscoco/images"  # where the original toolbox wants them
    toolbox.mkdir(parents=True)
    (tmp_path / "pictures").rename(toolbox / "train2014")
    assert len(ReferDataset("refcoco", tmp_path / "a", "train")) == 3


def test_stored_pixels_are_not_turned(tmp_path):
    write_files(tmp_path)
    path = tmp_path / "images/train2014/COCO_train2014_000000000007.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    data = ReferDataset("refcoco", tmp_path, "train")
    assert data.image(data[0]).shape[:2] == data.mask(data[0]).shape == (16, 24)


def test_pickles_small_and_works_after(tmp_path):
    instances = instances_of(REFS)
    instances["annotations"] += [
        {"id": 10**6 + i, "image_id": 1000, "iscrowd": 0, "segmentation": [LEFT * 20]} for i in range(1000)
    ]
    data = ReferDataset("refcoco", write_files(tmp_path, instances=instances), "train")
    content = pickle.dumps(data)
    assert len(content) < 3000, "annotations that the split does not need are kept"
    copy = pickle.loads(content)
    assert list(copy) == list(data)
    np.testing.assert_array_equal(copy.mask(copy[2]), data.mask(data[2]))
    np.testing.assert_array_equal(copy.image(copy[2]), data.image(data[2]))


# ----------------------------------------------------------------------------------------------------- the refs pickle

# As Python 2 wrote it with pickle.dump(refs, file): protocol 0, where "ann_id" is a long, texts are str (bytes) or
# unicode, and "split" is used again from the memo.
PYTHON_2 = b"""(lp0
(dp1
S'sent_ids'
p2
(lp3
I0
aI1
asS'file_name'
p4
S'COCO_train2014_000000000007_10.jpg'
p5
sS'ann_id'
p6
L10L
sS'sentences'
p7
(lp8
(dp9
S'tokens'
p10
(lp11
S'caf\\xc3\\xa9'
p12
asS'raw'
p13
S'Caf\\xc3\\xa9 '
p14
sS'sent_id'
p15
I0
sS'sent'
p16
S'caf\\xc3\\xa9 man'
p17
sa(dp18
g10
(lp19
Vna\xefve
p20
asg13
g20
sg15
I1
sg16
Vna\xefve \\u2019man
p21
sasS'ref_id'
p22
I1
sS'image_id'
p23
I7
sS'split'
p24
S'train'
p25
sS'category_id'
p26
I1
sa."""


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (PYTHON_2, ["café man", "naïve ’man"]),
        (PYTHON_2.replace(rb"\xc3\xa9", rb"\xe9"), ["café man", "naïve ’man"]),  # Latin-1, where UTF-8 fails
    ],
)
def test_reads_what_python_2_wrote(tmp_path, content, texts):
    data = ReferDataset("refcoco", write_files(tmp_path, refs=content), "train")
    assert data[0].ann_ids == (10,)
    assert [e.text for e in data[0].expressions] == texts


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_every_protocol_and_plain_type(tmp_path, protocol):
    plain = [1, -5, 300, 70_000, 2**40, -(2**3000), 1.5, True, False, None, "é" * 300, "x" * 70_000, (), (1,), (1, 2)]
    plain += [(1, 2, 3), (1, 2, 3, 4), [], {}, {"a": [1]}, "", "r\xff\xff\xff\xff c\nos\n", [list(range(2000))] * 3]
    plain += [b"bytes" * 100, b"x" * 70_000]
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(plain, protocol=protocol))
    assert refer._load_refs(path) == plain


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_not_run(tmp_path, protocol):
    target = tmp_path / "proof"
    content = pickle.dumps([Touch(target)], protocol=protocol)
    pickle.loads(content)
    assert target.exists(), "the attack works against pickle itself"
    target.unlink()
    write_files(tmp_path, refs=content)
    with says(r"refs\(unc\)\.p is not a plain refs file: it asks for '[\w.]+', which could run any code"):
        ReferDataset("refcoco", tmp_path, "train")
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'touch proof'\ntR.", r"it asks for 'os\.system'"),
        (b"(S'touch proof'\nios\nsystem\n.", "unexpected instruction"),  # calls a function in one step
        (b"ccopy_reg\n_reconstructor\n.", r"it asks for 'copy_reg\._reconstructor'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"it asks for 'os\.system'"),
        (b"\x82\x01.", "unexpected instruction"),  # a registered class
        (b"Pid\n.", "unexpected instruction"),  # a persistent object
        (b"}Nb.", "unexpected instruction"),  # sets attributes
        (b"\x96\x00\x00\x00\x00\xff\xff\x00\x00.", "unexpected instruction"),  # a bytearray of 281 TB
        (b"Nr\xff\xff\xff\xff.", "expected a pickled list of dicts"),  # a memo of 64 GB, for Python
        (b"Np4294967295\n.", "expected a pickled list of dicts"),
        (b"\x8f.", "unexpected instruction"),  # a set
        (b"", "not a plain refs file"),
        (b"<html>", "unexpected instruction"),
        (b"I" + b"9" * 10_000 + b"\n.", "not a plain refs file"),
        (b"X\xff\xff\xff\xffabc", "not a plain refs file"),
        (b"h\x05.", "not a plain refs file"),
        (b"].", "expected a pickled list of dicts"),
        (b"}.", "expected a pickled list of dicts"),
        (b"(I1\nl.", "expected a pickled list of dicts"),
    ],
)
def test_any_other_pickle_is_refused(tmp_path, content, message):
    write_files(tmp_path, refs=content)
    with says(message):
        ReferDataset("refcoco", tmp_path, "train")


def test_every_truncation_is_one_error(tmp_path):
    whole = pickle.dumps(REFS[:1], protocol=2)
    path = tmp_path / "refs.p"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with says("not a plain refs file"):
            refer._load_refs(path)


def test_files_over_the_size_limit_are_not_opened(tmp_path, monkeypatch):
    write_files(tmp_path)
    size = (tmp_path / "refcoco/refs(unc).p").stat().st_size
    monkeypatch.setattr(refer, "MAX_REFS_BYTES", size)
    assert ReferDataset("refcoco", tmp_path, "train")
    monkeypatch.setattr(refer, "MAX_REFS_BYTES", size - 1)
    with says(f"has {size} bytes, more than the {size - 1} allowed"):
        ReferDataset("refcoco", tmp_path, "train")


# ---------------------------------------------------------------------------------------------------------- wrong input


def test_unknown_names_and_missing_files_show_the_layout(tmp_path):
    with says(r"unknown data set 'refcocog': expected one of refcoco, refcoco\+, refcocog-umd, refcocog-google"):
        ReferDataset("refcocog", tmp_path, "train")
    with says("nowhere does not exist: expected <root>/refcoco/refs"):
        ReferDataset("refcoco", tmp_path / "nowhere", "train")
    with says(r"refcoco needs .*refcoco/refs\(unc\)\.p, which does not exist: expected <root>/refcoco/refs\(unc\)\.p"):
        ReferDataset("refcoco", tmp_path, "train")
    write_files(tmp_path, folder="refcocog", by="google")
    with says(r"refcocog/refs\(umd\)\.p, which does not exist \(its folder has refs\(google\)\.p\)"):
        ReferDataset("refcocog-umd", tmp_path, "train")
    (tmp_path / "refcocog/instances.json").unlink()
    with says(r"refcocog-google needs .*instances\.json, which does not exist"):
        ReferDataset("refcocog-google", tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_id": None}, "a reference has 'ref_id' missing: expected a whole number"),
        ({"ref_id": 2}, "ref_id 2 appears twice"),
        ({"split": 3}, "reference 1 has 'split' 3: expected text"),
        ({"ann_id": "10"}, "reference 1 has 'ann_id' '10': expected a whole number"),
        ({"image_id": True}, "reference 1 has 'image_id' True"),
        ({"sentences": None}, "reference 1 has 'sentences' missing: expected a list of dicts"),
        ({"sentences": ["x"]}, r"reference 1 has 'sentences' \['x'\]: expected a list of dicts"),
        ({"sentences": REFS[0]["sentences"] * 2}, "reference 1: sent_id 100 appears twice"),
        ({"sentences": REFS[1]["sentences"]}, "reference 2: sent_id 200 appears twice"),
        ({"ref_id": 2**63}, "a reference has 'ref_id' 9223372036854775808: expected a whole number of at most 63 bits"),
        ({"ref_id": SHARED}, r"a reference has 'ref_id' \[\[\["),
        ({"sentences": SHARED}, r"reference 1 has 'sentences' \[\[\["),
        ({"sentences": [{"sent_id": 5, "raw": "x"}]}, "reference 1: sentence 5 has 'sent' missing: expected text"),
        ({"sentences": [{"sent": "x"}]}, "reference 1: a sentence has 'sent_id' missing"),
        ({"ann_id": 77}, "instances.json lacks 1 of 3 annotation ids that the refs file names, such as 77"),
        ({"image_id": 77}, "instances.json lacks 1 of 3 image ids that the refs file names, such as 77"),
        ({"image_id": 9, "ann_id": 30}, "annotation 30 lies in image 7, but reference 1, which names it, in image 9"),
    ],
)
def test_wrong_references_are_named(tmp_path, changes, message):
    write_files(tmp_path, refs=[REFS[0] | changes, *REFS[1:]], instances=instances_of(REFS))
    with says(message):
        ReferDataset("refcoco", tmp_path, "train")


def change(instances: dict, kind: str, record_id: int, **changes) -> dict:
    (record,) = [record for record in instances[kind] if record["id"] == record_id]
    record.update(changes)
    return instances


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda it: b"\x80\x02]q\x00", "instances.json is not JSON"),
        (lambda it: json.dumps(it).encode()[:-20], "instances.json is not JSON"),
        (lambda it: b"[" * 100_000, "instances.json is not JSON"),
        (lambda it: [], "has no list 'images'"),
        (lambda it: it | {"annotations": None}, "has no list 'annotations'"),
        (lambda it: it | {"images": it["images"][1:]}, "lacks 1 of 2 image ids .* such as 7"),
        (lambda it: it | {"annotations": it["annotations"] * 2}, "annotation 10 appears twice"),
        (lambda it: it | {"images": [*it["images"], it["images"][0] | {"width": 25}]}, "image 7 appears twice"),
        (lambda it: change(it, "images", 7, id=[]), r"an image has 'id' \[\]: expected a whole number"),
        (lambda it: change(it, "annotations", 10, id={}), r"an annotation has 'id' {}: expected a whole number"),
        (lambda it: change(it, "annotations", 10, segmentation=None), "annotation 10 has no segmentation"),
        (lambda it: change(it, "images", 7, height="16"), "image 7 has 'height' '16': expected a whole number"),
        (lambda it: change(it, "images", 7, height=0), "image 7 is 24x0 pixels"),
        (lambda it: change(it, "images", 7, height=10**9), "image 7 is 24x1000000000 pixels"),
        (lambda it: change(it, "images", 7, file_name=None), "image 7: file_name is missing: expected a path"),
        *[
            (
                lambda it, bad=bad: change(it, "images", 7, file_name=bad),
                f"image 7: file_name {re.escape(repr(bad))} is not a path inside .*train2014",
            )
            for bad in ("../../etc/passwd", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "C:b", "", ".", "a\0b")
        ],
    ],
)
def test_damaged_instances_are_named(tmp_path, damage, message):
    write_files(tmp_path, instances=damage(instances_of(REFS)))
    with says(message):
        ReferDataset("refcoco", tmp_path, "train")


def test_only_the_splits_own_annotations_must_be_sound(tmp_path):
    write_files(tmp_path, instances=change(instances_of(REFS), "annotations", 40, segmentation=["x"]))
    assert len(ReferDataset("refcoco", tmp_path, "train")) == 3
    with says("annotation 40 of .*instances.json: polygon is 'x'"):
        ReferDataset("refcoco", tmp_path, "testA")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [24, 16], "counts": [384]}, r"annotation 10 of .*RLE of size \[24, 16\]"),
        ({"size": [16, 24], "counts": [383]}, "annotation 10 of .*do not add up"),
        ("polygon", "annotation 10 of .*expected a list of polygons"),
        (7, "annotation 10 of .*expected a list of polygons"),
        ([[1, 2, 3, 4, 5, 6, 7]], "annotation 10 of .*polygon of 7 numbers"),
        ([[1, 2, 3, 4, 5, 1e9]], "annotation 10 of .*far outside"),
        ([[1, 2, 3, 4, 5, float("nan")]], "annotation 10 of .*far outside"),
        ([[1, 2, 3, 4, 5, 6], "x"], "annotation 10 of .*expected a flat list of numbers"),
    ],
)
def test_malformed_segmentations_stop_a_run_before_it_starts(tmp_path, segmentation, message):
    write_files(tmp_path, instances=change(instances_of(REFS), "annotations", 10, segmentation=segmentation))
    with says(message):
        ReferDataset("refcoco", tmp_path, "train")


@pytest.mark.parametrize(
    ("polygon", "message"), [(b"[[2.0,, 2.0,", "Expecting value"), (b"[" * 3000 + b"[[2.0, 2.0,", "annotation 10")]
)
def test_a_polygon_that_is_not_json_is_named_by_its_annotation(tmp_path, polygon, message):
    content = json.dumps(instances_of(REFS)).encode().replace(b"[[2.0, 2.0,", polygon, 1)
    write_files(tmp_path, instances=content.replace(b"12.0]]", b"12.0]]" + b"]" * (polygon.count(b"[") - 2), 1))
    with says(f"annotation 10 of .*instances.json: .*{message}|maximum recursion"):
        ReferDataset("refcoco", tmp_path, "train")


# ------------------------------------------------------------------------------------- what releases hold beside it all


@pytest.mark.parametrize(
    "part",
    [[], [3.0], [5.0, 5.0], [2.0, 2.0, 12.0, 12.0], [5, 5] * 4, [1, 1, 9, 1, 4, 1], [1.5, 1.5, 9.5, 9.5, 4.5, 4.5]],
)
def test_polygons_without_area_are_left_out(tmp_path, caplog, part):
    instances = change(instances_of(REFS), "annotations", 30, segmentation=[part, LEFT, part])
    data = ReferDataset("refcoco", write_files(tmp_path, instances=instances), "train")
    assert len(data) == 3
    np.testing.assert_array_equal(data.mask(data[2]), data.mask(data[0]))
    assert f"refcoco train of {tmp_path / 'refcoco'}: left out polygons without area (2)" in caplog.text
    caplog.clear()
    instances = change(instances, "annotations", 10, segmentation=[part])
    data = ReferDataset("refcoco", write_files(tmp_path, instances=instances), "train")
    assert [reference.ref_id for reference in data] == [2, 3]
    assert data.groups() == [[0], [1]]
    assert "left out polygons without area (3), references to annotations without area (1)" in caplog.text
    instances = change(instances, "annotations", 40, segmentation=[part] if part else part)
    write_files(tmp_path, instances=instances)
    with says(
        "refcoco testA of .* has nothing else than .*references to annotations without area .1.: check the files"
    ):
        ReferDataset("refcoco", tmp_path, "testA")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 5, 7.5, 30, 999, 999.25, 1000, -1, 1e-7, 1e20]), min_size=4, max_size=12),
    st.sampled_from([(100, 60), (60, 100), (99, 60)]),
)
def test_a_polygon_that_is_taken_without_parsing_is_usable(polygon, size):
    content = json.dumps([polygon]).encode()
    if instances._is_sound(content, *size):
        assert usable_segmentation(json.loads(content), *size) == ([polygon], 0)


def test_most_polygons_are_taken_without_parsing():
    polygon = b"[[510.66, 423.01, 511.72, 420.03, 510.45, 416, 0.5,3]]"
    assert instances._is_sound(polygon, 480, 640)
    assert not instances._is_sound(polygon, 48, 64)
    assert not instances._is_sound(polygon.replace(b"416", b"0416"), 480, 640), "no JSON"
    assert not instances._is_sound(polygon.replace(b"0.5,3", b"0.5"), 480, 640)


def test_a_bow_tie_has_an_area(tmp_path, caplog):
    tie = [4.0, 4.0, 12.0, 12.0, 12.0, 4.0, 4.0, 12.0]
    instances = change(instances_of(REFS), "annotations", 10, segmentation=[tie])
    data = ReferDataset("refcoco", write_files(tmp_path, instances=instances), "train")
    assert data.mask(data[0]).sum() > 20
    assert not caplog.text


def test_empty_sentences_are_left_out(tmp_path, caplog):
    refs = [ref(1, 7, "train", "", "left square", " \t\x1c\u3000\u200b"), ref(3, 7, "train", " "), ref(4, 7, "train")]
    refs.append(ref(6, 7, "train", sentences=[]))
    data = ReferDataset("refcoco", write_files(tmp_path, refs=refs, instances=instances_of(REFS)), "train")
    assert [(r.ref_id, [e.sent_id for e in r.expressions]) for r in data] == [(1, [101]), (4, [400])]
    assert "left out empty sentences (3), references without a sentence (2)" in caplog.text


def test_a_sentence_that_is_not_text_is_refused_on_opening(tmp_path):
    write_files(tmp_path, refs=[ref(1, 7, "train", "red \ud800 cup")], instances=instances_of(REFS))
    with pytest.raises(UserError, match=r"expression 100 is not UTF-8 text \('red .*ud800 cup'\)"):
        ReferDataset("refcoco", tmp_path, "train")


def test_what_is_left_out_is_one_line_on_stderr(tmp_path):
    write_files(tmp_path, refs=[*REFS, ref(6, 7, "train", sentences=[])], instances=instances_of(REFS))
    code = """
import sys
from pathlib import Path
from cmmasksd.config import SplitConfig
from cmmasksd.data.datasets import open_dataset
open_dataset(SplitConfig("refcoco", "train", root=Path(sys.argv[1])))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=300)
    line = f"refcoco train of {tmp_path / 'refcoco'}: left out references without a sentence (1)"
    assert (done.returncode, done.stderr.splitlines()) == (0, [line])


def test_missing_damaged_and_resized_images(tmp_path):
    write_files(tmp_path)
    path = tmp_path / "images/train2014/COCO_train2014_000000000007.jpg"
    data = ReferDataset("refcoco", tmp_path, "train")
    whole = path.read_bytes()
    Image.new("RGB", (48, 32)).save(path)
    with says("is 48x32 pixels but .*instances.json says 24x16"):
        data.image(data[0])
    path.write_bytes(whole[:-200])
    with says("000000000007.jpg does not decode"):
        data.image(data[0])
    path.unlink()
    with says("000000000007.jpg does not exist"):
        data.image(data[0])
    with says("1 of 2 images of refcoco train are missing, the first is .*/COCO_train2014_000000000007.jpg"):
        ReferDataset("refcoco", tmp_path, "train")


# -------------------------------------------------------------------------------------------------------------- writing


class Squares:
    """Made-up data in memory: two references per image; the second is a ring."""

    name = "squares"

    def __init__(self, split: str, images: int, first_id: int) -> None:
        self.split = split
        self.first_id = first_id
        self.references = [
            Reference(
                i, i // 2 + 50, (i + 1000,), split, (Expression(2 * i, f"object {i}"), Expression(2 * i + 1, "it"))
            )
            for i in range(first_id, first_id + 2 * images)
        ]

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: int) -> Reference:
        return self.references[index]

    def image(self, reference: Reference) -> np.ndarray:
        rows, columns = np.mgrid[:30, :40]
        return np.stack([rows * 4, columns * 4, np.full((30, 40), reference.image_id)], axis=-1).astype(np.uint8)

    def mask(self, reference: Reference) -> np.ndarray:
        mask = np.zeros((30, 40), dtype=bool)
        mask[5:20, reference.ref_id : reference.ref_id + 10] = True
        if reference.ref_id % 2:
            mask[8:12, reference.ref_id + 3 : reference.ref_id + 6] = False
        return mask

    def groups(self) -> list[list[int]]:
        return [[i, i + 1] for i in range(0, len(self), 2)]


def test_written_releases_read_back(tmp_path):
    sources = [Squares("train", 3, 0), Squares("testA", 1, 10)]
    write_refer_release(tmp_path, sources)
    for source in sources:
        data = ReferDataset("refcoco", tmp_path, source.split)
        assert list(data) == source.references
        assert data.groups() == source.groups()
        for reference in data:
            np.testing.assert_array_equal(data.mask(reference), source.mask(reference))
            difference = data.image(reference).astype(int) - source.image(reference)
            assert np.abs(difference).mean() < 2
    assert not list(tmp_path.rglob("*.part"))


def test_written_files_have_the_fields_of_the_release(tmp_path):
    write_refer_release(tmp_path, [Squares("val", 1, 6)])
    content = (tmp_path / "refcoco/refs(unc).p").read_bytes()
    assert content[:2] == b"\x80\x02"
    entry = pickle.loads(content)[1]
    assert entry == {
        "ref_id": 7,
        "ann_id": 1007,
        "image_id": 53,
        "category_id": 1,
        "split": "val",
        "file_name": "COCO_train2014_000000000053_1007.jpg",
        "sent_ids": [14, 15],
        "sentences": [
            {"tokens": ["object", "7"], "raw": "object 7", "sent_id": 14, "sent": "object 7"},
            {"tokens": ["it"], "raw": "it", "sent_id": 15, "sent": "it"},
        ],
    }
    instances = json.loads((tmp_path / "refcoco/instances.json").read_bytes())
    assert instances.keys() == {"info", "licenses", "images", "annotations", "categories"}
    assert instances["images"] == [
        {"id": 53, "file_name": "COCO_train2014_000000000053.jpg", "height": 30, "width": 40, "license": 0}
    ]
    annotation = instances["annotations"][1]
    assert annotation.pop("segmentation")
    assert annotation == {
        "id": 1007,
        "image_id": 53,
        "category_id": 1,
        "iscrowd": 0,
        "area": 15 * 10 - 4 * 3,
        "bbox": [7, 5, 10, 15],
    }
    with Image.open(tmp_path / "images/train2014/COCO_train2014_000000000053.jpg") as image:
        assert image.format == "JPEG"
        assert {component[1:3] for component in image.layer} == {(1, 1)}, "4:4:4"


def test_an_existing_release_is_not_overwritten(tmp_path):
    write_refer_release(tmp_path, [Squares("val", 1, 0)])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with says(r"refs\(unc\)\.p already exists: delete that release"):
        write_refer_release(tmp_path, [Squares("train", 2, 0)])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_image_is_not_overwritten(tmp_path):
    path = tmp_path / "images/train2014/COCO_train2014_000000000050.jpg"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(path)
    photograph = path.read_bytes()
    with says("000000000050.jpg already exists and is another image"):
        write_refer_release(tmp_path, [Squares("val", 1, 0)])
    assert path.read_bytes() == photograph
    assert not (tmp_path / "refcoco/refs(unc).p").exists()


def test_a_run_that_was_cut_off_leaves_no_release_and_can_be_repeated(tmp_path, monkeypatch):
    source = Squares("val", 2, 0)
    with monkeypatch.context() as patch:
        patch.setattr(source, "mask", lambda reference: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_refer_release(tmp_path, [source])
    with says("which does not exist"):
        ReferDataset("refcoco", tmp_path, "val")
    assert list(tmp_path.rglob("*.jpg")), "an image is there already"
    write_refer_release(tmp_path, [source])
    assert len(ReferDataset("refcoco", tmp_path, "val")) == 4


def replaced(index: int, **changes) -> Squares:
    source = Squares("val", 2, 0)
    source.references[index] = dataclasses.replace(source.references[index], **changes)
    return source


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "nothing to write"),
        ([Squares("val", 0, 0)], "nothing to write"),
        ([Squares("train", 1, 0), Squares("val", 1, 0)], "image_id 50 appears twice"),
        ([replaced(1, ref_id=0)], "ref_id 0 appears twice"),
        ([replaced(1, ann_ids=(1000,))], "ann_id 1000 appears twice"),
        ([replaced(1, expressions=(Expression(0, "x"),))], "sent_id 0 appears twice"),
        ([replaced(1, ann_ids=())], "reference 1 has 0 annotations: the REFER format holds exactly one"),
        ([replaced(1, ann_ids=(1, 2))], "reference 1 has 2 annotations"),
        ([replaced(1, ref_id=40)], "reference 40 has an empty mask"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, sources, message):
    with says(message):
        write_refer_release(tmp_path, sources)
    assert not (tmp_path / "refcoco/refs(unc).p").exists()


def test_a_mask_of_another_size_is_refused(tmp_path, monkeypatch):
    source = Squares("val", 1, 0)
    monkeypatch.setattr(source, "mask", lambda reference: np.ones((40, 30), dtype=bool))
    with says(r"reference 0 has a mask of size \(40, 30\) on an image of size \(30, 40\)"):
        write_refer_release(tmp_path, [source])


# --------------------------------------------------------------------------------------------------------- real samples


def test_real_sample_of_refcoco(real_data):
    root = real_data / "refer-mini"
    data = ReferDataset("refcoco", root, "testA")
    assert (len(data), len(ReferDataset("refcoco", root, "testB"))) == (10, 4)
    assert data[0].expressions[0].text == "guy holding baby"
    for reference in data:
        mask = data.mask(reference)
        assert data.image(reference).shape[:2] == mask.shape
        assert 0.001 < mask.mean() < 0.9
    instances = json.loads((root / "refcoco/instances.json").read_bytes())
    areas = {a["id"]: a["area"] for a in instances["annotations"]}
    for reference in data:
        area = areas[reference.ann_ids[0]]
        assert abs(data.mask(reference).sum() - area) < 0.06 * area, "the annotation's own area"


def test_real_sample_of_coco_128(real_data):
    root = real_data / "refer-coco128"
    for split, count in (("train", 169), ("val", 47)):
        data = ReferDataset("refcoco", root, split)
        assert len(data) == count
        indices = [index for group in data.groups() for index in group]
        assert sorted(indices) == list(range(len(data)))
        for reference in data:
            assert data.mask(reference).any()
        for group in data.groups()[:10]:
            assert data.image(data[group[0]]).shape == (*data.mask(data[group[0]]).shape, 3)
