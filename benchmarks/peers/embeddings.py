"""Texts to vectors, Pagoda and its peers in turn: `python benchmarks/peers/embeddings.py --model DIR`.

Every engine is a process of its own (`embedders.py`), stopped while it is not its turn. Figures are texts a second of wall and
processor time, at 1, 32 and 256 texts a call, ragged; the 99th percentile of an online mix: texts arrive at random, and an
engine takes all that wait in one call, in time that passes as its calls take it (`--clock cpu`: as its processor time does, so
that what else the machine does is not in it); and the cosine with the first engine's vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = {"batch-1": (1, 24), "batch-32": (32, 2), "batch-256": (256, 1)}
WORDS = ("the", "of", "people", "capital", "river", "quickly", "about", "water", "market", "house", "was", "in")


def ragged_texts(count: int, seed: int) -> list[str]:
    """Texts of 8 to 256 words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(8, 254))) for _ in range(count)]


class Worker:
    """One engine's process."""

    def __init__(self, name: str, python: str, model: str, threads: int, work: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'kernels'}" if name.startswith("pagoda") else "",
        }
        command = [python, str(HERE / "embedders.py"), name, model, str(threads), str(work)]
        self.name = name
        self._log = (work / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.error = self._read().get("error")
        if self.error is None:
            self._process.send_signal(signal.SIGSTOP)

    def embed(self, calls: list[list[str]], *, vectors: bool = False) -> dict[str, Any]:
        """Wall and processor seconds of each call."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps({"texts": calls, "vectors": vectors}), file=self._process.stdin, flush=True)
        found = self._read()
        self._process.send_signal(signal.SIGSTOP)
        return found

    def end(self) -> None:
        """Kill it: it holds nothing that must be put away."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        return found


def online_p99(worker: Worker, texts: list[str], rate: float, clock_name: str, threads: int) -> float:
    """Seconds within which 99 of 100 texts are answered that arrive at `rate` a second."""
    share = threads if clock_name == "cpu" else 1
    generator = random.Random(7)
    now, arrivals = 0.0, []
    for _ in texts:
        now += generator.expovariate(rate)
        arrivals.append(now)
    clock, taken, latencies = 0.0, 0, []
    while taken < len(texts):
        clock = max(clock, arrivals[taken])
        end = taken
        while end < len(texts) and end - taken < 32 and arrivals[end] <= clock:
            end += 1
        clock += worker.embed([texts[taken:end]])[clock_name][0] / share
        latencies += [clock - arrival for arrival in arrivals[taken:end]]
        taken = end
    return sorted(latencies)[int(0.99 * len(latencies))]


def main() -> None:
    """Measure and print a table, and the figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory of a checkpoint of Sentence Transformers")
    parser.add_argument("--engines", nargs="+", default=["pagoda", "sentence-transformers", "fastembed", "openvino"])
    parser.add_argument("--rows", nargs="+", default=[*ROWS, "online"], choices=[*ROWS, "online"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rate", type=float, default=20.0, help="texts a second of the online mix")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of the online mix and of ratios")
    parser.add_argument("--peers-python", default=str(ROOT / ".peers/embedders/bin/python"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        workers = []
        for name in arguments.engines:
            python = sys.executable if name.startswith("pagoda") else arguments.peers_python
            worker = Worker(name, python, arguments.model, arguments.threads, Path(directory))
            if worker.error is None:
                workers.append(worker)
            else:
                print(f"{name}: {worker.error}", file=sys.stderr)
                worker.end()
        if not workers:
            sys.exit("no engine has started")
        try:
            figures = _measured(workers, arguments)
        finally:
            for worker in workers:
                worker.end()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))


def _measured(workers: list[Worker], arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    figures: dict[str, Any] = {}
    which = ("wall", "cpu").index(arguments.clock)
    sample = ragged_texts(24, 1)
    vectors = {worker.name: np.array(worker.embed([sample], vectors=True)["vectors"]) for worker in workers}
    first = vectors[workers[0].name]
    for name, found in vectors.items():
        figures[name] = {"worst_cosine": float((found * first).sum(1).min())}
    for row in arguments.rows:
        rounds: dict[str, list[tuple[float, float]]] = {worker.name: [] for worker in workers}
        for number in range(arguments.rounds):
            shift = number % len(workers)
            for worker in workers[shift:] + workers[:shift]:
                if row == "online":
                    p99 = online_p99(
                        worker, ragged_texts(64, number), arguments.rate, arguments.clock, arguments.threads
                    )
                    rounds[worker.name].append((1 / p99, 1 / p99))
                    continue
                size, calls = ROWS[row]
                texts = [ragged_texts(size, 1000 * number + call) for call in range(calls)]
                found = worker.embed(texts)
                rounds[worker.name].append(tuple(size * calls / sum(found[kind]) for kind in ("wall", "cpu")))  # type: ignore[arg-type]
        for name, values in rounds.items():
            ratios = [mine[which] / own[which] for mine, own in zip(rounds[workers[0].name], values, strict=True)]
            figures[name][row] = {
                "wall": statistics.median(value[0] for value in values),
                "cpu": statistics.median(value[1] for value in values),
                "first_over_this": statistics.median(ratios),
            }
        _print(row, figures, workers)
    return figures


def _print(row: str, figures: dict[str, Any], workers: list[Worker]) -> None:
    for worker in workers:
        values = figures[worker.name][row]
        what = "1 / p99 s" if row == "online" else "texts a second"
        print(
            f"{row:10} {worker.name:28} {values['wall']:9.2f} {what}, {values['cpu']:8.2f} a CPU second, "
            f"{workers[0].name} {values['first_over_this']:.2f} x, worst cosine {figures[worker.name]['worst_cosine']:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
