"""The web page in a real browser: a real upload through a real server, with mouse, by keyboard, and on a phone.

Needs Chromium (`CMMASKSD_CHROMIUM`, or `chromium` in the PATH) and playwright; says so when it skips.
"""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import httpx
from playwright.sync_api import Browser, Page

from cmmasksd.cli import main
from cmmasksd.data.masks import decode_segmentation
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.serving.settings import ServeSettings

PATIENCE = 120_000  # milliseconds; a busy machine is slow, and nothing here is a measurement


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained("scenes", device="cpu")


@pytest.fixture(scope="module")
def address(running, segmenter: Segmenter) -> Iterator[str]:
    with running(segmenter, "scenes", ServeSettings(port=0)) as (host, port, _):
        yield f"http://{host}:{port}/"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An image file and two sentences about it."""
    data = SceneDataset("scenes", "val", 40, seed=0, scene_size=200)
    reference = next(row for row in data if row.image_id == 100000010)
    file = tmp_path_factory.mktemp("scene") / "my scene.png"
    Image.fromarray(data.image(reference)[:150]).save(file)
    return file, ["spotted object", "striped diamond"]


@pytest.fixture
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, loaded; the test fails on any message in the console and on any request to another host."""
    context = browser.new_context(**getattr(request, "param", {}))
    page, wrong = context.new_page(), []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda sent: wrong.append(sent.url) if not sent.url.startswith((address, "blob:")) else None)
    page.goto(address)
    page.wait_for_selector("#examples button")
    yield page
    context.close()
    assert wrong == []


def upload(page: Page, scene: tuple[Path, list[str]]) -> None:
    page.set_input_files("#file", scene[0])
    page.fill("#sentences", "\n".join(scene[1]) + "\n\n")
    page.click("#find")
    page.wait_for_selector("#legend li")


def canvas(page: Page) -> np.ndarray:
    """What is drawn, (H, W, 3)."""
    page.wait_for_function(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
    )  # unlike evaluate, it has a timeout
    address = page.evaluate("() => document.getElementById('view').toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def changed(before: np.ndarray, after: np.ndarray) -> float:
    return float((before != after).any(2).mean())


def test_upload_threshold_words_and_downloads(page: Page, scene, segmenter: Segmenter, tmp_path: Path):
    assert page.is_visible("#note")
    page.set_input_files("#file", scene[0])
    page.wait_for_selector("#view:visible")
    plain = canvas(page)
    upload(page, scene)
    drawn = canvas(page)
    pixels = np.asarray(Image.open(scene[0]))
    expected = segmenter.segment(pixels, scene[1])
    share = np.mean(expected[0].mask | expected[1].mask)
    assert share > 0.01
    assert changed(plain, drawn) == pytest.approx(share, rel=0.3, abs=0.02)  # and the numbers
    text = page.inner_text("#legend")
    for nth, segmentation in enumerate(expected):
        assert f"score {segmentation.score:.2f}, presence {segmentation.presence:.2f}" in text
        assert page.get_by_role("img", name=f"Mask {nth + 1}").count() == 1
    assert "2 masks" in (page.get_attribute("#view", "aria-label") or "")
    assert "score" in page.inner_text("#status")

    requests = []
    page.on("request", lambda sent: requests.append(sent.url))
    areas = []
    for value in ("0.05", "0.95"):
        page.fill("#threshold", value)
        areas.append(changed(plain, canvas(page)))
        assert page.inner_text("#threshold-shown") == value
    assert areas[0] > changed(plain, drawn) > areas[1]
    page.fill("#threshold", "0.5")
    assert changed(drawn, canvas(page)) == 0
    page.fill("#min-score", "1")
    assert changed(plain, canvas(page)) == 0
    assert f"not found, presence {expected[0].presence:.2f}" in page.inner_text("#legend")
    page.fill("#min-score", "0")
    assert changed(drawn, canvas(page)) == 0

    page.hover(".word >> nth=0")
    assert changed(drawn, canvas(page)) > 0.9
    assert "spotted" in (page.get_attribute("#view", "aria-label") or "")
    page.hover("h1")
    assert changed(drawn, canvas(page)) == 0
    page.click(".word >> nth=0")
    pinned = canvas(page)
    assert changed(drawn, pinned) > 0.9
    page.hover(".word >> nth=2")
    assert changed(pinned, canvas(page)) > 0
    page.hover("h1")
    assert changed(pinned, canvas(page)) == 0
    page.click(".word >> nth=0")
    page.hover("h1")
    assert changed(drawn, canvas(page)) == 0
    page.uncheck("#legend input >> nth=0")
    assert 0 < changed(drawn, canvas(page)) < 0.2
    assert requests == []  # all of that on the page alone

    with page.expect_download() as download:
        page.click("#save-rle")
    download.value.save_as(tmp_path / "masks.json")
    saved = json.loads((tmp_path / "masks.json").read_text())
    with page.expect_download() as download:
        page.click("#legend button.link >> nth=1")
    assert download.value.suggested_filename == "my-scene_2_mask.png"
    download.value.save_as(tmp_path / "mask.png")
    masks = [decode_segmentation(row["segmentation"], 150, 200) for row in saved["annotations"]]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "mask.png").convert("L")) > 0, masks[1])
    for mask, segmentation, row in zip(masks, expected, saved["annotations"], strict=True):
        assert (mask & segmentation.mask).sum() / (mask | segmentation.mask).sum() > 0.97
        assert row["area"] == mask.sum()
        x0, y0, x1, y1 = row["box"]
        assert mask[y0:y1, x0:x1].sum() == row["area"]


def test_a_box_means_the_same_everywhere(page: Page, address: str, scene, segmenter: Segmenter, tmp_path: Path):
    """(x0, y0, x1, y1), half-open: in Python, in predict's JSON, in the API, and in the page's file."""
    file, texts = scene
    expected = [segmentation.box for segmentation in segmenter.segment(file, texts)]
    assert all(box is not None and box[0] > 0 and box[1] > 0 for box in expected)  # else some meanings look alike
    command = ["predict", "--model", "scenes", "--image", str(file), "--json", str(tmp_path / "rows.jsonl")]
    assert main([*command, *(part for text in texts for part in ("--text", text)), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [tuple(row["box"]) for row in rows] == expected
    answer = httpx.post(
        f"{address}v1/segment", files={"image": file.read_bytes()}, data={"sentences": texts}, timeout=120
    )
    assert [tuple(result["box"]) for result in answer.json()["results"]] == expected
    upload(page, scene)
    with page.expect_download() as download:
        page.click("#save-rle")
    download.value.save_as(tmp_path / "masks.json")
    saved = json.loads((tmp_path / "masks.json").read_text())["annotations"]
    np.testing.assert_allclose([row["box"] for row in saved], expected, atol=1)  # from a map of bytes


def test_by_keyboard_alone(page: Page):
    """From the top with Tab, Enter, arrows and Escape: an example, its words, the threshold."""

    def focused() -> str:
        return page.evaluate("() => document.activeElement.id || document.activeElement.className")

    def tab_to(wanted: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if focused() == wanted:
                return
        raise AssertionError(f"{wanted} is not reached")

    tab_to("file")
    page.keyboard.press("Tab")  # the first example
    page.keyboard.press("Enter")
    page.wait_for_selector("#legend li")
    drawn = canvas(page)
    tab_to("word")
    assert changed(drawn, canvas(page)) > 0.9
    assert re.match(r"Map of the word \w+: strongest at the \w+", page.inner_text("#status"))
    page.keyboard.press("Escape")
    assert changed(drawn, canvas(page)) == 0
    tab_to("threshold")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#threshold-shown") == "0.51"
    page.focus("#sentences")
    page.keyboard.press("Control+A")
    page.keyboard.type("star")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.querySelectorAll('#legend li').length === 1")


def test_errors_in_words(page: Page, tmp_path: Path, scene):
    alert = page.get_by_role("alert")
    page.click("#find")
    assert "image" in alert.inner_text()
    (tmp_path / "notes.txt").write_text("no image")
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.wait_for_function("() => document.getElementById('error').textContent.includes('notes.txt')")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.wait_for_function("() => document.getElementById('error').textContent.includes('broken.png')")
    page.set_input_files("#file", scene[0])
    page.wait_for_selector("#view:visible")
    page.click("#find")
    assert "sentence" in alert.inner_text()


def test_what_the_server_refuses_is_said(browser: Browser, address: str, scene):
    """A refusal is a sentence on the page. (The browser logs its status, so the console is not watched here.)"""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.set_input_files("#file", scene[0])
    page.fill("#sentences", "long " * 100)
    page.click("#find")
    page.wait_for_function("() => document.getElementById('error').textContent.includes('300 characters')")
    assert page.is_enabled("#find")
    page.close()


def test_a_server_with_a_key(browser: Browser, running, segmenter: Segmenter, scene):
    """The browser asks for the key once, as a password; with it, the page works whole."""
    with running(segmenter, "scenes", ServeSettings(port=0), "schlüssel") as (host, port, _):
        for password, status in (("wrong", 401), ("schlüssel", 200)):
            context = browser.new_context(http_credentials={"username": "me", "password": password})
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            answer = page.goto(f"http://{host}:{port}/")
            assert answer is not None
            assert answer.status == status
            if status == 200:
                page.wait_for_selector("#examples button")
                upload(page, scene)
                assert page.inner_text("#error") == ""
            context.close()


def test_a_page_of_another_site_cannot_use_the_server(browser: Browser, address: str):
    """A form that posts itself, from another origin on this machine."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.route(
        "http://other.localhost/",
        lambda route: route.fulfill(
            content_type="text/html",
            body=f'<form method="post" enctype="multipart/form-data" action="{address}v1/segment">'
            '<input name="sentences" value="red"><button>Go</button></form>',
        ),
    )
    page.goto("http://other.localhost/")
    with page.expect_response("**/v1/segment") as answer:
        page.click("button")
    assert answer.value.status == 403
    context.close()


def test_a_long_job_shows_progress_and_can_be_stopped(page: Page, scene):
    """Sentences are sent in parts, and the page counts them."""
    held = []
    page.route("**/v1/segment", lambda route: held.append(route))
    page.set_input_files("#file", scene[0])
    page.fill("#sentences", "\n".join(f"red star {nth}" for nth in range(12)))
    page.click("#find")
    page.wait_for_selector("#progress:visible")
    page.wait_for_function("() => document.getElementById('words').textContent === 'Looking for 12 sentences'")
    held.pop().continue_()
    page.wait_for_function("() => document.getElementById('words').textContent === '8 of 12 sentences done'")
    assert page.evaluate("document.getElementById('bar').value") == pytest.approx(8 / 12)
    page.click("#stop")
    assert page.is_hidden("#progress")
    assert page.is_enabled("#find")
    assert page.is_hidden("#results")


@pytest.mark.parametrize(
    "page", [{"viewport": {"width": 360, "height": 740}, "has_touch": True}], indirect=True, ids=["phone"]
)
def test_on_a_phone(page: Page, scene):
    upload(page, (scene[0], [*scene[1], "averyveryverylongwordwithoutanyspaces" * 3]))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    drawn = canvas(page)
    page.tap(".word >> nth=1")
    assert changed(drawn, canvas(page)) > 0.9
    box = page.locator("#view").bounding_box()
    assert box is not None
    assert -1 <= box["y"] < 400  # the image is in sight while a word is touched
    page.tap(".word >> nth=1")


@pytest.mark.parametrize(
    "page",
    [{}, {"color_scheme": "dark"}],
    indirect=True,
    ids=["light", "dark"],
)
def test_names_and_contrast(page: Page, scene):
    """Every control has a name; text stands out from its ground by 4.5 to 1."""
    upload(page, scene)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select, canvas, img, a')]
        .filter(e => e.offsetParent && !(e.ariaLabel || e.getAttribute('aria-label') || e.alt || e.innerText?.trim()
          || e.labels?.length || e.querySelector?.('img[alt]')))
        .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    poor = page.evaluate(
        """() => {
        const rgb = c => { const p = c.match(/[\\d.]+/g).map(Number); return p; };
        const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const lum = c => { const [r, g, b] = c.map(linear);
          return .2126 * r + .7152 * g + .0722 * b; };
        const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
          if (c.length === 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
        const bad = [];
        for (const e of document.querySelectorAll('body *')) {
          if (!e.offsetParent || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
          const [a, b] = [lum(rgb(getComputedStyle(e).color).slice(0, 3)), lum(ground(e))].sort((x, y) => y - x);
          if ((a + .05) / (b + .05) < 4.5) bad.push(e.outerHTML.slice(0, 80));
        }
        return bad; }"""
    )
    assert poor == []
