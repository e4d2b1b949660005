"""Videos: made here, read back frame by frame, upright; damaged, oversized and disguised ones refused."""

import sys
from pathlib import Path

import numpy as np
import pytest

from cmmasksd.data import images
from cmmasksd.data.video import is_video, video_frames
from cmmasksd.errors import UserError

av = pytest.importorskip("av", reason="the extra data is not installed")

LEVELS = (20, 80, 140, 200)


def write_video(file: Path, *, codec: str = "mpeg4", size: tuple[int, int] = (48, 64)) -> Path:
    """A video of plain grey frames of LEVELS, whose left upper quarter is red."""
    with av.open(str(file), "w") as video:
        stream = video.add_stream(codec, rate=5)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for level in LEVELS:
            pixels = np.full((*size, 3), level, np.uint8)
            pixels[: size[0] // 2, : size[1] // 2] = 220, 20, 20
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)
    return file


@pytest.mark.parametrize("name", ["a.mp4", "b.MOV", "c.mkv", "d.avi"])
def test_frames_are_what_was_written(tmp_path: Path, name: str):
    file = write_video(tmp_path / name.lower()).rename(tmp_path / name)
    assert is_video(file)
    numbers, frames = zip(*video_frames(file), strict=True)
    assert numbers == (1, 2, 3, 4)
    for level, frame in zip(LEVELS, frames, strict=True):
        assert frame.shape == (48, 64, 3)
        assert frame.dtype == np.uint8
        assert abs(int(np.median(frame[24:])) - level) < 12
        red, green, _ = frame[4:20, 4:28].mean((0, 1))
        assert red > 180
        assert green < 60


def test_a_phone_held_upright(tmp_path: Path):
    """A quarter turn clockwise, as phones note it in the track's matrix."""
    content = bytearray(write_video(tmp_path / "a.mp4").read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes
    one, minus = (1 << 16).to_bytes(4, "big"), (-(1 << 16) & 0xFFFFFFFF).to_bytes(4, "big")
    zero, unit = bytes(4), (1 << 30).to_bytes(4, "big")
    assert content[at : at + 36] == one + zero * 3 + one + zero * 3 + unit
    content[at : at + 36] = zero + one + zero + minus + zero * 4 + unit
    (tmp_path / "b.mp4").write_bytes(content)
    _, frame = next(video_frames(tmp_path / "b.mp4"))
    assert frame.shape == (64, 48, 3)
    red = frame[..., 0].astype(int) - frame[..., 1]
    assert red[4:28, 28:44].min() > 100  # the red quarter went to the right
    assert abs(red[:, :20]).max() < 60


def test_what_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(file: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            list(video_frames(file))
        assert "\n" not in str(error.value)

    whole = write_video(tmp_path / "a.mp4")
    refused(tmp_path / "none.mp4", "does not exist")
    (tmp_path / "folder.mkv").mkdir()
    refused(tmp_path / "folder.mkv", "is not a file")
    (tmp_path / "text.mp4").write_text("no video")
    refused(tmp_path / "text.mp4", "does not decode after frame 0")
    (tmp_path / "empty.avi").write_bytes(b"")
    refused(tmp_path / "empty.avi", "does not decode")
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[:600])
    refused(tmp_path / "half.mp4", "no video stream: it is damaged")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n")
    refused(tmp_path / "list.mp4", "does not decode")
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
    refused(whole, "64x48 has more than")
    monkeypatch.setitem(sys.modules, "av", None)
    refused(whole, r"pip install 'cmmasksd\[data\]'")


def test_sound_alone(tmp_path: Path):
    with av.open(str(tmp_path / "a.mp4"), "w") as video:
        stream = video.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for packet in [*stream.encode(frame), *stream.encode()]:
            video.mux(packet)
    with pytest.raises(UserError, match="has only sound"):
        list(video_frames(tmp_path / "a.mp4"))
