"""The command line as a function, and what its tests share."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from cmmasksd import cli

METRICS = ["oIoU", "mIoU", "P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9"]


SCENES = ["--references", "6", "--scene_size", "64"]


def main(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def photo(file: Path, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    frames = [Image.fromarray(np.roll(pixels, nth)) for nth in range(3 if file.suffix == ".gif" else 1)]
    frames[0].save(file, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}))
