"""Frames of video files, read and written by PyAV (the extra `data`).

What is unusual: the file's suffix chooses the container and we open the file, so that a playlist in disguise cannot
make FFmpeg open other files or addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeGuard

import numpy as np

from cmmasksd.data.images import require_bounded, require_file
from cmmasksd.errors import UserError
from cmmasksd.files import whole_file

CONTAINERS = {".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}
"""FFmpeg's names of the containers, by the suffixes of videos."""


def is_video(source: Path | bytes) -> TypeGuard[Path]:
    """Whether a source is the path of a video, by its suffix."""
    return isinstance(source, Path) and source.suffix.lower() in CONTAINERS


def video_frames(file: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The frames of a video file's first video stream, upright.

    Args:
        file: path with a suffix of CONTAINERS.

    Yields:
        The frame's number from 1 and its pixels, (H, W, 3) uint8.

    Raises:
        UserError: the file is missing or damaged, its frames are too large, or PyAV is not installed.
    """
    try:
        from av import open as open_container
        from av.error import FFmpegError
    except ImportError:
        raise UserError("videos are read by the package av: pip install 'cmmasksd[data]'") from None
    require_file(file, f"video {file}")
    container, number = CONTAINERS[file.suffix.lower()], 0
    try:
        with (
            file.open("rb") as content,
            open_container(content, "r", format=container, options={"protocol_whitelist": "none"}) as video,
        ):
            if not video.streams.video:
                raise UserError(f"video {file} has no video stream: it is damaged, or has only sound")
            stream = video.streams.video[0]
            require_bounded(stream.width, stream.height, f"video {file}")
            for frame in video.decode(stream):
                require_bounded(frame.width, frame.height, f"video {file}")  # a stream may change its size
                number += 1
                pixels = frame.to_ndarray(format="rgb24")
                # both count counterclockwise
                yield number, np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    except FFmpegError as error:
        raise UserError(
            f"video {file} does not decode after frame {number} ({error.strerror}): check the file"
        ) from error
    if not number:
        raise UserError(f"video {file} has no frame: check the file")


def frame_rate(file: Path) -> Fraction:
    """Mean number of frames per second of a video that `video_frames` reads; 25 if the file does not say."""
    from av import open as open_container

    options = {"protocol_whitelist": "none"}
    with (
        file.open("rb") as content,
        open_container(content, "r", format=CONTAINERS[file.suffix.lower()], options=options) as video,
    ):
        return video.streams.video[0].average_rate or Fraction(25)


def write_video(file: Path, frames: Iterable[np.ndarray], rate: Fraction) -> None:
    """Write an MP4 file, frame by frame. H.264 where the installed PyAV has it, else MPEG-4.

    Args:
        file: the file; its folder exists.
        frames: (H, W, 3) uint8. All get the size of the first, whose odd sides lose a pixel.
        rate: frames per second.
    """
    from av import VideoFrame, codecs_available
    from av import open as open_container

    codec = "libx264" if "libx264" in codecs_available else "mpeg4"
    with whole_file(file) as part, open_container(str(part), "w", format="mp4") as video:
        stream = video.add_stream(codec, rate=rate.limit_denominator(65535))
        for number, pixels in enumerate(frames):
            if number == 0:
                stream.height, stream.width = (max(2, side // 2 * 2) for side in pixels.shape[:2])
                stream.pix_fmt = "yuv420p"
            frame = VideoFrame.from_ndarray(pixels, format="rgb24")
            video.mux(stream.encode(frame.reformat(stream.width, stream.height, "yuv420p")))
        video.mux(stream.encode(None))
