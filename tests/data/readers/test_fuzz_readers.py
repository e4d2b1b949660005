"""Files of the right shape with something nasty in one place: every reader reads them, or says one line at once.

A data set that opened is read to its end, so that nothing in its files can fail in the middle of a run.
"""

import base64
import copy
import csv
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmmasksd.data.masks import mask_to_rle
from cmmasksd.data.readers.manifest import ManifestDataset
from cmmasksd.data.readers.refer import ReferDataset
from cmmasksd.data.readers.rows import read_rows
from cmmasksd.errors import UserError

SQUARE = [4.0, 2.0, 10.0, 2.0, 10.0, 8.0, 4.0, 8.0]
MASK = np.pad(np.ones((6, 6), dtype=bool), ((2, 8), (4, 14)))  # 16x24, the square
SHARED: list = []  # its repr() has 2**60 parts
for _ in range(60):
    SHARED = [SHARED, SHARED]

# Python's JSON and pickle do not write these: they are put into the file in the place of a text
RAW = {
    "@deep": (b"[" * 100_000 + b"]" * 100_000, b"]" * 300_000 + b"a" * 299_999),
    "@deep dict": (b'{"a":' * 990 + b"1" + b"}" * 990, b"}X\x01\x00\x00\x00a" * 300_000 + b"N" + b"s" * 300_000),
    "@1e400": (b"1e400", b"F1e400\n"),
    "@5000 digits": (b"9" * 5000, b"L" + b"9" * 5000 + b"\n"),
    "@not utf-8": (b'"\xff\xfe\xe9"', b"X\x02\x00\x00\x00\xff\xe9"),
}
NASTY = [
    *[None, True, False, 0, 1, -1, 7, 10**9, 10**17, 2**63, 2**70, -(2**70), 1.5, 1e300, float("nan"), float("inf")],
    *[
        "",
        " ",
        "\x1c\u3000",
        "x" * 100_000,
        "\ud800",
        "\udce9",
        "\x00",
        "\x1b[31m\r\n\x07",
        "a\u2028b",
        "train",
        "../a.png",
    ],
    *[[], [[]], [None], [-1] * 6, [[1, 2], [3, 4]], [[1, 2, 3, 4]], [[5, 5] * 3], [[0, 10**9]], ["x" * 1000] * 100],
    *[{}, {"": None}, {"size": [16, 24], "counts": [384]}, {"size": [16, 24], "counts": "0" * 1000}],
    *RAW,
]
nasty = st.sampled_from(NASTY)


def places(value: object, place: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a value, itself included."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*place, key))


@st.composite
def damaged(draw: st.DrawFn, sound: Any, values: st.SearchStrategy = nasty) -> Any:
    """A copy of the value with one place replaced; or a key of a dict, or a key removed."""
    place = draw(st.sampled_from(list(places(sound))))
    if not place:
        return draw(values)
    copied = copy.deepcopy(sound)
    parent = copied
    for key in place[:-1]:
        parent = parent[key]
    how = draw(st.sampled_from(["value", "value", "value", "key", "gone"]))
    if how == "value" or isinstance(parent, list):
        parent[place[-1]] = draw(values)
    else:
        value = parent.pop(place[-1])
        if how == "key":
            parent[draw(st.sampled_from(["", "\ud800", "x" * 10_000, "\x1b[31m\n", "text", "id"]))] = value
    return copied


def as_json(value: object) -> bytes:
    content = json.dumps(value).encode()
    for text, (raw, _) in RAW.items():
        content = content.replace(json.dumps(text).encode(), raw)
    return content


def as_pickle(value: object, protocol: int) -> bytes:
    content = pickle.dumps(value, protocol)
    for text, (_, raw) in RAW.items():
        content = content.replace(b"X" + len(text).to_bytes(4, "little") + text.encode(), raw)
    return content


def is_read_or_refused(open_it: Callable[[], ReferDataset | ManifestDataset], folder: Path) -> None:
    said, data = "", None
    try:
        data = open_it()
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said.replace(str(folder), "")) <= 400, said
    if data is None:
        return
    assert len(data) > 0
    for index in [index for group in data.groups() for index in group]:
        reference = data[index]
        mask = data.mask(reference)
        assert mask.dtype == bool
        try:
            assert data.image(reference).shape[:2] == mask.shape
        except UserError as error:  # pixels are read last: their size is that of the file, not that of the JSON
            assert "its masks would not fit" in str(error)  # noqa: PT017
        assert all(expression.text.strip() for expression in reference.expressions)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images a.png and b.png, the mask square.png, and a place for REFER's files."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "images/train2014").mkdir(parents=True)
    (folder / "refcoco").mkdir()
    for name in ("a.png", "b.png", "images/train2014/7.png", "images/train2014/9.png"):
        Image.new("RGB", (24, 16), (9 * len(name), 0, 0)).save(folder / name)
    Image.fromarray(MASK.astype(np.uint8)).save(folder / "square.png")
    return folder


bounded = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))

# ---------------------------------------------------------------------------------------------------------------------
# RefCOCO

REFS = [
    {
        "ref_id": nth,
        "ann_id": 10 * nth,
        "image_id": image_id,
        "category_id": 1,
        "split": "train",
        "file_name": "x.jpg",
        "sent_ids": [nth, nth + 10],
        "sentences": [
            {"sent_id": nth, "sent": "a cup", "raw": "A cup.", "tokens": ["a", "cup"]},
            {"sent_id": nth + 10, "sent": "cup", "raw": "Cup", "tokens": ["cup"]},
        ],
    }
    for nth, image_id in ((1, 7), (2, 7), (3, 9))
]
INSTANCES = {
    "info": {},
    "images": [{"id": i, "file_name": f"{i}.png", "height": 16, "width": 24} for i in (7, 9)],
    "annotations": [
        {"id": 10, "image_id": 7, "iscrowd": 0, "segmentation": [SQUARE, SQUARE]},
        {"id": 20, "image_id": 7, "iscrowd": 1, "segmentation": {"size": [16, 24], "counts": [36, 12, 336]}},
        {"id": 30, "image_id": 9, "iscrowd": 0, "segmentation": mask_to_rle(MASK)},
    ],
}


def open_refer(place: Path, refs: bytes, instances: bytes) -> None:
    (place / "refcoco/refs(unc).p").write_bytes(refs)
    (place / "refcoco/instances.json").write_bytes(instances)
    is_read_or_refused(lambda: ReferDataset("refcoco", place, "train"), place)


@bounded
@given(
    refs=damaged(
        REFS, nasty | st.sampled_from([SHARED, (), b"x" * 1000, np.int64(7), np.float64("nan"), np.str_("x")])
    ),
    protocol=st.integers(1, 5),
)
def test_refs(place: Path, refs: object, protocol: int):
    open_refer(place, as_pickle(refs, protocol), as_json(INSTANCES))


@bounded
@given(instances=damaged(INSTANCES))
def test_instances(place: Path, instances: object):
    open_refer(place, as_pickle(REFS, 2), as_json(instances))


@bounded
@given(at=st.integers(0, 4000), new=st.binary(max_size=3), both=st.booleans())
def test_flipped_bytes_of_refer(place: Path, at: int, new: bytes, both: bool):
    refs, instances = as_pickle(REFS, 2), as_json(INSTANCES)
    at_refs, at = at % len(refs), at % len(instances)
    refs = refs[:at_refs] + new + refs[at_refs + len(new) :] if both else refs
    open_refer(place, refs, instances[:at] + new + instances[at + len(new) :])


# ---------------------------------------------------------------------------------------------------------------------
# One's own data

ROWS = [
    {"image": "a.png", "expressions": ["a cup", "cup on a table"], "polygon": [SQUARE], "split": "train", "id": 7},
    {"image": "a.png", "text": "the other", "rle": {"size": [16, 24], "counts": [36, 12, 336]}, "id": "x"},
    {"image": "b.png", "text": "it", "mask": "square.png"},
]
_content = io.BytesIO()
Image.fromarray(np.ones((6, 6), dtype=np.uint8)).save(_content, "PNG")
PNG = base64.b64encode(_content.getvalue()).decode()
LABELME = {
    "version": "5.5.0",
    "flags": {},
    "shapes": [
        {"label": "a cup|cup", "points": [[4, 2], [10, 2], [10, 8]], "group_id": None, "shape_type": "polygon"},
        {"label": "disc", "points": [[8, 8], [8, 12]], "group_id": 1, "shape_type": "circle"},
        {"label": "box", "points": [[4, 2], [10, 8]], "group_id": 1, "shape_type": "rectangle"},
        {"label": "mask", "points": [[4, 2], [9, 7]], "group_id": 2, "shape_type": "mask", "mask": PNG},
    ],
    "imagePath": "a.png",
    "imageHeight": 16,
    "imageWidth": 24,
}


@bounded
@given(rows=damaged(ROWS), start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n"]))
def test_jsonl(place: Path, rows: object, start: bytes):
    file = place / "m.jsonl"
    lines = [as_json(row) for row in rows] if isinstance(rows, list) else [as_json(rows)]
    file.write_bytes(start + b"\n".join(lines))
    is_read_or_refused(lambda: ManifestDataset(file, "all"), place)
    said = ""
    try:
        read_rows(file)  # as `predict` does
    except UserError as error:
        said = str(error)
    assert len(said) <= 400 + len(str(place))


@bounded
@given(row=st.integers(0, 2), column=st.integers(0, 3), value=nasty, encoding=st.sampled_from(["utf-8", "utf-16"]))
def test_csv(place: Path, row: int, column: int, value: object, encoding: str):
    cells = [["image", "expressions", "polygon", "id"]]
    cells += [["a.png", "cup|a cup", json.dumps([SQUARE]), "1"], ["b.png", "cup", json.dumps([SQUARE]), "2"]]
    cells[row][column] = value if isinstance(value, str) and value not in RAW else as_json(value).decode("latin-1")
    text = io.StringIO()
    csv.writer(text).writerows(cells)
    file = place / "m.csv"
    file.write_bytes(text.getvalue().encode(encoding, "surrogatepass"))
    is_read_or_refused(lambda: ManifestDataset(file, "all"), place)


@bounded
@given(content=damaged(LABELME), start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]))
def test_labelme(place: Path, content: object, start: bytes):
    folder = place / "labelme"
    folder.mkdir(exist_ok=True)
    if not (folder / "a.png").exists():
        os.link(place / "a.png", folder / "a.png")
    (folder / "a.json").write_bytes(start + as_json(content))
    is_read_or_refused(lambda: ManifestDataset(folder, "all"), place)
