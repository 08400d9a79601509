"""How long one API key's short request takes while another key floods the server, over REST, in ratio to its time alone.

    python benchmarks/two_keys.py MODEL [--floods running choices tokenize priority] [--rounds 5] [--json FILE]

`pagoda serve MODEL` with two keys, one connection a request. The other key sends, as much at once as it is let:

    running    400 requests of up to 1900 tokens
    choices    40 requests of n=64 choices
    tokenize   3000 requests to /tokenize, of 20 KB each
    priority   400 requests of up to 1900 tokens with priority -2^31, under --scheduling-policy priority

Measured is a completion of 8 tokens of the quiet key: the median of some alone, then of some under the flood, and the longest
step, as the server's time between tokens under the flood shows it. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from pagoda.platform.hardware import cpu_report

LOUD, QUIET = "loud-key-of-the-flood", "quiet-key-of-the-other"
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}
FLOODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "running": ("/v1/completions", 400, LONG),
    "choices": ("/v1/completions", 40, {**LONG, "n": 64}),
    "tokenize": ("/tokenize", 3000, {"prompt": "Once upon a time there was a server. " * 550}),
    "priority": ("/v1/completions", 400, {**LONG, "priority": -(2**31)}),
}
SETTLE_SECONDS = 5.0


async def short_request(client: httpx.AsyncClient, num_tokens: int = 8) -> float:
    """Seconds of a completion."""
    began = time.monotonic()
    body = {"prompt": "The capital of France is", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {QUIET}"})
    answer.raise_for_status()
    return time.monotonic() - began


async def flood(url: str, path: str, count: int, body: dict[str, Any], statuses: dict[int, int]) -> None:
    """Send so many at once; for /tokenize, again until this is cancelled. `statuses`: how many answers had which."""
    content = json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {LOUD}", "Content-Type": "application/json"}

    async def one(session: aiohttp.ClientSession) -> None:
        while True:
            with suppress(aiohttp.ClientError):
                async with session.post(url + path, data=content, headers=headers) as answer:
                    await answer.read()
                    statuses[answer.status] = statuses.get(answer.status, 0) + 1
            if path != "/tokenize":
                return

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(one(session) for _ in range(count)))


def flooding(url: str, path: str, count: int, body: dict[str, Any], ends: Connection) -> None:
    """A process of its own, until it is told to end; like a client elsewhere it takes no processor from the server."""
    os.nice(19)

    async def run() -> None:
        statuses: dict[int, int] = {}
        task = asyncio.create_task(flood(url, path, count, body, statuses))
        await asyncio.to_thread(ends.recv)
        task.cancel()
        await asyncio.wait([task])
        ends.send(statuses)

    asyncio.run(run())


async def measure(url: str, path: str, count: int, body: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Medians alone and under the flood, and the length of a step under it: of 16 tokens less of 8, over 8."""
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        for _ in range(3):
            await short_request(client)
        alone = statistics.median([await short_request(client) for _ in range(rounds)])
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=flooding, args=(url, path, count, body, theirs), daemon=True
        )
        process.start()
        await asyncio.sleep(SETTLE_SECONDS)
        flooded = [await short_request(client) for _ in range(rounds)]
        longer = statistics.median([await short_request(client, 16) for _ in range(rounds)])
        ours.send("end")
        statuses = await asyncio.to_thread(ours.recv)
        process.join()
    median = statistics.median(flooded)
    step = max(0.0, (longer - median) / 8)
    return {
        "alone_seconds": round(alone, 4),
        "flooded_seconds": round(median, 4),
        "flooded_longest_seconds": round(max(flooded), 4),
        "step_seconds": round(step, 4),
        "ratio": round(median / alone, 2),
        "ratio_less_a_step": round((median - step) / alone, 2),
        "statuses": statuses,
    }


@asynccontextmanager
async def server(model: str, *arguments: str) -> AsyncIterator[str]:
    """`pagoda serve`; its URL."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, "-m", "pagoda.cli.main", "serve", model, "--host", "127.0.0.1", "--http-port", "0"]
        command += ["--grpc-port", "0", "--max-connections-per-peer", "8192", "--max-connections", "8192", *arguments]
        environment = {**os.environ, "PAGODA_API_KEYS": f"{LOUD},{QUIET}"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while "is ready" not in Path(log.name).read_text():
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text())
                await asyncio.sleep(0.1)
            found = re.search(r"REST on (http://\S+:\d+)", Path(log.name).read_text())
            assert found is not None
            yield found[1]
        finally:
            process.terminate()
            process.wait()


async def run(options: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for name in options.floods:
        policy = ["--scheduling-policy", "priority"] if name == "priority" else []
        async with server(options.model, *policy, *options.serve) as url:
            results[name] = await measure(url, *FLOODS[name], rounds=options.rounds)
        print(json.dumps({name: results[name]}), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--floods", nargs="+", choices=FLOODS, default=list(FLOODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs="*", default=[], help="further arguments of pagoda serve, as =--name=value")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.serve = [argument.removeprefix("=") for argument in options.serve]
    load = os.getloadavg()
    results = asyncio.run(run(options))
    if options.json:
        report = {"machine": str(cpu_report()), "load_average": load, "model": options.model, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
