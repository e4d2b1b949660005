"""What `cmmasksd serve` bears: errors, times and throughput with as many clients as its queue holds, with and without
batching.

    python benchmarks/serve.py                                # the model that ships, 32 clients, two minutes at most
    python benchmarks/serve.py --clients 8 --requests 64 --turns 3 --out serve.json

It starts its own servers on free ports of the loopback and ends them. One computes up to 8 requests together, one
computes each alone; they take turns, A B A B …, because times of a machine drift with its load. Then twice as many
clients as the queue holds ask the first: every answer must be a mask or "come again" (429).
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image

from cmmasksd.data.scenes import SceneDataset

ARMS = {"batched": ["--max_batch", "8"], "one by one": ["--max_batch", "1", "--max_wait", "0"]}


def start(model: str, queue: int, options: list[str]) -> tuple[subprocess.Popen, str]:
    """A server of its own process, and its address."""
    command = [sys.executable, "-m", "cmmasksd", "serve", "--model", model, "--port", "0", "--queue", str(queue)]
    command += ["--connections", str(8 * queue)]  # of which all clients, at one address, get half
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    if not found:
        raise SystemExit("the server did not start")
    return process, found[0]


def pictures(count: int) -> list[tuple[bytes, list[str]]]:
    """Scenes as PNG files, with their sentences."""
    data, made = SceneDataset("scenes", "val", count, seed=0), []
    for reference in data:
        file = io.BytesIO()
        Image.fromarray(data.image(reference)).save(file, "PNG")
        made.append((file.getvalue(), [expression.text for expression in reference.expressions]))
    return made


async def load(address: str, clients: int, requests: int, until: float) -> tuple[list[float], Counter, float]:
    """Clients that ask again as soon as they are answered: seconds of each answer, statuses, seconds of all."""
    work, times, statuses = iter(range(requests)), [], Counter()
    scenes = pictures(16)

    async def one(client: httpx.AsyncClient) -> None:
        for nth in work:
            if time.monotonic() > until:
                return
            image, sentences = scenes[nth % len(scenes)]
            began = time.monotonic()
            try:
                answer = await client.post("v1/segment", files={"image": image}, data={"sentences": sentences})
                statuses[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                statuses[type(error).__name__] += 1
            times.append(time.monotonic() - began)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        began = time.monotonic()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return times, statuses, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--clients", type=int, default=32, help="at once; also the length of the queue")
    parser.add_argument("--requests", type=int, default=96, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120, help="after which no new request is sent")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    servers = {}
    try:
        for name, given in ARMS.items():
            servers[name] = start(options.model, options.clients, given)
        for _, address in servers.values():
            asyncio.run(load(address, 2, 8, time.monotonic() + 60))  # warm
        until = time.monotonic() + options.seconds
        turns: dict[str, list[dict]] = {name: [] for name in ARMS}
        for _ in range(options.turns):
            for name, (_, address) in servers.items():
                times, statuses, seconds = asyncio.run(load(address, options.clients, options.requests, until))
                if len(times) < 2:
                    continue
                ordered = statistics.quantiles(times, n=20, method="inclusive")
                turns[name].append(
                    {"p50": ordered[9], "p95": ordered[18], "per_second": len(times) / seconds, "statuses": statuses}
                )
        over = asyncio.run(
            load(servers["batched"][1], 3 * options.clients, options.requests, time.monotonic() + options.seconds)
        )[1]
    finally:
        for process, _ in servers.values():
            process.terminate()
        for process, _ in servers.values():
            process.wait(60)
    total = sum((turn["statuses"] for arm in turns.values() for turn in arm), Counter())
    for name, arm in turns.items():
        middle = {key: statistics.median(turn[key] for turn in arm) for key in ("p50", "p95", "per_second")}
        print(
            f"{name:11}  p50 {1e3 * middle['p50']:6.0f} ms  p95 {1e3 * middle['p95']:6.0f} ms  "
            f"{middle['per_second']:6.1f} requests/s  (median of {len(arm)} turns)"
        )
    pairs = zip(turns["batched"], turns["one by one"], strict=False)
    ratios = [one["per_second"] / other["per_second"] for one, other in pairs]
    print(f"batched / one by one, throughput: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    errors = sum(count for status, count in total.items() if status != "200")
    print(f"{options.clients} clients: {sum(total.values())} requests, {errors} errors")
    print(f"{3 * options.clients} clients, more than the queue holds: {dict(over)}")
    if options.out:
        figures = {"clients": options.clients, "turns": turns, "throughput_ratios": ratios, "over_the_bound": over}
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return int(errors > 0 or bool(set(over) - {"200", "429"}))


if __name__ == "__main__":
    sys.exit(main())
