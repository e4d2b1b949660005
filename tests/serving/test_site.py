"""The static site: its JavaScript computes what Python computes, and the page finds the same masks in a real browser.

Node runs the parts, Chromium the whole. Where node, Chromium, playwright or onnxruntime-web is missing the tests skip and
say what to install.
"""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from unicodedata import ucd_3_2_0

import numpy as np
import pytest
from PIL import Image

from cmmasksd.cli import main
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.errors import UserError
from cmmasksd.inference.onnx import OnnxSegmenter, resize_bicubic, restore
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.frame import lay
from cmmasksd.model.processing import load_tokenizer, tokenize
from cmmasksd.serving import site

ORT = Path(__file__).parents[2] / "web/node_modules/onnxruntime-web/dist"
SENTENCES = [
    "red circle", "The LARGE   star\ton the left\n", "second-biggest circle's edge", "it's don't we'll I'm they've you'd",
    "12 3 star 4567", "café naïve Ångström", "cafe\u0301 in two parts", "ΟΔΥΣΣΕΥΣ Σ", "İstanbul ǅ ß ẞ ﬀ", "红色的圆", "한국어 각",
    "\u1112\u1161\u11ab jamo", "क्षत्रिय", "עִבְרִית", "😀👍🏽 family 👨‍👩‍👧", "a\u00a0b\u2003c\u0085d\ufeffe\u200bf", "…—“quoted”!!!'s", "''''",
    "<|endoftext|> red <|startoftext|>", "x" * 300, "ab " * 100, "½ Ⅷ ٣ ५", "e\u0301\u0323\u0302", "\u0301 alone", "a_b-c/d\\e",
]  # fmt: skip


def node(script: str, *modules: str, **values: object) -> object:
    """Run a script that prints JSON; `modules` are imported from the browser's folder, `values` are its constants."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: the browser's JavaScript is NOT tested")
    imports = "".join(f"import * as {name} from {json.dumps((site.BROWSER / name).as_uri())[:-1]}.js\";\n" for name in modules)
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    done = subprocess.run(
        ["node", "--input-type=module", "-"], input=imports + constants + script, capture_output=True, text=True, timeout=300,
        check=False,
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
    assert [word["text"] for word in found[6]["words"]][0] == "cafe\u0301"


@pytest.mark.parametrize(("height", "width"), [(128, 128), (97, 200), (301, 33), (1, 9)])
@pytest.mark.parametrize("resize", ["warp", "letterbox"])
def test_the_javascript_pixels_equal_pythons(height: int, width: int, resize: str):
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (height, width, 4), dtype=np.uint8)
    image[..., 3] = 255
    logits = draw.normal(size=(8, 12)).astype(np.float32)
    frame = lay(height, width, (64, 96), resize)  # pyright: ignore
    settings = {"size": [64, 96], "resize": resize, "mean": [0.48, 0.45, 0.4], "std": [0.26, 0.25, 0.27]}
    found = node(
        """
        const frame = pixels.lay(height, width, settings);
        const [, , h, w] = frame.content;
        console.log(JSON.stringify({
            frame,
            small: Array.from(pixels.resizeBicubic(Uint8ClampedArray.from(image), height, width, h, w)),
            values: Array.from(pixels.pixelValues(Uint8ClampedArray.from(image), frame, settings)),
            logits: Array.from(pixels.restore(Float32Array.from(logits), 8, 12, frame)),
        }));
        """,
        "pixels", height=height, width=width, settings=settings, image=image.ravel().tolist(),
        logits=logits.ravel().tolist(),
    )  # fmt: skip
    assert isinstance(found, dict)
    assert found["frame"] == {key: list(getattr(frame, key)) for key in ("original", "canvas", "content")}
    _, _, h, w = frame.content
    small = np.array(found["small"]).reshape(h, w, 4)[..., :3]
    np.testing.assert_array_equal(small, resize_bicubic(image[..., :3], h, w))
    from cmmasksd.model.processing import CMMaskSDProcessor

    processor = CMMaskSDProcessor(
        load_tokenizer("scenes"), (64, 96), patch_size=8, resize=resize, mean=settings["mean"], std=settings["std"]  # pyright: ignore
    )
    canvas, _ = processor.image(np.ascontiguousarray(image[..., :3]))
    np.testing.assert_allclose(np.array(found["values"]), processor.pixel_values(canvas).numpy().ravel(), atol=1e-5)
    np.testing.assert_allclose(np.array(found["logits"]), restore(logits, frame).ravel(), atol=1e-4)
