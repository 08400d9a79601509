"""CPU time of the API process for each short request: on connections that are kept, and on a new one each.

    python benchmarks/short_requests.py [--runtime BEFORE AFTER] [--rounds 5] [--seconds 1.5] [--clients 8]

The servers are those of api_overhead.py. What is measured is what a request costs apart from its tokens: reading it, the
layers of the application, writing the response.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import time
from pathlib import Path

from api_overhead import Server

BODY = b'{"prompt":"Once upon a time"}'
HEAD = b"Host: localhost:8080\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nUser-Agent: x\r\n"
REQUESTS = {
    "health": b"GET /v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "tokenize": b"POST /tokenize HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (HEAD, len(BODY), BODY),
}
KINDS = (("health", False), ("tokenize", False), ("health", True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", type=Path, nargs="+", help="folders with a package `pagoda` to compare, in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a window")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    runtimes = options.runtime or [None]
    servers = [Server(1, runtime) for runtime in runtimes]
    try:
        print("| Request | Connection | Runtime | µs CPU a request | requests/s |\n|---|---|---|---:|---:|")
        for request, is_new in KINDS:
            taken: list[list[tuple[float, float]]] = [[] for _ in servers]
            for _ in range(options.rounds):
                for server, samples in zip(servers, taken, strict=True):
                    samples.append(measure(server, REQUESTS[request], is_new, options.seconds, options.clients))
            for runtime, samples in zip(runtimes, taken, strict=True):
                cost, rate = (statistics.median(values) for values in zip(*samples, strict=True))
                name = "installed" if runtime is None else runtime
                print(f"| {request} | {'new' if is_new else 'kept'} | {name} | {cost:.0f} | {rate:.0f} |")
    finally:
        for server in servers:
            server.close()


def measure(server: Server, request: bytes, is_new: bool, seconds: float, num_clients: int) -> tuple[float, float]:
    """Microseconds of CPU a request, and requests a second."""
    cpu, started = server.cpu_seconds(), time.monotonic()
    num_requests = asyncio.run(ask(server.port, request, is_new, started + seconds, num_clients))
    return (server.cpu_seconds() - cpu) / num_requests * 1e6, num_requests / (time.monotonic() - started)


async def ask(port: int, request: bytes, is_new: bool, end: float, num_clients: int) -> int:
    """How many requests the clients have sent, each its next one when the last was answered."""
    counts = await asyncio.gather(*(client(port, request, is_new, end) for _ in range(num_clients)))
    return sum(counts)


async def client(port: int, request: bytes, is_new: bool, end: float) -> int:
    num_answers = 0
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            writer.write(request)
            length = re.search(rb"content-length: (\d+)", await reader.readuntil(b"\r\n\r\n"))
            assert length is not None
            await reader.readexactly(int(length[1]))
            num_answers += 1
            if is_new:
                break
        writer.close()
    return num_answers


if __name__ == "__main__":
    main()
