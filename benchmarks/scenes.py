"""Number of scenes that one core generates per second: layout and sentences alone, and with the rendered image.

    python benchmarks/scenes.py                       # train, 128 x 128
    python benchmarks/scenes.py --splits train testB --scene-size 200

Unusual here: it counts the CPU seconds of this process, so that other programs on the machine disturb it less, and
prints the best of a few rounds. Each round draws new scenes. A warm-up fills the caches of stencils and textures, which
a training run fills within its first second.
"""

import argparse
import time
from collections.abc import Callable

from cmmasksd.data.scenes import SPLITS, STYLES, make_scene, render


def rate(draw: Callable[[int], object], scenes: int, rounds: int) -> float:
    """Scenes per CPU second of the fastest round."""
    fastest = float("inf")
    for round_index in range(rounds):
        start = time.process_time()
        for index in range(round_index * scenes, (round_index + 1) * scenes):
            draw(index)
        fastest = min(fastest, time.process_time() - start)
    return scenes / fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200, help="scenes per round (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds, of which the fastest counts (default: %(default)s)"
    )
    parser.add_argument(
        "--scene-size", type=int, default=128, help="side of the images in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=["train"], help="splits to draw (default: train)"
    )
    options = parser.parse_args()

    def made(split: str, style: str) -> Callable[[int], object]:
        return lambda index: make_scene(1, split, index, style=style, scene_size=options.scene_size)

    def drawn(split: str, style: str) -> Callable[[int], object]:
        return lambda index: render(make_scene(1, split, index, style=style, scene_size=options.scene_size))

    for index in range(-200, 0):
        drawn("pretrain", "scenes+")(index)
    print(f"scenes per second on one core, {options.scene_size} x {options.scene_size}")
    print(f"{'style':8} {'split':8} {'layout + sentences':>18} {'with the image':>15}")
    for style in STYLES:
        for split in options.splits:
            rates = [rate(work(split, style), options.scenes, options.rounds) for work in (made, drawn)]
            print(f"{style:8} {split:8} {rates[0]:18.0f} {rates[1]:15.0f}", flush=True)


if __name__ == "__main__":
    main()
