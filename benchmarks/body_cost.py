"""What a body costs the API process: how long its event loop stands still, and how much memory it takes at its peak.

    python benchmarks/body_cost.py [--mib 3] [--routes completions grpc] [--json FILE] [--worst 2]

Every route is sent bodies that are long, wide and deep (tests/support/costly_bodies.py), one at a time, each twice: the
cheaper run counts. Stall: how long the loop did nothing else, without the time that the machine was busy with others.
Memory: the peak of resident memory beyond what was held before (tests/support/measured_server.py), also over the
uncompressed size of the body.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support import costly_bodies as bodies
from tests.support.costly_bodies import Body
from tests.support.measured_server import MeasuredServer

MIB = 2**20
SECONDS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=3.0, help="size of a body, uncompressed")
    parser.add_argument("--routes", nargs="+", default=[*bodies.REST_ROUTES, "grpc"])
    parser.add_argument("--worst", type=int, default=1, help="rows a route: the bodies that cost most")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--deflate", action="store_true", help="send bodies of REST compressed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("TEST_SHARED_DIRECTORY", tempfile.mkdtemp(prefix="pagoda-body-cost-"))
    settings: dict[str, Any] = {}
    if options.max_model_len:
        settings["max_model_len"] = options.max_model_len
    rows = []
    print("| Route | Body | Answer | Stall, ms | Memory, MiB | Memory over body | Seconds |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for route in options.routes:
        measured = []
        server = None
        try:
            for name, body in bodies_of(route, int(options.mib * MIB), options):
                if server is None or server.process.poll() is not None:
                    if server is not None:
                        server.__exit__(None, None, None)
                    server = start(settings)
                try:
                    measured.append(
                        {"route": route, "body": name, "size": body.size, **cheapest(server, body, options.runs)}
                    )
                except Exception as error:
                    server.process.kill()
                    row = {"route": route, "body": name, "size": body.size, "answer": type(error).__name__}
                    measured.append({**row, "stall": float(SECONDS), "memory": 0, "seconds": float(SECONDS)})
        finally:
            if server is not None:
                server.__exit__(None, None, None)
        rows += measured
        by_stall = sorted(measured, key=lambda row: -row["stall"])[: options.worst]
        by_memory = sorted(measured, key=lambda row: -row["memory"] / row["size"])[: options.worst]
        for row in [*by_stall, *(row for row in by_memory if row not in by_stall)]:
            print(
                f"| {route} | {row['body']} | {row['answer']} | {row['stall'] * 1e3:.0f} | {row['memory'] / MIB:.0f} "
                f"| {row['memory'] / row['size']:.1f} | {row['seconds']:.1f} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def start(settings: dict[str, Any]) -> MeasuredServer:
    server = MeasuredServer(**settings)
    server.__enter__()
    server.wait_until_ready()
    return server


def bodies_of(route: str, size: int, options: argparse.Namespace) -> Iterator[tuple[str, Body]]:
    if route == "grpc":
        for name, make in bodies.GRPC.items():
            yield name, bodies.grpc_body("ModelInfer", make(size))
        yield "a name, to RepositoryIndex", bodies.grpc_body("RepositoryIndex", bodies.index_message(size))
        return
    for field in bodies.FIELDS[route]:
        for kind in bodies.VALUES:
            for end in ("", '"x"') if kind == "ids" else ('"x"',):
                body = bodies.rest_body(route, field, bodies.value(kind, size, end))
                yield f"{field}: {kind}{', then a string' if end else ''}", body.deflated() if options.deflate else body
        yield f"{field}: deep", bodies.rest_body(route, field, bodies.nested(size // 2))
    if route == "tokenize":
        text = bodies.value("digits", 20_000)
        yield "return_token_strs", bodies.rest_body(route, "prompt", text, return_token_strs=True)


def cheapest(server: MeasuredServer, body: Body, runs: int) -> dict[str, Any]:
    found = []
    for _ in range(runs):
        begun = time.monotonic()
        answer, cost = bodies.cost_of(server, body)
        found.append(
            {"answer": answer.status, "stall": cost.stall, "memory": cost.memory, "seconds": time.monotonic() - begun}
        )
    return {**min(found, key=lambda row: row["stall"]), "memory": min(row["memory"] for row in found)}


if __name__ == "__main__":
    main()
