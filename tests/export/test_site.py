"""The static site: its JavaScript computes what Python computes, and the page finds the same masks in a real browser.

Node runs the parts, Chromium the whole. Where node, Chromium, playwright or onnxruntime-web is missing the tests skip
and say what to install.
"""

import json
import random
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category, combining, ucd_3_2_0

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import normalizers

from cmmasksd.cli import main
from cmmasksd.data.samples import is_blank
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.errors import UserError
from cmmasksd.export import site
from cmmasksd.inference.bicubic import resize_bicubic
from cmmasksd.inference.export_settings import ExportSettings
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.placement import place
from cmmasksd.model.presence import presence
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer, tokenize
from cmmasksd.serving.results import word_maps
from conftest import ORT, make_wordpiece_tokenizer, require_ort, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SENTENCES = [
    "red circle", "The LARGE   star\ton the left\n", "second-biggest circle's edge", "it's don't we'll I'm they've",
    "12 3 star 4567", "café naïve Ångström", "cafe\u0301 in two parts", "ΟΔΥΣΣΕΥΣ Σ", "İstanbul ǅ ß ẞ ﬀ", "红色的圆",
    "한국어 각", "\u1112\u1161\u11ab jamo", "क्षत्रिय", "עִבְרִית", "😀👍🏽 family 👨\u200d👩\u200d👧", "…—“quoted”!!!'s",
    "''''", "a\u00a0b\u2003c\u0085d\ufeffe\u200bf", "<|endoftext|> red <|startoftext|>", "x" * 300, "ab " * 100,
    "½ Ⅷ ٣ ५", "e\u0301\u0323\u0302", "\u0301 alone", "a_b-c/d\\e",
]  # fmt: skip


def node(script: str, *modules: str, **values: object) -> object:
    """Run a script that prints JSON; `modules` are imported from the browser's folder, `values` are its constants."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: the browser's JavaScript is NOT tested")
    imports = "".join(
        f'import * as {name} from {json.dumps((site.BROWSER / name).as_uri())[:-1]}.js";\n' for name in modules
    )
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    done = subprocess.run(
        ["node", "--input-type=module", "-"], input=imports + constants + script, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("max_tokens", [8, 64])
def test_the_javascript_tokenizer_equals_pythons(max_tokens: int):
    tokenizer = load_tokenizer("scenes")
    data = SceneDataset("scenesg", "val", 60)
    sentences = SENTENCES + [expression.text for reference in data for expression in reference.expressions]
    # assigned long ago: libraries know different versions of Unicode
    letters = [chr(code) for code in range(0x20, 0x3000, 7) if ucd_3_2_0.category(chr(code)) not in ("Cn", "Cc")]
    sentences += ["".join(letters[at : at + 5]) + " a" for at in range(0, len(letters), 5)]
    settings = {"start_token": tokenizer.bos_token_id, "end_token": tokenizer.eos_token_id, "max_tokens": max_tokens}
    found = node(
        "const encode = tokenizer.makeTokenizer(file, settings); console.log(JSON.stringify(sentences.map(encode)));",
        "tokenizer", file=json.loads(tokenizer.backend_tokenizer.to_str()), settings=settings, sentences=sentences,
    )  # fmt: skip
    assert isinstance(found, list)
    for sentence, one in zip(sentences, found, strict=True):
        expected = tokenize(tokenizer, [sentence], max_tokens)
        assert one["ids"] == expected.input_ids[0].tolist(), sentence
        for word in one["words"]:
            assert sentence.encode("utf-16-le")[2 * word["start"] : 2 * word["end"]].decode("utf-16-le") == word["text"]
    assert [word["text"] for word in found[1]["words"]][:5] == ["The", "LARGE", "star", "on", "the"]
    assert found[6]["words"][0]["text"] == "cafe\u0301"


def _sentences() -> list[str]:
    """Every assigned character (every 20th of the two largest kinds) in and beside words; then random sentences."""
    kinds: dict[str, list[str]] = {}
    for character in map(chr, range(sys.maxunicode + 1)):
        kinds.setdefault(category(character), []).append(character)
    del kinds["Cn"], kinds["Cs"]
    kinds |= {kind: kinds[kind][::20] for kind in ("Lo", "Co")}
    every = [character for kind in kinds.values() for character in kind]
    sentences = [" ".join(f"{c}a b{c}c D{c} {c}" for c in every[at : at + 40]) for at in range(0, len(every), 40)]
    rng = random.Random(0)
    hard = [
        *"the Blue SQUARE,.'-#@\u200b\u00ad\u0301\u0345\u0323\t\n\0\ufffd",
        "[CLS]",
        "##a",
        "[UNK]",
        "\u302e\u302f",
        " ",
    ]
    for _ in range(3000):
        words = (rng.choice([*kinds.values(), hard, hard, hard]) for _ in range(rng.randint(1, 60)))
        sentences.append("".join(rng.choice(letters) for letters in words))
    return [
        *sentences,
        *(n * letter for n in (99, 100, 101, 300) for letter in ("x", "é", "e\u0301", "ab ", "圆", "😀")),
    ]


@pytest.mark.parametrize("max_tokens", [6, 4096])
def test_the_javascript_wordpiece_equals_transformers(max_tokens: int):
    sentences = [*SENTENCES, *_sentences()]
    letters = sorted(set(normalizers.BertNormalizer().normalize_str(" ".join(sentences))) - {" "})
    rng = random.Random(1)
    known = rng.sample(letters, len(letters) * 9 // 10)  # a word with another letter is unknown
    pairs = ("".join(rng.choices(known, k=2)) for _ in range(1000))
    more = [prefix + piece for piece in (*known, *pairs) for prefix in ("", "##")]
    tokenizer = make_wordpiece_tokenizer(more)
    tokenizer.model_max_length = 4096
    settings = {"start_token": tokenizer.bos_token_id, "end_token": tokenizer.eos_token_id, "max_tokens": max_tokens}
    encoded = node(
        r"""const encode = tokenizer.makeTokenizer(file, settings);
        const read = (sentence) => (/\p{Cn}/u.test(sentence) ? null : encode(sentence));
        console.log(JSON.stringify(sentences.map(read)));""",
        "tokenizer", file=json.loads(tokenizer.backend_tokenizer.to_str()), settings=settings, sentences=sentences,
    )  # fmt: skip
    assert isinstance(encoded, list)
    assert encoded.count(None) < 0.05 * len(encoded)  # characters that this node does not know
    for sentence, one in zip(sentences, encoded, strict=True):
        if one is not None and not is_blank(sentence):
            expected = tokenize(tokenizer, [sentence], max_tokens)
            assert one["ids"] == expected.input_ids[0].tolist(), sentence
            words = expected.words(0)
            assert [word["pieces"] for word in one["words"]] == [word.tokens for word in words], sentence
            if expected.truncated[0]:
                words.pop()  # Python's ends with its last piece in view
            for word, (start, end, _) in zip(one["words"], words, strict=False):
                text = sentence[start:end]
                if {combining(letter) for letter in word["text"] + text} <= {0, 230}:  # no marks that change places
                    assert (word["text"], 2 * word["start"]) == (text, len(sentence[:start].encode("utf-16-le")))


@pytest.mark.parametrize(("height", "width"), [(128, 128), (97, 200), (301, 33), (1, 9), (2000, 3), (3, 2000)])
@pytest.mark.parametrize("resize", ["warp", "letterbox"])
def test_the_javascript_pixels_equal_pythons(height: int, width: int, resize: str):
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (height, width, 4), dtype=np.uint8)
    image[..., 3] = 255
    placement = place(height, width, (64, 96), resize)  # pyright: ignore
    settings = {"size": [64, 96], "resize": resize, "mean": [0.48, 0.45, 0.4], "std": [0.26, 0.25, 0.27]}
    found = node(
        """
        const placement = pixels.place(height, width, settings);
        const [, , h, w] = placement.content;
        console.log(JSON.stringify({
            placement,
            small: Array.from(pixels.resizeBicubic(Uint8ClampedArray.from(image), height, width, h, w)),
            values: Array.from(pixels.pixelValues(Uint8ClampedArray.from(image), placement, settings)),
        }));
        """,
        "pixels", height=height, width=width, settings=settings, image=image.ravel().tolist(),
    )  # fmt: skip
    assert isinstance(found, dict)
    assert found["placement"] == {key: list(getattr(placement, key)) for key in ("original", "canvas", "content")}
    _, _, h, w = placement.content
    small = np.array(found["small"]).reshape(h, w, 4)[..., :3]
    np.testing.assert_array_equal(small, resize_bicubic(image[..., :3], h, w))
    processor = CMMaskSDProcessor(
        load_tokenizer("scenes"),
        (64, 96),
        patch_size=8,
        resize=resize,
        mean=settings["mean"],
        std=settings["std"],  # pyright: ignore
    )
    canvas, _ = processor.image(np.ascontiguousarray(image[..., :3]))
    np.testing.assert_allclose(np.array(found["values"]), processor.pixel_values(canvas).numpy().ravel(), atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (16, 16), (17, 31), (56, 56)])
def test_the_javascript_presence_equals_pythons(size: tuple[int, int]):
    logits = np.random.default_rng(0).normal(scale=20, size=(3, *size)).astype(np.float32)
    values = node(
        "console.log(JSON.stringify(logits.map((values) => pixels.presence(Float32Array.from(values)))));",
        "pixels",
        logits=logits.reshape(3, -1).tolist(),
    )
    assert values == pytest.approx(presence(torch.from_numpy(logits)).tolist(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The site in a browser


@pytest.fixture(scope="module")
def address(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site, made of an export that is there already."""
    require_ort()
    out = tmp_path_factory.mktemp("site") / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "export", lambda name, to, **how: ExportSettings.read(shutil.copytree(exported, to)))
        site.write_site("scenes", out, ort=ORT)
    with served(out) as address:
        yield address


@pytest.fixture(scope="module")
def page(browser: "Browser", address: str) -> Any:
    page: Any = browser.new_page()
    page.set_default_timeout(180_000)
    page.foreign, page.mistakes = [], []
    page.on("request", lambda request: request.url.startswith(address) or page.foreign.append(request.url))
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.goto(address)
    return page


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[str]]]:
    """A scene as it is, and one cut and stretched to an odd size; with their sentences."""
    folder, data = tmp_path_factory.mktemp("images"), SceneDataset("scenes", "val", 12)
    groups = list(data.groups())[:2]
    made = []
    for nth, group in enumerate(groups):
        image = Image.fromarray(data.image(data[group[0]]))
        if nth:
            image = image.resize((301, 203))
        image.save(folder / f"scene{nth}.png")
        texts = [expression.text for index in group for expression in data[index].expressions]
        made.append((folder / f"scene{nth}.png", texts))
    return made


def test_the_page_finds_the_masks_that_python_finds(page, address: str, images, tmp_path: Path):
    segmenter, compared = Segmenter.from_pretrained("scenes", device="cpu"), 0
    for file, texts in images:
        page.set_input_files("#file", file)
        page.fill("#sentences", "\n".join(texts))
        page.click("#find")
        page.wait_for_selector("#results:not([hidden]), #error:not(:empty)")
        assert page.inner_text("#error") == ""
        with page.expect_download() as download:
            page.click("#save-rle")
        download.value.save_as(tmp_path / "masks.json")
        found = json.loads((tmp_path / "masks.json").read_text())["annotations"]
        for expected, one in zip(segmenter.segment(file, texts), found, strict=True):
            height, width = one["segmentation"]["size"]
            runs = one["segmentation"]["counts"]
            mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
            assert mask.shape == expected.mask.shape
            assert one["presence"] == pytest.approx(expected.presence, abs=1e-3)
            union = (mask | expected.mask).sum()
            assert union == 0 or (mask & expected.mask).sum() / union >= 0.99
            if expected.box and one["box"]:
                np.testing.assert_allclose(one["box"], expected.box, atol=1)
            compared += union > 0
    assert compared >= 4
    assert page.foreign == []
    assert page.mistakes == []


def test_words_have_maps_and_mistakes_are_said(page, images):
    file, texts = images[0]
    answer = page.wait_for_function(  # unlike evaluate, it has a timeout
        """async ([bytes, texts]) => {
            const backend = await import("./backend.js");
            const found = await backend.segment(new Blob([Uint8Array.from(bytes)]), texts);
            const said = [];
            for (const [blob, text] of [[new Blob(["text"]), "red"], [new Blob([Uint8Array.from(bytes)]), "\\x1c"]])
                await backend.segment(blob, [text]).catch((error) => said.push(error.message));
            for (const one of found.results) {
                one.probability.data = Array.from(one.probability.data);
                for (const word of one.words) word.map.data = Array.from(word.map.data);
            }
            return { ...found, said };
        }""",
        arg=[list(file.read_bytes()), texts],
    ).json_value()
    assert answer["said"] == [
        "This file is not an image that the browser can read.",
        "An empty sentence names no object: give at least one word.",
    ]
    assert (answer["width"], answer["height"]) == (128, 128)
    segmenter = Segmenter.from_pretrained("scenes", device="cpu")
    encoded = segmenter.encode([(file, texts)])
    for nth, (one, expected) in enumerate(zip(answer["results"], segmenter.segment(file, texts), strict=True)):
        assert one["score"] == pytest.approx(expected.score, abs=1e-3)
        assert one["presence"] == pytest.approx(expected.presence, abs=1e-4)
        probability = np.array(one["probability"]["data"]).reshape(128, 128)
        assert np.abs(probability - 255 * expected.probability).max() < 1
        assert " ".join(word["text"] for word in one["words"]) == one["text"]
        for shown, word in zip(word_maps(segmenter, encoded, nth), one["words"], strict=True):
            assert (shown["start"], shown["end"]) == (word["start"], word["end"])
            difference = np.frombuffer(b64decode(shown["map"]["data"]), np.uint8) - np.array(word["map"]["data"], float)
            assert np.abs(difference).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_no_site_without_onnxruntime_web_or_over_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    (tmp_path / "dist").mkdir()
    for name in site.ORT_FILES:
        (tmp_path / "dist" / name).write_text("")
    command = ["export", "--model", "scenes", "--format", "web", "--out"]
    assert main([*command, str(tmp_path / "new"), "--ort", str(tmp_path)]) == 2
    assert "npm install onnxruntime-web@" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "mine"), "--ort", str(tmp_path / "dist")]) == 2
    assert "is not an export" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dist", "mine"]
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


def test_a_tokenizer_of_another_make_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in site.ORT_FILES:
        (tmp_path / name).write_text("")
    tokenizer = load_tokenizer("scenes")
    from tokenizers.normalizers import NFC

    tokenizer.backend_tokenizer.normalizer = NFC()  # pyright: ignore
    monkeypatch.setattr(site, "load_tokenizer", lambda name: tokenizer)
    with pytest.raises(UserError, match="neither CLIP's nor"):
        site.write_site("scenes", tmp_path / "out", ort=tmp_path)
