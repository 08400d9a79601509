"""What each executor adds to a step, against the one in the engine's own process.

    python benchmarks/executor_overhead.py [--executors in-process mp tensor pipeline ray] [--json FILE]

The model is so small that little of a step is computation: what remains is the way of the plan to the ranks, their collectives
and the way back. Reported is the time in which every sequence of a batch gets one more token: the steps it takes (two for two
pipeline stages with half a batch each) times the tenth percentile of a step. A step is so short that most of the fastest tenth
meet no neighbour, even on a busy machine. Rounds of all executors take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.platform.hardware import cpu_report, versions
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

EXECUTORS: dict[str, dict[str, Any]] = {
    "in-process": {},
    "mp": {"distributed_executor_backend": "mp"},
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "ray": {"distributed_executor_backend": "ray"},
    "ray-tensor": {"distributed_executor_backend": "ray", "tensor_parallel_size": 2},
}
DESCRIPTIONS = {
    "in-process": "in-process",
    "mp": "multi-process, 1 rank",
    "tensor": "multi-process, tensor 2",
    "pipeline": "multi-process, pipeline 2",
    "ray": "Ray, 1 rank",
    "ray-tensor": "Ray, tensor 2",
}
PROMPT_TOKENS = 8
WARM_UP_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=["in-process", "mp", "tensor", "pipeline"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=50, help="tokens of each sequence in a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--note", default="", help="what should be known of the machine, kept in the JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_dummy_checkpoint(Path(directory) / "tiny", DummySpec(num_layers=2))
        cores = {name: core_of(checkpoint, options, EXECUTORS[name]) for name in options.executors}
        try:
            seconds = measure(cores, options)
        finally:
            for core in cores.values():
                core.shutdown()
    print_table(seconds, options.batch_sizes)
    if options.json is not None:
        options.json.write_text(json.dumps(report(cores, seconds, options), indent=2) + "\n")


def core_of(checkpoint: Path, options: argparse.Namespace, settings: dict[str, Any]) -> EngineCore:
    batch = max(options.batch_sizes)
    config = PagodaConfig(
        model=str(checkpoint),
        device=options.device,
        dtype="float32",
        threads=1,
        max_num_seqs=batch,
        max_num_batched_tokens=max(256, batch * PROMPT_TOKENS),
        kv_cache_memory_bytes=64 * 2**20,
        enable_prefix_caching=False,
        rendezvous_timeout_seconds=600,
        **settings,
    )
    return start_core(config)


def measure(cores: dict[str, EngineCore], options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Seconds for one token of every sequence, by executor and batch size."""
    steps: dict[str, dict[int, list[float]]] = {name: {} for name in cores}
    for batch in options.batch_sizes:
        for core in cores.values():
            generate(core, batch, WARM_UP_TOKENS)
        for _ in range(options.rounds):
            for name, core in cores.items():
                steps[name].setdefault(batch, []).extend(generate(core, batch, options.tokens))
    num_tokens = options.rounds * options.tokens
    return {
        name: {batch: percentile(taken) * len(taken) / num_tokens for batch, taken in by_batch.items()}
        for name, by_batch in steps.items()
    }


def percentile(values: list[float]) -> float:
    return sorted(values)[len(values) // 10]


def generate(core: EngineCore, batch: int, num_tokens: int) -> list[float]:
    """Let `batch` sequences get `num_tokens` tokens each; the seconds of every step."""
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    for index in range(batch):
        core.add_request(
            EngineRequest(
                request_id=f"{index}",
                prompt_token_ids=[3 + (7 * index + place) % 400 for place in range(PROMPT_TOKENS)],
                params=sampling,
                max_tokens=num_tokens,
            )
        )
    taken = []
    while core.has_work:
        started = time.perf_counter()
        core.step()
        taken.append(time.perf_counter() - started)
    return taken


def print_table(seconds: dict[str, dict[int, float]], batch_sizes: list[int]) -> None:
    print("| Executor |" + "".join(f" ms a token, batch {batch} | added |" for batch in batch_sizes))
    print("|---|" + "---:|---:|" * len(batch_sizes))
    for name, by_batch in seconds.items():
        cells = []
        for batch in batch_sizes:
            base = seconds.get("in-process")
            added = "" if base is None else f"{(by_batch[batch] - base[batch]) * 1e3:+.2f}"
            cells.append(f" {by_batch[batch] * 1e3:.2f} | {added} |")
        print(f"| {DESCRIPTIONS[name]} |" + "".join(cells))


def report(
    cores: dict[str, EngineCore], seconds: dict[str, dict[int, float]], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "benchmark": "executor_overhead",
        "machine": f"{cpu_report().name}, {cpu_report().usable_cores} cores, {platform.system()} {platform.release()}",
        "note": options.note,
        "versions": {name: version for name, version in versions().items() if version is not None},
        "load_average": os.getloadavg(),
        "tokens": options.tokens,
        "rounds": options.rounds,
        "seconds_a_token": seconds,
        "phase_seconds": {name: core.ready.phase_seconds for name, core in cores.items()},
    }


if __name__ == "__main__":
    main()
