"""The HTTP API: answers equal the Segmenter's, everything that is wrong is refused in one shape, and one client's
mischief costs the others nothing. In process by httpx's ASGI transport; what needs sockets runs on a real uvicorn."""

import asyncio
import base64
import io
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import httpx
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from cmmasksd.data.masks import decode_segmentation
from cmmasksd.data.samples import is_blank
from cmmasksd.errors import UserError
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.serving.app import PAGE, create_app
from cmmasksd.serving.schemas import NOT_BLANK
from cmmasksd.serving.server import make_server
from cmmasksd.serving.settings import ServeSettings

SENTENCES = ["the red circle", "Blue, square on the left"]
EVERYTHING = ["rle", "png", "probability", "words"]


@pytest.fixture(scope="module")
def segmenter(tiny_model_folder: Path) -> Segmenter:
    return Segmenter.from_pretrained(tiny_model_folder, device="cpu")


def noise(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def as_json(image: bytes, sentences: list[str], **more: object) -> dict:
    return {"json": {"image": base64.b64encode(image).decode(), "sentences": sentences, **more}}


def as_form(image: bytes, sentences: list[str], **more: object) -> dict:
    return {"files": {"image": ("a.png", image)}, "data": {"sentences": sentences, **more}}


def ask(app: FastAPI, *requests: dict, path: str = "/v1/segment", method: str = "POST") -> list[httpx.Response]:
    """Send requests at once, in process."""

    async def go() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # it knows no timeout
        async with asyncio.timeout(120), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await asyncio.gather(*(client.request(method, path, **request) for request in requests))

    return asyncio.run(go())


@pytest.fixture
def serve(segmenter: Segmenter) -> Iterator:
    """Makes applications; their engines end with the test."""
    made = []

    def make(key: str | None = None, **settings: object) -> FastAPI:
        made.append(create_app(segmenter, "tiny", ServeSettings(**settings), key))  # pyright: ignore
        return made[-1]

    yield make
    for app in made:
        app.state.engine.close()


def hold(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Make the engine stop before its next batch: (it has got there, let it go on)."""
    engine, reached, go = app.state.engine, threading.Event(), threading.Event()
    compute = engine._compute

    def wait(jobs):
        reached.set()
        assert go.wait(60)
        compute(jobs)

    monkeypatch.setattr(engine, "_compute", wait)
    return reached, go


def ask_later(app: FastAPI, *requests: dict) -> Future[list[httpx.Response]]:
    """`ask` in a thread."""
    answers: Future[list[httpx.Response]] = Future()
    threading.Thread(target=lambda: answers.set_result(ask(app, *requests)), daemon=True).start()
    return answers


def connect(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), timeout=60)


def assert_refused(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == code
    message = answer.json()["error"]["message"]
    assert message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("kind", [as_json, as_form])
def test_the_answer_is_the_segmenter_s(serve, segmenter: Segmenter, kind):
    pixels = noise(60, 90)
    [answer] = ask(serve(), kind(png(pixels), SENTENCES, threshold=0.4, want=EVERYTHING))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["width"], body["height"], body["threshold"]) == (90, 60, 0.4)
    assert [result["text"] for result in body["results"]] == SENTENCES
    encoded = segmenter.encode([(pixels, SENTENCES)])
    areas = []
    for result, expected in zip(body["results"], segmenter.decode(encoded, [0.4]), strict=True):
        mask = decode_segmentation(result["rle"], 60, 90)
        np.testing.assert_array_equal(mask, expected.mask)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(result["png"])))) > 0, mask)
        assert result["score"] == pytest.approx(expected.score)
        assert (result["presence"], result["present"]) == (pytest.approx(expected.presence), True)
        assert result["area"] == mask.sum()
        areas.append(result["area"])
        if result["area"]:
            x0, y0, x1, y1 = result["box"]
            assert mask[y0:y1, x0:x1].sum() == result["area"]
            assert all(side.any() for side in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]))
        else:
            assert result["box"] is None
        values = unpack(result["probability"])
        assert values.shape == (60, 90)
        assert np.abs(values / 255 - expected.probability).max() < 0.003
    assert any(areas)


def unpack(encoded_map: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(encoded_map["data"]), np.uint8).reshape(
        encoded_map["height"], encoded_map["width"]
    )


@pytest.mark.parametrize("kind", [as_json, as_form])
def test_the_mask_of_a_sentence_of_low_presence_is_empty(serve, segmenter: Segmenter, kind):
    pixels = noise(60, 90)
    low, high = sorted(segmenter.segment(pixels, SENTENCES), key=lambda segmentation: segmentation.presence)
    between = (low.presence + high.presence) / 2
    app = serve(min_score=between)
    [health] = ask(app, {}, path="/v1/health", method="GET")
    assert health.json()["min_score"] == between
    by_default, asked, none = ask(
        app,
        kind(png(pixels), SENTENCES, threshold=0.01),
        kind(png(pixels), SENTENCES, threshold=0.01, min_score=1),
        kind(png(pixels), SENTENCES, threshold=0.01, min_score=0),
    )
    for answer, min_score in ((by_default, between), (asked, 1), (none, 0)):
        assert answer.json()["min_score"] == min_score
        for result in answer.json()["results"]:
            assert result["present"] == (result["presence"] >= min_score)
            assert bool(result["area"]) == bool(result["box"]) == bool(result["score"]) == result["present"]
            assert decode_segmentation(result["rle"], 60, 90).any() == result["present"]
    present = [result["text"] for result in by_default.json()["results"] if result["present"]]
    assert present == [high.text]


def test_what_is_not_wanted_is_left_out(serve):
    [answer] = ask(serve(), as_json(png(noise()), ["a"]))
    fields = {"text", "score", "presence", "present", "area", "box", "truncated", "rle"}
    assert set(answer.json()["results"][0]) == fields


def test_words_are_spans_with_their_correlation(serve, segmenter: Segmenter):
    """A word's map follows the cosines of the patches with the word."""
    from cmmasksd.model.correlation import correlation

    pixels = noise(64, 64)
    [answer] = ask(serve(), as_json(png(pixels), SENTENCES, want=["words"]))
    encoded = segmenter.encode([(pixels, SENTENCES)])
    for nth, result in enumerate(answer.json()["results"]):
        assert [result["text"][word["start"] : word["end"]] for word in result["words"]] == [
            w["text"] for w in result["words"]
        ]
        image = encoded.features.select(torch.tensor([0]))
        cosine = correlation(image, encoded.sentences.select(slice(nth, nth + 1)))[0]
        for word, word_map in enumerate(result["words"]):
            pieces = (encoded.tokens.word_ids[nth] == word).nonzero()[:, 0]
            values = unpack(word_map["map"])
            assert (values.min(), values.max()) == (0, 255)
            of_patches = values.reshape(4, 16, 4, 16).mean((1, 3)).ravel()
            assert np.corrcoef(of_patches, cosine[:, pieces].mean(1))[0, 1] > 0.95
    words = [word["text"] for word in answer.json()["results"][1]["words"]]
    assert words == ["Blue", ",", "square", "on", "the", "left"]


def test_maps_are_small_and_of_the_image_s_shape(serve):
    [answer] = ask(serve(), as_json(png(noise(700, 1400)), ["red"], want=["probability", "words"]))
    result = answer.json()["results"][0]
    assert unpack(result["probability"]).shape == (256, 512)
    assert unpack(result["words"][0]["map"]).shape == (32, 64)


def test_requests_that_wait_are_computed_together(
    serve, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, until: Callable
):
    app = serve(max_batch=4)
    images = [noise(40 + 9 * nth, 50, nth) for nth in range(6)]
    requests = [as_json(png(image), [f"red {nth}"]) for nth, image in enumerate(images)]
    sizes, encode = [], segmenter.encode
    monkeypatch.setattr(segmenter, "encode", lambda requests: sizes.append(len(requests)) or encode(requests))
    reached, go = hold(app, monkeypatch)
    first = ask_later(app, requests[0])
    assert reached.wait(60)
    others = ask_later(app, *requests[1:])
    until(lambda: app.state.engine.waiting == 5)
    go.set()
    answers = first.result(120) + others.result(120)
    assert sizes == [1, 4, 1]
    for nth, (image, answer) in enumerate(zip(images, answers, strict=True)):
        expected = segmenter.segment(image, f"red {nth}")[0]
        result = answer.json()["results"][0]
        assert result["text"] == f"red {nth}"
        mask = decode_segmentation(result["rle"], *image.shape[:2])
        assert (mask != expected.mask).mean() < 0.01  # rounding may move single pixels across the threshold


def test_health_metrics_and_headers(serve):
    app = serve()
    ask(app, as_json(png(noise()), SENTENCES), as_json(b"no image", SENTENCES))
    [health] = ask(app, {}, path="/v1/health", method="GET")
    assert health.json()["status"] == "ok"
    assert health.json()["model"] == "tiny"
    [metrics] = ask(app, {}, path="/metrics", method="GET")
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text)
        for sample in family.samples
    }
    assert values["cmmasksd_requests_total", "200"] == values["cmmasksd_requests_total", "415"] == 1
    assert values["cmmasksd_sentences_total",] >= 2
    for answer in (
        health,
        metrics,
        *ask(app, {}, path="/page/", method="GET"),
        *ask(app, {}, path="/no", method="GET"),
    ):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_is_served(serve):
    app = serve()
    for name, kind in {
        "": "text/html",
        "app.js": "javascript",
        "backend.js": "javascript",
        "style.css": "text/css",
    }.items():
        [answer] = ask(app, {}, path=f"/page/{name}", method="GET")
        assert answer.status_code == 200
        assert kind in answer.headers["content-type"]
        assert "<script>" not in answer.text
        assert " style=" not in answer.text


def test_the_examples_are_scenes_of_ours():
    """Anyone can make the shipped examples again, and their sentences are true ones."""
    from cmmasksd.data.scenes import SceneDataset

    folder = PAGE / "examples"
    data = SceneDataset("scenes", "val", 40, seed=0, scene_size=384)
    for example in json.loads((folder / "examples.json").read_text())["examples"]:
        references = [reference for reference in data if reference.image_id == example["image_id"]]
        with Image.open(folder / example["file"]) as image:
            assert np.abs(np.asarray(image).astype(int) - data.image(references[0])).mean() < 8  # JPEG
        assert set(example["sentences"]) <= {e.text for reference in references for e in reference.expressions}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

GOOD = base64.b64encode(b"GIF89a").decode()


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "unreadable"),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "unreadable"),
        ({"content": b"\xff", "headers": {"content-type": "application/json"}}, 400, "unreadable"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "bad_form"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "bad_form"),
        ({"json": {"image": "no base64!", "sentences": ["a"]}}, 400, "bad_base64"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"content": b"x"}, 415, "unsupported_media_type"),
        (as_json(b"plain text", ["a"]), 415, "no_image"),
        (as_json(png(noise())[:200], ["a"]), 415, "no_image"),
        (as_form(b"", ["a"]), 415, "no_image"),
        (as_json(bomb(6000, 6000), ["a"]), 413, "too_many_pixels"),
        (as_json(bomb(60_000, 60_000), ["a"]), 413, "too_many_pixels"),
        (as_json(bomb(1, 24_000_000), ["a"]), 413, "too_many_pixels"),
        (as_form(bomb(30_000, 200), ["a"]), 413, "too_many_pixels"),
        (as_json(b"0" * 11_000_000, ["a"]), 413, "too_many_bytes"),
        (as_form(b"0" * 11_000_000, ["a"]), 413, "too_many_bytes"),
        (as_json(b"", ["a"] * 10_000), 422, "invalid"),
        (as_form(b"", ["a"] * 10_000), 400, "bad_form"),
        (as_form(b"", ["a"] * 33), 422, "invalid"),
        (as_json(b"", ["a" * 301]), 422, "invalid"),
        (as_json(b"", []), 422, "invalid"),
        *(
            (as_json(png(noise()), [blank]), 422, "invalid")
            for blank in (" \t", "\x1c", "\u2003", "\x85", "\u200b\x07")
        ),
        (as_form(png(noise()), ["red", "\u3000\x1f"]), 422, "invalid"),
        (as_json(b"", [7]), 422, "invalid"),  # pyright: ignore
        (as_json(b"", ["\ud800"]), 422, "invalid"),
        (as_json(b"", ["a"], threshold=1), 422, "invalid"),
        (as_json(b"", ["a"], threshold="0.5"), 422, "invalid"),
        (as_json(b"", ["a"], min_score=1.1), 422, "invalid"),
        (as_form(b"", ["a"], min_score="nan"), 422, "invalid"),
        (as_json(b"", ["a"], want=["all"]), 422, "invalid"),
        (as_json(b"", ["a"], more=1), 422, "invalid"),
        (as_form(b"", ["a"], threshold="nan"), 422, "invalid"),
        ({"json": {"image": 5, "sentences": ["a"]}}, 422, "invalid"),
        ({"json": {"sentences": ["a"]}}, 422, "invalid"),
        ({"json": [1]}, 422, "invalid"),
        ({"json": None, "content": b"null", "headers": {"content-type": "application/json"}}, 422, "invalid"),
        ({"data": {"image": "text", "sentences": ["a"]}, "files": {"x": b""}}, 422, "invalid"),
    ],
)
def test_refusals(serve, request_: dict, status: int, code: str):
    app = serve()
    if "json" in request_ and "\\ud800" in json.dumps(request_["json"]):  # httpx will not send half a character
        request_ = {"content": json.dumps(request_["json"]), "headers": {"content-type": "application/json"}}
    [answer] = ask(app, request_)
    assert_refused(answer, status, code)
    [after] = ask(app, as_json(png(noise()), ["red"]))
    assert after.status_code == 200


def test_openapi_says_which_sentences_are_blank():
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        assert is_blank(chr(code)) == (re.search(NOT_BLANK, chr(code)) is None), hex(code)


@pytest.mark.parametrize(("path", "method", "status"), [("/no", "GET", 404), ("/v1/segment", "GET", 405)])
def test_wrong_addresses(serve, path: str, method: str, status: int):
    [answer] = ask(serve(), {}, path=path, method=method)
    assert_refused(answer, status, "not_found" if status == 404 else "method_not_allowed")
    assert (status == 405) == ("allow" in answer.headers)


def basic(words: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}


@pytest.mark.parametrize("path", ["/v1/segment", "/page/", "/page/app.js", "/metrics", "/no"])
def test_everything_but_health_asks_for_the_key(serve, path: str):
    app, method = serve(key="schlüssel 鍵"), "POST" if path == "/v1/segment" else "GET"
    wrong = [{}, {"X-API-Key": ""}, {"X-API-Key": "wrong"}, {"X-API-Key": "schl"}, {"Authorization": "Bearer"}]
    wrong += [
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic %"},
        basic("schlüssel 鍵"),
        basic("any:wrong"),
    ]
    for headers in wrong:
        [answer] = ask(app, {"headers": headers}, path=path, method=method)
        assert_refused(answer, 401, "no_key")
        assert answer.headers["www-authenticate"].startswith("Basic ")
    key = "schlüssel 鍵".encode()
    for headers in ({b"X-API-Key": key}, {b"Authorization": b"bearer " + key}, basic("any:schlüssel 鍵")):
        [answer] = ask(app, {"headers": headers}, path=path, method=method)
        assert answer.status_code == {"/v1/segment": 415, "/no": 404}.get(path, 200)


@pytest.mark.parametrize("key", ["", " ", "secret\n", "se\x00cret", "\udcff"])
def test_a_key_that_nobody_can_send(serve, key: str):
    with pytest.raises(UserError, match=r"CMMASKSD_API_KEY (is empty|has characters)"):
        serve(key=key)


def test_an_empty_key_stops_the_command(tiny_model_folder: Path):
    """`CMMASKSD_API_KEY=` is a variable somewhere that was not set, and no wish to let everybody in."""
    command = [sys.executable, "-m", "cmmasksd", "serve", "--model", str(tiny_model_folder), "--port", "0"]
    environment = os.environ | {"CMMASKSD_API_KEY": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "cmmasksd serve: CMMASKSD_API_KEY is empty: set it to the key, or unset it to let everybody in"
    ]


@pytest.mark.parametrize(
    ("settings", "host", "answers"),
    [
        ({}, "localhost:8000", True),
        ({}, "LOCALHOST", True),
        ({}, "127.0.0.1:8000", True),
        ({}, "[::1]:8000", True),
        ({}, "192.168.0.7", True),  # no name that leads elsewhere: a page of another site has another origin
        ({}, "evil.example:8000", False),
        ({}, "localhost.evil.example", False),
        ({}, "127.0.0.1.evil.example", False),
        ({"host": "::1"}, "evil.example", False),
        ({"host": "localhost"}, "evil.example", False),
        ({"host": "masks.lan"}, "masks.lan:80", True),
        ({"host": "masks.lan"}, "evil.example", False),
        ({"host": "0.0.0.0"}, "masks.lan", True),
        ({"host": "0.0.0.0", "allowed_hosts": ["masks.lan"]}, "Masks.LAN:8000", True),
        ({"host": "0.0.0.0", "allowed_hosts": ["masks.lan"]}, "localhost", True),
        ({"host": "0.0.0.0", "allowed_hosts": ["masks.lan"]}, "evil.example", False),
    ],
)
def test_host_names(serve, settings: dict, host: str, answers: bool):
    """A page whose own name leads to this machine (DNS rebinding) does not reach the server."""
    for path in ("/v1/health", "/page/"):
        [answer] = ask(serve(**settings), {"headers": {"host": host}}, path=path, method="GET")
        if answers:
            assert answer.status_code == 200
        else:
            assert "--allowed_hosts" in assert_refused(answer, 403, "unknown_host")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://localhost"}, 200),
        ({}, 200),
    ],
)
def test_forms_of_other_sites(serve, headers: dict, status: int):
    [answer] = ask(serve(), as_form(png(noise()), ["red"]) | {"headers": headers})
    if status == 403:
        assert_refused(answer, 403, "cross_site")
    else:
        assert answer.status_code == 200


def test_a_key_in_the_schema(serve):
    app = serve(key="secret")
    [health] = ask(app, {}, path="/v1/health", method="GET")
    assert health.status_code == 200
    [schema] = ask(app, {}, path="/openapi.json", method="GET")
    assert schema.json()["components"]["securitySchemes"]
    assert "401" in schema.json()["paths"]["/v1/segment"]["post"]["responses"]


def test_a_full_queue_says_come_again(serve, monkeypatch: pytest.MonkeyPatch, until: Callable):
    app = serve(queue=2, max_batch=1)
    reached, go = hold(app, monkeypatch)
    good = as_json(png(noise()), ["red"])
    first = ask_later(app, good)
    assert reached.wait(60)  # the engine has taken it: the queue has two places again
    others = ask_later(app, good, good)
    until(lambda: app.state.engine.waiting == 2)
    [refused] = ask(app, good)
    go.set()
    assert_refused(refused, 429, "busy")
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in first.result(120) + others.result(120)] == [200] * 3


def test_a_request_that_takes_too_long_is_dropped(serve, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    app = serve(timeout=0.2, max_batch=1)
    reached, go = hold(app, monkeypatch)
    good = as_json(png(noise()), ["red"])
    late = ask(app, good, good)
    for answer in late:
        assert_refused(answer, 504, "too_late")
    assert reached.wait(60)
    encoded, encode = [], segmenter.encode
    monkeypatch.setattr(segmenter, "encode", lambda requests: encoded.append(requests) or encode(requests))
    monkeypatch.setattr(app.state.engine, "settings", ServeSettings())
    go.set()
    app.state.engine.close()  # ends behind what was queued
    assert len(encoded) <= 1  # the first was on its way when its time ended; the second was not begun


def test_a_failing_batch_costs_only_the_one_that_fails(
    serve, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    app = serve(max_wait=0.5)
    encode = segmenter.encode

    def fail(requests):
        if any("secret words" in texts for _, texts in requests):
            raise RuntimeError(f"cannot do {requests}")
        return encode(requests)

    monkeypatch.setattr(segmenter, "encode", fail)
    with caplog.at_level(logging.DEBUG):
        good, bad = ask(app, as_json(png(noise()), ["red"]), as_json(png(noise()), ["secret words"]))
    assert good.status_code == 200
    assert "secret" not in assert_refused(bad, 500, "internal")
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_a_stopped_engine_refuses(serve):
    app = serve()
    app.state.engine.close()
    [answer] = ask(app, as_json(png(noise()), ["red"]))
    assert_refused(answer, 503, "stopping")
    [health] = ask(app, {}, path="/v1/health", method="GET")
    assert_refused(health, 503, "stopping")


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_hosts": ["http://a.example/"]},
        {"max_held": 1},
        {"queue": 0},
        {"port": 70000},
        {"timeout": 0},
        {"max_wait": 5},
        {"timeout": float("nan")},
    ],
)
def test_wrong_settings(wrong: dict):
    with pytest.raises(UserError, match="--"):
        ServeSettings(**wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Over a socket


@pytest.fixture
def server(running, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int, FastAPI]]:
    monkeypatch.setattr("cmmasksd.serving.server.HEAD_SECONDS", 3)
    monkeypatch.setattr("cmmasksd.serving.middleware.DRAIN_SECONDS", 3)
    with running(segmenter, "tiny", ServeSettings(port=0, body_timeout=3)) as address:
        yield address


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_mischief_over_a_socket(server: tuple[str, int, FastAPI]):
    """Truncated, endless and slow requests end, and others are answered meanwhile."""
    host, port, _ = server
    head = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow_head = connect(host, port)
    slow_head.sendall(b"POST /v1/segment HT")
    slow_body = connect(host, port)
    slow_body.sendall(head + b"Content-Length: 1000\r\n\r\n{")
    truncated = connect(host, port)
    truncated.sendall(head + b"Content-Length: 1000\r\n\r\n" + b"{" * 10)
    truncated.close()
    announced = connect(host, port)
    announced.sendall(head + b"Content-Length: 99000000\r\n\r\n")
    second_head = connect(host, port)
    second_head.sendall(b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1/hea")
    with httpx.Client(base_url=f"http://{host}:{port}", timeout=30) as client:
        good = client.post("/v1/segment", **as_form(png(noise()), ["red"]))
        sent: list[None] = []
        endless = (sent.append(None) or b" " * 100_000 for _ in range(10_000))
        try:
            answer = client.post("/v1/segment", content=endless, headers={"content-type": "application/json"})
        except httpx.HTTPError:
            pass  # the server hung up before its answer was read
        else:
            assert_refused(answer, 413, "too_many_bytes")
        assert len(sent) < 1000  # it did not read on
        assert good.status_code == 200
        assert b" 408 " in read_all(slow_body).split(b"\r\n")[0]
        assert b" 413 " in read_all(announced).split(b"\r\n")[0]
        assert read_all(slow_head) == b""
        assert b" 200 " in read_all(second_head).split(b"\r\n")[0]
        assert client.post("/v1/segment", **as_json(png(noise()), ["red"])).status_code == 200
    for connection in (slow_head, slow_body, announced, second_head):
        connection.close()


def test_silent_and_half_sent_connections_lock_nobody_out(
    running, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cmmasksd.serving.server.HEAD_SECONDS", 600)
    with running(segmenter, "tiny", ServeSettings(port=0, connections=20)) as (host, port, _):
        held = [connect(host, port) for _ in range(60)]
        for connection in held[::2]:
            connection.sendall(b"POST /v1/segm")
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
            assert client.get("/v1/health").status_code == 200
            assert client.post("/v1/segment", **as_form(png(noise()), ["red"])).status_code == 200
        for connection in held:
            connection.close()


def other_address() -> httpx.HTTPTransport:
    """Asks from 127.0.0.2."""
    try:
        socket.create_server(("127.0.0.2", 0)).close()
    except OSError:
        pytest.skip("this system has no second address on the loopback")
    return httpx.HTTPTransport(local_address="127.0.0.2")


HEAD = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def test_one_address_gets_half_of_the_places(
    running,
    segmenter: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    until: Callable,
):
    monkeypatch.setattr("cmmasksd.serving.server._once_a_minute._last", {})
    good = as_form(png(noise()), ["red"])
    with running(segmenter, "tiny", ServeSettings(port=0, connections=8, body_timeout=300)) as (host, port, _):
        held = [connect(host, port) for _ in range(4)]
        for connection in held:
            connection.sendall(HEAD % 1000 + b"{")
        address = f"http://{host}:{port}"
        until(lambda: httpx.post(f"{address}/v1/segment", timeout=60, **good).status_code == 503)
        for _ in range(20):
            refused = httpx.post(f"{address}/v1/segment", timeout=60, **good)
            assert_refused(refused, 503, "too_many")
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{address}/v1/health", timeout=60).status_code == 200
        with httpx.Client(base_url=address, transport=other_address(), timeout=60) as other:
            assert other.post("/v1/segment", **good).status_code == 200
        for connection in held:
            connection.close()
        until(lambda: httpx.post(f"{address}/v1/segment", timeout=60, **good).status_code == 200)
    assert len([line for line in caplog.messages if "too many" in line]) == 1


@pytest.mark.parametrize(("key", "status"), [(None, 413), ("secret", 401)])
def test_a_refusal_is_heard_however_long_the_request(running, segmenter: Segmenter, key: str | None, status: int):
    """The whole request is sent before its answer is read, as simple clients do."""
    with running(segmenter, "tiny", ServeSettings(port=0), key) as (host, port, _), connect(host, port) as connection:
        connection.sendall(HEAD % 21_000_000)
        for _ in range(210):
            connection.sendall(b" " * 100_000)
        assert read_all(connection).startswith(b"HTTP/1.1 %d " % status)


def test_the_bytes_of_all_requests_are_bounded(running, segmenter: Segmenter, until: Callable):
    limits = ServeSettings(port=0, max_bytes=1_000_000, max_held=2_000_000, body_timeout=300)
    long = {"content": b" " * 900_000 + b"{}", "headers": {"content-type": "application/json"}, "timeout": 60}
    with running(segmenter, "tiny", limits) as (host, port, _):
        address = f"http://{host}:{port}"
        with connect(host, port) as connection:
            connection.sendall(HEAD % 950_000 + b" " * 900_000)
            until(lambda: httpx.post(f"{address}/v1/segment", **long).status_code == 429)
            refused = httpx.post(f"{address}/v1/segment", **long)
            assert_refused(refused, 429, "busy")
            with httpx.Client(base_url=address, transport=other_address()) as other:
                assert_refused(other.post("/v1/segment", **long), 422, "invalid")
        until(lambda: httpx.post(f"{address}/v1/segment", **long).status_code == 422)


def test_what_is_no_http_is_refused_in_the_same_shape(server: tuple[str, int, FastAPI]):
    host, port, _ = server
    with connect(host, port) as connection:
        connection.sendall(b"garbage\r\n\r\n")
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "bad_http"


def test_a_client_that_leaves_is_dropped(
    server, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, until: Callable
):
    host, port, app = server
    reached, go = hold(app, monkeypatch)
    monkeypatch.setattr(app.state.engine, "settings", ServeSettings(max_batch=1))
    body = json.dumps(as_json(png(noise()), ["red"])["json"]).encode()
    head = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    jobs, submit = [], app.state.engine.submit
    monkeypatch.setattr(app.state.engine, "submit", lambda job: jobs.append(job) or submit(job))
    connections = [connect(host, port) for _ in range(2)]
    for connection in connections:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert reached.wait(30)
    until(lambda: len(jobs) == 2)
    for connection in connections:
        connection.close()
    until(lambda: all(job.answer.cancelled() for job in jobs))
    encoded, encode = [], segmenter.encode
    monkeypatch.setattr(segmenter, "encode", lambda requests: encoded.append(requests) or encode(requests))
    go.set()
    assert httpx.post(f"http://{host}:{port}/v1/segment", timeout=30, **as_json(png(noise()), ["x"])).status_code == 200
    assert [texts for batch in encoded for _, texts in batch][-1] == ["x"]
    assert len(encoded) <= 2


def test_a_port_that_is_taken(server):
    host, port, app = server
    with pytest.raises(UserError, match="another --port"):
        make_server(app, ServeSettings(host=host, port=port))


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """A server in a process of its own: the process, its address, and the file of its standard error."""
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder) / "stderr"
        with stderr.open("w") as file:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | environment
            )
        late = threading.Timer(300, process.kill)  # which ends the wait for its line, too
        late.start()
        try:
            assert process.stdout is not None
            printed = re.search(r"http://\S+", process.stdout.readline())
            assert printed, stderr.read_text()
            yield process, printed[0], stderr
        finally:
            late.cancel()
            process.kill()
            process.communicate(timeout=60)


def test_the_command(tiny_model_folder: Path, server):
    """`cmmasksd serve` says where it listens, shows no path to clients, and ends well when it is interrupted."""
    _, port, _ = server
    command = [sys.executable, "-m", "cmmasksd", "serve", "--model", str(tiny_model_folder), "--port"]
    busy = subprocess.run([*command, str(port)], capture_output=True, text=True, timeout=300)
    assert busy.returncode == 2
    assert "choose another --port" in busy.stderr.splitlines()[-1]
    with started([*command, "0"]) as (process, address, _):
        health = httpx.get(f"{address}v1/health", timeout=60).json()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    assert health["model"] == tiny_model_folder.name


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_server_for_everybody_is_warned_of(tiny_model_folder: Path, key: str | None):
    command = [sys.executable, "-m", "cmmasksd", "serve", "--model", str(tiny_model_folder), "--host", "0.0.0.0"]
    command += ["--port", "0", "--allowed_hosts", "masks.lan"]
    with started(command, **({"CMMASKSD_API_KEY": key} if key else {})) as (_, address, stderr):
        ours, other = (
            httpx.get(f"http://127.0.0.1:{httpx.URL(address).port}/v1/health", timeout=60, headers={"Host": name})
            for name in ("masks.lan", "evil.example")
        )
        warnings = [line for line in stderr.read_text().splitlines() if line.startswith("warning: ")]
    assert (ours.status_code, other.status_code) == (200, 403)
    assert len(warnings) == (key is None)
    assert all("CMMASKSD_API_KEY" in line for line in warnings)
