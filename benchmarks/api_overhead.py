"""CPU time of the API process for each token it streams, in front of an engine that costs nothing.

    python benchmarks/api_overhead.py [--protocols chat grpc infer …] [--streams 1 16 128 256] [--json FILE]

The server is `pagoda serve` as shipped; only its engine's process is replaced, by one that gives every running request the
next token of a text, all requests together at `--rate` tokens a second. What is measured is user and system time of the API
process, all its threads, from /proc, in a window in which every request is under way (`whole`: answers in one piece, which are
still being made). The clients are a process of their own. Events are fewer than tokens where a character has several tokens.
`infer` is calls of gRPC's ModelInfer for one token, one after the other of each client: a token is a call, and `--rate` is to
be so high that they do not wait for it. A rate that the API process cannot hold (`--rate 60000`) gives its throughput instead;
tokens of one request that wait then share an event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import queue
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

PROTOCOLS = ("chat", "completions", "generate", "grpc", "whole", "infer")
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "whole": "/v1/completions",
    "generate": "/v2/models/demo/generate_stream",
}
PROMPT = "The engine's next step"
TEXT = (
    "A paged cache keeps keys and values in blocks of equal size, so that no request has to reserve room for tokens that "
    'it may never see. "Swap or recompute?" is then a question of seconds:\n\n\t1. copying costs bandwidth,\n\t2. '
    "recomputing costs arithmetic. Größe und Länge zählen; 速度也很重要 – и точность тоже.\n"
)
CONTEXT = 2**20
START_SECONDS = 120
WHOLE_HEAD_START_SECONDS = 1.0
READ_EVERY_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16, 128, 256])
    parser.add_argument("--rate", type=float, default=2000, help="tokens a second of all streams together")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a window")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--runtime",
        type=Path,
        nargs="+",
        help="folders with a package `pagoda` to compare, in turn; default: the installed one",
    )
    parser.add_argument("--note", default="", help="what should be known of the machine, kept in the JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    servers = [Server(options.rate, runtime) for runtime in options.runtime or [None]]
    try:
        results = measure(servers, options)
    finally:
        for server in servers:
            server.close()
    print_table(results)
    if options.json is not None:
        options.json.write_text(json.dumps(report(results, options), indent=2) + "\n")


def measure(servers: list[Server], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each server, protocol and number of streams: medians over the rounds, which the servers take in turn."""
    rows = []
    for protocol in options.protocols:
        for streams in options.streams:
            taken: list[list[dict[str, float]]] = [[] for _ in servers]
            for _ in range(options.rounds):
                for server, samples in zip(servers, taken, strict=True):
                    samples.append(server.run(protocol, streams, options.seconds))
            for server, samples in zip(servers, taken, strict=True):
                figures = {name: round(statistics.median(sample[name] for sample in samples), 3) for name in samples[0]}
                rows.append({"runtime": server.name, "protocol": protocol, "streams": streams, **figures})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| Runtime | Protocol | Streams | µs CPU a token | tokens/s | events a token | cores |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['runtime']} | {row['protocol']} | {row['streams']} | {row['microseconds_a_token']:.1f} "
            f"| {row['tokens_a_second']:.0f} | {row['events_a_token']:.2f} | {row['cores']:.2f} |"
        )


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    from pagoda.platform.hardware import cpu_report, versions

    return {
        "benchmark": "api_overhead",
        "machine": f"{cpu_report().name}, {cpu_report().usable_cores} cores, {platform.system()} {platform.release()}",
        "note": options.note,
        "versions": {name: version for name, version in versions().items() if version is not None},
        "load_average": os.getloadavg(),
        "rate": options.rate,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "results": rows,
    }


# ---- the server, seen from outside ------------------------------------------------------------------------------------


class Server:
    """A running server with a scripted engine."""

    def __init__(self, rate: float, runtime: Path | None) -> None:
        self.name = "installed" if runtime is None else runtime.name
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (lives as long as the process)
        self._environment = dict(os.environ)
        if runtime is not None:
            self._environment["PYTHONPATH"] = str(runtime.resolve())
        self._process = subprocess.Popen(
            [sys.executable, __file__, "role", "server", str(rate)],
            stdout=self._log,
            stderr=self._log,
            env=self._environment,
        )
        self.port = int(self._wait_for(r"REST on http://\S+:(\d+)"))
        self.grpc_port = int(self._wait_for(r"gRPC on \S+:(\d+)"))
        self._wait_for("is ready")

    def run(self, protocol: str, streams: int, seconds: float) -> dict[str, float]:
        """The figures of one run with so many clients at once."""
        port = self.grpc_port if protocol in ("grpc", "infer") else self.port
        command = [sys.executable, __file__, "role", "clients", protocol, str(port), str(streams), str(seconds)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment) as clients:
            assert clients.stdin is not None
            assert clients.stdout is not None
            clients.stdout.readline()  # every request is under way
            tokens, cpu, started = self._num_tokens(), self.cpu_seconds(), time.monotonic()
            clients.stdin.write(b"\n")
            clients.stdin.flush()
            num_events = int(clients.stdout.readline())
            cpu, elapsed = self.cpu_seconds() - cpu, time.monotonic() - started
            tokens = self._num_tokens() - tokens
        return {
            "microseconds_a_token": cpu / tokens * 1e6,
            "tokens_a_second": tokens / elapsed,
            "events_a_token": num_events / tokens,
            "cores": cpu / elapsed,
        }

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _num_tokens(self) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            found = re.search(r"^pagoda_generation_tokens_total\S* (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found is not None
        return float(found[1])

    def cpu_seconds(self) -> float:
        """User and system time of all threads; the scheduler's own account is finer than the clock ticks of psutil."""
        threads = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + START_SECONDS
        while (found := re.search(pattern, Path(self._log.name).read_text())) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server's log has no {pattern!r}:\n{Path(self._log.name).read_text()}")
            time.sleep(0.05)
        return found[1] if found.groups() else found[0]


# ---- the server's process ---------------------------------------------------------------------------------------------


def run_server(rate: str) -> None:
    """`pagoda serve`, whose engine process is `run_core` of this file."""
    from pagoda.cli.main import main as pagoda

    start = subprocess.Popen

    def popen(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        if command[1:3] == ["-m", "pagoda.engine.core.process"]:
            command = [sys.executable, __file__, "role", "core", rate, *command[3:]]
        return start(command, **settings)

    subprocess.Popen = popen  # type: ignore[misc,assignment]
    options = {"model-name": "demo", "host": "127.0.0.1", "http-port": 0, "grpc-port": 0, "max-num-waiting": 100_000}
    sys.exit(pagoda(["serve", *(f"--{name}={value}" for name, value in options.items())]))


def run_core(rate: str, socket_fd: str, heartbeat_fd: str, _niceness: str) -> None:
    """Speaks the protocol of `pagoda.engine.core.process` and computes nothing."""
    from pagoda.engine import wire
    from pagoda.engine.heartbeat import SharedHeartbeat
    from pagoda.engine.messages import AbortRequests, EngineReady, Shutdown
    from pagoda.models.checkpoint_source import checkpoint_directory
    from pagoda.request import EngineRequest
    from pagoda.text.tokenizer import Tokenizer

    connection, heartbeat = socket.socket(fileno=int(socket_fd)), SharedHeartbeat(int(heartbeat_fd))
    messages = receive_messages(connection)
    tokenizer = Tokenizer.from_directory(checkpoint_directory(messages.get().config["model"]))
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    limits = EngineReady(
        max_model_len=CONTEXT,
        max_num_seqs=4096,
        max_num_batched_tokens=CONTEXT,
        num_blocks=CONTEXT,
        block_size=16,
        vocab_size=tokenizer.vocab_size,
    )
    connection.sendall(wire.encode(limits))
    running: dict[str, tuple[int, int]] = {}  # tokens so far and in all
    step, due = 0, time.monotonic()
    while True:
        while not running or not messages.empty():
            heartbeat.write(step, 0, is_busy=False)
            message = messages.get()
            if isinstance(message, EngineRequest):
                running[message.request_id] = (0, message.max_tokens)
            elif isinstance(message, AbortRequests):
                for request_id in message.request_ids:
                    running.pop(request_id, None)
            elif isinstance(message, Shutdown):
                return
        now = time.monotonic()
        due = max(due + len(running) / float(rate), now - 0.1)  # a late step is made up for, within bounds
        if due > now:
            time.sleep(due - now)
        step += 1
        heartbeat.write(step, 0, is_busy=True)
        connection.sendall(wire.encode(next_step(step, running, token_ids)))


def receive_messages(connection: socket.socket) -> queue.Queue[Any]:
    """The messages of the API process, read by a thread, which ends this process when that one has ended."""
    from pagoda.engine import wire

    messages: queue.Queue[Any] = queue.Queue()
    stream = connection.makefile("rb")

    def read() -> None:
        with suppress(ConnectionError):
            while len(header := stream.read(wire.HEADER.size)) == wire.HEADER.size:
                messages.put(wire.decode(header, stream.read(wire.payload_size(header))))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return messages


def next_step(step: int, running: dict[str, tuple[int, int]], token_ids: list[int]) -> Any:
    """One token for every request; those that are done leave `running`."""
    from pagoda.engine.messages import EngineOutput, EngineOutputs, EngineStats
    from pagoda.sampling.output import FinishReason

    outputs = []
    for request_id, (count, max_tokens) in list(running.items()):
        is_over = count + 1 == max_tokens
        reason = FinishReason.LENGTH if is_over else None
        token_id = token_ids[count % len(token_ids)]
        outputs.append(EngineOutput(request_id=request_id, new_token_ids=[token_id], finish_reason=reason))
        running[request_id] = (count + 1, max_tokens)
        if is_over:
            del running[request_id]
    return EngineOutputs(outputs, EngineStats(step=step, num_running=len(outputs)), time.monotonic())


# ---- the clients' process ---------------------------------------------------------------------------------------------


def run_clients(protocol: str, port: str, streams: str, seconds: str) -> None:
    if protocol in ("grpc", "infer"):
        asyncio.run(run_grpc_clients(protocol, int(port), int(streams), float(seconds)))
    else:
        run_http_clients(protocol, int(port), int(streams), float(seconds))


def run_http_clients(protocol: str, port: int, streams: int, seconds: float) -> None:
    """Reads now and then what has come, and never waits for it: a send that had to wake its reader would be charged for that,
    which on one machine, a virtual one above all, is several times the send itself.
    """
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
    for connection in sockets:
        connection.sendall(request_of(protocol, port))
        connection.setblocking(False)
    has_begun = [False] * streams
    started = time.monotonic()
    while not all(has_begun) and (protocol != "whole" or time.monotonic() < started + WHOLE_HEAD_START_SECONDS):
        time.sleep(READ_EVERY_SECONDS)
        for index, connection in enumerate(sockets):
            has_begun[index] |= count_events(connection) > 0
    say_and_wait("under way")
    num_events, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(READ_EVERY_SECONDS)
        num_events += sum(map(count_events, sockets))
    print(num_events, flush=True)


def request_of(protocol: str, port: int) -> bytes:
    body: dict[str, Any] = {"max_tokens": CONTEXT // 2, "ignore_eos": True}
    if protocol == "generate":
        body["text_input"] = PROMPT
    else:
        body |= {"model": "demo", "stream": protocol != "whole"}
        body |= {"messages": [{"role": "user", "content": PROMPT}]} if protocol == "chat" else {"prompt": PROMPT}
    content = json.dumps(body).encode()
    head = f"POST {PATHS[protocol]} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {len(content)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + content


def count_events(connection: socket.socket) -> int:
    """The events that have come on a connection and were not read yet."""
    with suppress(BlockingIOError):
        return connection.recv(2**20).count(b"data: ")
    return 0


async def run_grpc_clients(protocol: str, port: int, streams: int, seconds: float) -> None:
    import grpc

    from pagoda.serving.grpc.messages import SERVICE_NAME, ModelInferRequest

    request = ModelInferRequest(model_name="demo")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(PROMPT.encode())
    request.parameters["max_tokens"].int64_param = 1 if protocol == "infer" else CONTEXT // 2
    request.parameters["ignore_eos"].bool_param = True
    message = request.SerializeToString()
    counts = [0] * streams
    begun = [asyncio.Event() for _ in range(streams)]

    async def stream(index: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            infer = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")
            while protocol == "infer":
                await infer(message)
                counts[index] += 1
                begun[index].set()
            call = channel.stream_stream(f"/{SERVICE_NAME}/ModelStreamInfer")()
            await call.write(message)
            while await call.read() is not grpc.aio.EOF:
                counts[index] += 1
                begun[index].set()

    tasks = [asyncio.create_task(stream(index)) for index in range(streams)]
    for event in begun:
        await event.wait()
    await asyncio.to_thread(say_and_wait, "under way")
    before = sum(counts)
    await asyncio.sleep(seconds)
    print(sum(counts) - before, flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def say_and_wait(word: str) -> None:
    """Tell the process that measures how far the clients are, and let it note where it stands."""
    print(word, flush=True)
    sys.stdin.readline()


ROLES = {"server": run_server, "core": run_core, "clients": run_clients}

if __name__ == "__main__":
    if sys.argv[1:2] == ["role"]:
        ROLES[sys.argv[2]](*sys.argv[3:])
    else:
        main()
