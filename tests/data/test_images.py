"""read_image: every colour mode becomes RGB, EXIF only when asked for, damaged and oversized files are named."""

import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from cmmasksd.data import images
from cmmasksd.data.images import read_image
from cmmasksd.errors import UserError

RED = (200, 30, 40)


def save(path, image, **options):
    image.save(path, **options)
    return path


def noise(height=24, width=32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_comes_back_exactly_from_path_text_and_bytes(tmp_path):
    pixels = noise()
    path = save(tmp_path / "a.png", Image.fromarray(pixels))
    for source in (path, str(path), path.read_bytes()):
        read = read_image(source)
        np.testing.assert_array_equal(read, pixels)
        assert read.dtype == np.uint8
        assert read.flags.writeable


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 100 * 256, dtype=np.uint16))
        expected = np.full((4, 6, 3), 100)
    else:
        image = Image.new("RGB", (6, 4), RED).convert(mode)
        expected = np.asarray(image.convert("RGB"))
        assert expected.any(), "a black image would look right in any mode"
    path = save(tmp_path / f"a.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}", image)
    assert Image.open(path).mode in (mode, "RGB" if mode == "YCbCr" else mode)  # Pillow before 13 converts that one
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF"])  # MPO: what many telephones write
def test_every_common_format_is_opened(tmp_path, kind):
    path = save(tmp_path / "a", Image.new("RGB", (6, 4), RED), format=kind)
    np.testing.assert_allclose(read_image(path), np.full((4, 6, 3), RED), atol=3)


def test_transparent_pixels_show_white_not_what_lies_beneath(tmp_path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (*RED, 255)
    read = read_image(save(tmp_path / "a.png", Image.fromarray(pixels)))
    assert read.tolist() == [[list(RED), [255] * 3], [[255] * 3, [255] * 3]]


def test_exif_orientation_only_when_asked_for(tmp_path):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # stored with the white bar at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise to view"
    path = save(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(read_image(path), pixels)
    np.testing.assert_array_equal(read_image(path, exif=True), np.rot90(pixels, -1))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jpg does not exist"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="is not a file"):
        read_image(tmp_path)


def test_damaged_files_are_named_in_one_line(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(UserError, match=r"cut\.jpg does not decode: damaged .*truncated"):
        read_image(cut)
    text = tmp_path / "text.jpg"
    text.write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"text\.jpg does not decode: not an image"):
        read_image(text)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(UserError, match="not an image") as caught:
        read_image(tmp_path / "empty.jpg")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the image's content does not decode"):
        read_image(b"nothing")


def test_postscript_is_not_opened(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (4, 4)), format="EPS")
    assert Image.open(path).format == "EPS", "Pillow would, by starting Ghostscript"
    with pytest.raises(UserError, match="not an image"):
        read_image(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\x00\x00\x00") + chunk(b"IDAT", zlib.compress(b"0"))


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (10_000, 10_000), (60_000, 60_000)])
def test_image_bombs_are_refused_before_they_unpack(width, height):
    # The three lie below Pillow's own limits, between its warning and its error, and above its error.
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="more than 64 megapixels"):
            read_image(png_header(width, height))
    assert not heard, "one line is said, by the error"


@pytest.mark.parametrize(
    ("width", "height", "why"),
    [(1, 24_000_000, "side above 32768"), (40_000, 900, "side above 32768"), (3, 301, "ratio above 100")],
)
def test_long_and_narrow_images_are_refused_before_they_unpack(width, height, why):
    with pytest.raises(images.ImageTooLarge, match=f"of {width}x{height} has .*{why}"):
        read_image(png_header(width, height))
    with pytest.raises(images.ImageTooLarge, match=why):
        images.as_pixels(np.zeros((height, width), np.uint8))
    images.require_bounded(300, 3, "an image of the ratio itself")


def test_the_limit_itself_is_allowed(monkeypatch):
    content = io.BytesIO()
    Image.fromarray(noise(6, 10)).save(content, "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 60)
    assert read_image(content.getvalue()).shape == (6, 10, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 59)
    with pytest.raises(UserError, match="of 10x6 has more than"):
        read_image(content.getvalue())


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_frames_of_an_animation(tmp_path, name):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = (Image.new("RGB", (9, 7), colour) for colour in colours)
    first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
    numbers, found = zip(*images.read_frames(tmp_path / name), strict=True)
    assert numbers == (1, 2, 3)
    assert [frame.shape for frame in found] == [(7, 9, 3)] * 3
    assert [tuple(frame[3, 3].tolist()) for frame in found] == colours
    assert len(list(images.read_frames((tmp_path / name).read_bytes()))) == 3
    np.testing.assert_array_equal(images.read_image(tmp_path / name), found[0])


def test_pages_are_no_frames(tmp_path):
    page = Image.new("RGB", (9, 7), "red")
    page.save(tmp_path / "a.tiff", save_all=True, append_images=[page, page])
    assert [number for number, _ in images.read_frames(tmp_path / "a.tiff")] == [None]


def test_an_animation_that_is_cut_off_gives_its_first_frames(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 40), dtype=np.uint8)
    first, *others = (Image.fromarray(frame) for frame in noise)
    first.save(tmp_path / "a.png", save_all=True, append_images=others)
    content = (tmp_path / "a.png").read_bytes()
    frames = images.read_frames(content[: len(content) * 2 // 3])
    assert next(frames)[1].shape == (40, 40, 3)
    with pytest.raises(UserError, match="damaged"):
        list(frames)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_image_in_any_form_is_the_same_image(tmp_path, mode):
    image = Image.effect_mandelbrot((12, 10), (-2, -2, 2, 2), 20).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize((12, 10)))
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    wanted = read_image(tmp_path / "a.png")
    ways = [tmp_path / "a.png", str(tmp_path / "a.png"), content, bytearray(content), memoryview(content)]
    for way in [*ways, io.BytesIO(content), image, np.asarray(image)]:
        np.testing.assert_array_equal(images.as_pixels(way), wanted)
    with (tmp_path / "a.png").open("rb") as file:
        np.testing.assert_array_equal(images.as_pixels(file), wanted)


def test_what_is_no_image(tmp_path, monkeypatch):
    def refused(message, image):
        with pytest.raises(UserError, match=message):
            images.as_pixels(image)

    for url in ("https://example.org/a.png", "file:///a.png", "data:image/png;base64,AAAA", "S3://a/b.jpg"):
        refused("is a URL, and nothing is downloaded here", url)
    refused("NoneType is not an image", None)
    refused("list is not an image", [[1]])
    refused("mode 'rb'", io.StringIO("text"))
    refused("not an image", b"text")
    refused("32 bits", Image.new("F", (3, 3)))
    refused(r"not \(3, 3, 3\) float64: .*astype\('uint8'\)", np.zeros((3, 3, 3)))
    refused(r"not \(3, 3, 2\) uint8", np.zeros((3, 3, 2), np.uint8))
    refused("uint16", np.zeros((3, 3), np.uint16))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    refused("damaged", Image.open(io.BytesIO(content[: len(content) // 2])))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    for image in (content, Image.open(io.BytesIO(content)), np.zeros((40, 40), np.uint8)):
        refused("of 40x40 has more than", image)
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    refused("more than", io.BytesIO(content))
