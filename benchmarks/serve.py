"""Load test of `cmmasksd serve`: errors, latency and throughput with a full queue, with and without batching.

    python benchmarks/serve.py                                # the shipped model, 32 clients, at most two minutes
    python benchmarks/serve.py --clients 8 --requests 64 --turns 3 --out serve.json

It starts and stops its own servers on free loopback ports. One batches up to 8 requests, the other computes each alone;
they take turns, A B A B …, because times drift with the machine's load. Then three times as many clients as the queue
holds send requests to the first: every response must be a mask or 429.
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
    """A server process and its address."""
    command = [sys.executable, "-m", "cmmasksd", "serve", "--model", model, "--port", "0", "--queue", str(queue)]
    command += ["--connections", str(8 * queue)]  # one address may hold half of them
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = re.search(r"http://\S+", process.stdout.readline())
    if not address:
        raise SystemExit("the server did not start")
    return process, address[0]


def scene_files(count: int) -> list[tuple[bytes, list[str]]]:
    """Scenes as PNG files, with their sentences."""
    scenes = []
    data = SceneDataset("scenes", "val", count, seed=0)
    for reference in data:
        file = io.BytesIO()
        Image.fromarray(data.image(reference)).save(file, "PNG")
        scenes.append((file.getvalue(), [expression.text for expression in reference.expressions]))
    return scenes


async def load(address: str, clients: int, requests: int, until: float) -> tuple[list[float], Counter, float]:
    """Send requests from clients that wait for each response.

    Args:
        address: address of the server.
        clients: number of clients.
        requests: number of requests of all clients together.
        until: time (`time.monotonic`) after which no request is sent.

    Returns:
        Seconds of each request, number of responses by status, and seconds of the whole load.
    """
    indices, times, statuses = iter(range(requests)), [], Counter()
    scenes = scene_files(16)

    async def send(client: httpx.AsyncClient) -> None:
        for index in indices:
            if time.monotonic() > until:
                return
            image, sentences = scenes[index % len(scenes)]
            began = time.monotonic()
            try:
                response = await client.post("v1/segment", files={"image": image}, data={"sentences": sentences})
                statuses[str(response.status_code)] += 1
            except httpx.HTTPError as error:
                statuses[type(error).__name__] += 1
            times.append(time.monotonic() - began)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        began = time.monotonic()
        await asyncio.gather(*(send(client) for _ in range(clients)))
        return times, statuses, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes", help="model to serve (default: %(default)s)")
    parser.add_argument(
        "--clients",
        type=int,
        default=32,
        help="number of concurrent clients and length of the queue (default: %(default)s)",
    )
    parser.add_argument("--requests", type=int, default=96, help="requests per turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="turns per server (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=120, help="seconds after which no request is sent (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    servers = {}
    try:
        for name, arguments in ARMS.items():
            servers[name] = start(options.model, options.clients, arguments)
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
        overload = asyncio.run(
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
    ratios = [batched["per_second"] / alone["per_second"] for batched, alone in pairs]
    print(f"batched / one by one, throughput: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    errors = sum(count for status, count in total.items() if status != "200")
    print(f"{options.clients} clients: {sum(total.values())} requests, {errors} errors")
    print(f"{3 * options.clients} clients, more than the queue holds: {dict(overload)}")
    if options.out:
        figures = {"clients": options.clients, "turns": turns, "throughput_ratios": ratios, "over_the_bound": overload}
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return int(errors > 0 or bool(set(overload) - {"200", "429"}))


if __name__ == "__main__":
    sys.exit(main())
