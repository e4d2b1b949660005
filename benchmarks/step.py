"""Time of a training step at the method's full size, with and without the masked branches.

    python benchmarks/step.py                                          # CLIP ViT-B/16 at 480 x 480
    python benchmarks/step.py --batch 16 --precision bf16 --out step.json   # on a GPU

Arms: no masked branch, LMVSD alone, VMLSD alone, both, and two full passes as in MaskRIS. Times drift with the
machine's load, so the arms take turns, A B C … A B C …, and each arm's time is reported relative to the plain arm's in
the same turn: the median and all turns. Weights are random, since the time does not depend on them.

Unusual here: a step is forward and backward only. The update takes the same time for every arm and batch size; with the
batch of one image that fits a small machine, it would hide the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPConfig

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.model.configuration import CMMaskSDConfig
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.towers.base import Tokens

ARMS = {
    "none": DistillationConfig(vision=False, language=False),
    "LMVSD": DistillationConfig(language=False),
    "VMLSD": DistillationConfig(vision=False),
    "both": DistillationConfig(),
    "two full passes": DistillationConfig(
        joint=True, vision_which="random", language_which="random", vision_level="blank", ground_truth=1.0
    ),
}


class Step:
    """A training step of one arm: forward and backward."""

    def __init__(self, model: CMMaskSDModel, distillation: DistillationConfig, options: argparse.Namespace) -> None:
        self.device, self.bf16 = torch.device(options.device), options.precision == "bf16"
        self.objective = MaskedSelfDistillation(model, distillation, model.config.encoder.joint_width).to(self.device)
        words = torch.arange(options.words).expand(options.batch, -1)
        ends = torch.full((options.batch, 1), -1)
        word_ids = torch.cat([ends, words, ends], dim=1)
        ids = torch.randint(0, 40_000, word_ids.shape)
        self.tokens = Tokens(ids, torch.ones_like(ids), word_ids, torch.zeros(options.batch, dtype=torch.bool))
        self.tokens = self.tokens.to(self.device)
        side = options.size // 4
        self.images = torch.randn(options.batch, 3, options.size, options.size, device=self.device)
        self.target = (torch.rand(options.batch, side, side, device=self.device) > 0.9).float()

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self.images, self.tokens, self.target)["loss"]
        loss.backward()
        self.objective.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Seconds of one step, including the work it queued on the device."""
        self._wait()
        begin = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - begin

    def flops(self) -> int:
        """FLOPs of forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=480, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=1, help="number of images, with one sentence each (default: %(default)s)"
    )
    parser.add_argument("--words", type=int, default=8, help="words per sentence (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="number of turns (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to time (default: all)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="autocast (default: float32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    clip = CLIPConfig(vision_config={"patch_size": 16})  # the rest of the defaults are ViT-B's
    model = CMMaskSDModel(
        CMMaskSDConfig(clip_config=clip, decoder_width=512, decoder_heads=8, decoder_mlp=1024, head_width=256)
    )
    chosen = dict.fromkeys(["none", *options.arms])  # the others are reported relative to it
    steps = {arm: Step(model, ARMS[arm], options) for arm in chosen}
    flops = {arm: step.flops() for arm, step in tqdm(steps.items(), desc="warm-up")}
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    for _ in tqdm(range(options.turns), desc="turns"):
        for arm, step in steps.items():
            times[arm].append(step.seconds())
    print(f"{'arm':16}{'step':>10}{'x none':>9}{'all turns':>24}{'TFLOP':>9}{'x none':>9}{'TFLOP/s':>10}")
    figures = {}
    for arm, seconds in times.items():
        ratios = [arm_time / plain for arm_time, plain in zip(seconds, times["none"], strict=True)]
        median, ratio, tflop = statistics.median(seconds), statistics.median(ratios), flops[arm] / 1e12
        figures[arm] = {"seconds": seconds, "ratios": ratios, "ratio": ratio}
        figures[arm] |= {"tflop": tflop, "tflop_per_s": tflop / median}
        turns = " ".join(f"{ratio:.2f}" for ratio in ratios[:4])
        share = flops[arm] / flops["none"]
        print(f"{arm:16}{median:9.3f}s{ratio:9.2f}{turns:>24}{tflop:9.3f}{share:9.2f}{tflop / median:10.3f}")
    if options.out is not None:
        machine = {"device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu"}
        machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        settings = {"size": options.size, "batch": options.batch, "words": options.words, "dtype": options.precision}
        options.out.write_text(json.dumps(machine | settings | {"arms": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
