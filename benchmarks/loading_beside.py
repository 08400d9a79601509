"""Time between tokens of a model that runs while another one of the server is loaded and unloaded, in ratio to that alone.

    python benchmarks/loading_beside.py MODEL [--other MODEL] [--rounds 4] [--streams 1] [--json FILE]

`pagoda serve` with two models, each an engine of its own with its part of the threads. Streams of the first one run all the
time; in turn nothing else happens, or the other one is loaded and unloaded over and over. Measured are the times between the
chunks of a stream, as a client on the same machine sees them: 50th, 90th and 99th percentile of each kind of turn, and their
ratios. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

BODY = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
PERCENTILES = (50, 90, 99)


def stream(url: str, kind: list[str], gaps: dict[str, list[float]], is_over: threading.Event) -> None:
    """Stream one answer after the other, and note each gap under the kind of turn that it began and ended in."""
    with httpx.Client(base_url=url, timeout=60) as client:
        while not is_over.is_set():
            with client.stream("POST", "/v1/completions", json={"model": "running", **BODY}) as answer:
                last, before = 0.0, ""
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.monotonic()
                    if last and before and before == kind[0]:
                        gaps[before].append(now - last)
                    last, before = now, kind[0]
                    if is_over.is_set():
                        return


def turns(url: str, rounds: int, seconds: float, kind: list[str]) -> list[float]:
    """Alternate; returns the seconds of each load."""
    loads: list[float] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for _ in range(rounds):
            kind[0] = "alone"
            time.sleep(seconds)
            kind[0] = "beside"
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                began = time.monotonic()
                client.post("/v2/repository/models/other/load").raise_for_status()
                loads.append(time.monotonic() - began)
                client.post("/v2/repository/models/other/unload").raise_for_status()
            kind[0] = ""
            time.sleep(0.5)
    return loads


def percentile(values: list[float], share: int) -> float:
    """The value below which so many percent lie."""
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--other")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = {"running": {"model": options.model}, "other": {"model": options.other or options.model}}
    command = [sys.executable, "-m", "pagoda.cli.main", "serve", "--models", json.dumps(models), "--load-models"]
    command += [
        "running",
        "--models-memory-bytes",
        "5GiB",
        "--host",
        "127.0.0.1",
        "--http-port",
        "0",
        "--grpc-port",
        "0",
    ]
    kind, gaps, is_over = [""], {"alone": [], "beside": []}, threading.Event()
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = ""
            while not url:
                time.sleep(0.1)
                if server.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                found = re.search(r"REST on (http://\S+)", Path(log.name).read_text())
                url = found[1] if found else ""
            while httpx.get(url + "/v2/health/ready").status_code != 200:
                time.sleep(0.1)
            streams = [threading.Thread(target=stream, args=(url, kind, gaps, is_over)) for _ in range(options.streams)]
            for one in streams:
                one.start()
            time.sleep(1.0)
            loads = turns(url, options.rounds, options.seconds, kind)
            is_over.set()
            for one in streams:
                one.join()
        finally:
            server.terminate()
            server.wait(30)
    found = {name: {share: percentile(values, share) for share in PERCENTILES} for name, values in gaps.items()}
    print(
        f"{len(loads)} loads, median {statistics.median(loads):.2f} s; gaps: { ({k: len(v) for k, v in gaps.items()}) }"
    )
    for share in PERCENTILES:
        alone, beside = found["alone"][share], found["beside"][share]
        print(f"p{share}: alone {1000 * alone:6.2f} ms, beside {1000 * beside:6.2f} ms, ratio {beside / alone:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"loads": loads, "gaps": found}))


if __name__ == "__main__":
    main()
