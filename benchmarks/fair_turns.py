"""Whether a long prompt, or another tenant, holds up those that run: times between tokens, and of a short request, in pairs.

    python benchmarks/fair_turns.py [--rounds 3] [--json FILE] [--hidden-size 512] [--layers 8]

One engine in this process for each setting, over one made-up checkpoint, in turn. Three measurements a round:

    streams       16 requests decode, alone and while prompts of 8k tokens arrive: the 99th percentile between their tokens
    throughput    tokens a second of that work until all of it is done
    two tenants   8 tokens of a short prompt, alone and while another tenant has 400 requests with 1900 tokens

The first two with long_prefill_token_threshold 0 (a prompt may have the whole step) and auto, and with target_itl_ms of three
times the percentile without prompts.

Ratios are taken within a round. Nothing else should run on the machine; the load is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.platform.hardware import cpu_report
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

MAX_MODEL_LEN = 16384
NUM_STREAMS = 16
TARGET = 3.0  # times the 99th percentile without prompts
LONG_PROMPT = 8192


@dataclass
class Engine:
    """An engine and when the tokens of its requests came."""

    core: EngineCore
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    times: dict[str, list[float]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def add(self, name: str, num_prompt_tokens: int, max_tokens: int, tenant: str = "") -> str:
        request_id = f"{name}-{self.rng.getrandbits(64):x}"
        self.core.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=self.rng.choices(range(512), k=num_prompt_tokens),
                params=SamplingParams(temperature=0.0, ignore_eos=True),
                max_tokens=max_tokens,
                tenant=tenant,
                arrival_time=time.monotonic(),
            )
        )
        self.times[request_id] = []
        return request_id

    def step(self) -> int:
        """Run a step; tokens that came."""
        outputs = self.core.step()
        count = 0
        for output in outputs.outputs:
            self.times[output.request_id] += [outputs.timestamp] * len(output.new_token_ids)
            count += len(output.new_token_ids)
            if output.finish_reason is not None:
                self.ended.add(output.request_id)
        return count

    def run_until_idle(self) -> None:
        while self.core.has_work:
            self.step()

    def abort_all(self) -> None:
        self.core.abort(list(self.times))
        self.run_until_idle()
        self.times.clear()
        self.ended.clear()


def between_tokens(times: list[list[float]]) -> float:
    """The 99th percentile of the times between tokens."""
    gaps = [after - before for one in times for before, after in pairwise(one)]
    return statistics.quantiles(gaps, n=100)[98]


def streams(engine: Engine, num_tokens: int, num_prompts: int) -> tuple[float, float]:
    """16 requests of so many tokens; prompts arrive one at a time. Percentile between tokens, and tokens a second of all."""
    names = [engine.add("stream", 32, num_tokens) for _ in range(NUM_STREAMS)]
    while not all(engine.times[name] for name in names):
        engine.step()
    began = time.monotonic()
    prompts: list[str] = []
    while not engine.ended.issuperset(names) or (prompts and prompts[-1] not in engine.ended):
        if len(prompts) < num_prompts and all(prompt in engine.ended for prompt in prompts):
            prompts.append(engine.add("prompt", LONG_PROMPT, 1))
        engine.step()
    seconds = time.monotonic() - began
    result = between_tokens([engine.times[name] for name in names])
    engine.abort_all()
    return result, (NUM_STREAMS * num_tokens + num_prompts * LONG_PROMPT) / seconds


def short_request(engine: Engine) -> float:
    """Seconds of 8 tokens."""
    began = time.monotonic()
    name = engine.add("short", 20, 8, tenant="b")
    while name not in engine.ended:
        engine.step()
    return time.monotonic() - began


def two_tenants(engine: Engine) -> tuple[float, float, float]:
    """A short request alone, and while another tenant floods; and the longest step before it."""
    short_request(engine)
    alone = statistics.median(short_request(engine) for _ in range(5))
    for _ in range(400):
        engine.add("flood", 20, 1900, tenant="a")
    longest = 0.0
    for _ in range(60):
        began = time.monotonic()
        engine.step()
        longest = max(longest, time.monotonic() - began)
    flooded = statistics.median(short_request(engine) for _ in range(5))
    engine.abort_all()
    return alone, flooded, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--prompts", type=int, default=2, help="of 8k tokens a run")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spec = DummySpec(
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_layers=options.layers,
        num_heads=options.hidden_size // 64,
        num_kv_heads=max(1, options.hidden_size // 128),
        head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
    )
    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_dummy_checkpoint(Path(directory) / "model", spec, weights=False)
        settings = (("0", 0), ("auto", None), ("target", None))
        engines = {name: start(checkpoint, options.device, threshold) for name, threshold in settings}
        for number in range(options.rounds + 1):
            found = {}
            order = list(engines.items())
            for name, engine in order if number % 2 else order[::-1]:
                alone, _ = streams(engine, options.tokens, 0)
                if name == "target":
                    engine.core.reconfigure({"target_itl_ms": 1000 * TARGET * alone})
                beside, throughput = streams(engine, options.tokens, options.prompts)
                found[name] = {"between_tokens": beside / alone, "tokens_a_second": throughput}
            alone, flooded, longest = two_tenants(engines["auto"])
            found["two_tenants"] = {"ratio": flooded / alone, "less_a_step": (flooded - longest) / alone}
            print(json.dumps(found), flush=True)
            if number:  # the first one warms up
                rounds.append(found)
        for engine in engines.values():
            engine.core.shutdown()
    summary = {
        "p99_between_tokens_0": statistics.median(one["0"]["between_tokens"] for one in rounds),
        "p99_between_tokens_auto": statistics.median(one["auto"]["between_tokens"] for one in rounds),
        "p99_between_tokens_to_target": statistics.median(one["target"]["between_tokens"] / TARGET for one in rounds),
        "throughput_target_to_0": statistics.median(
            one["target"]["tokens_a_second"] / one["0"]["tokens_a_second"] for one in rounds
        ),
        "throughput_auto_to_0": statistics.median(
            one["auto"]["tokens_a_second"] / one["0"]["tokens_a_second"] for one in rounds
        ),
        "two_tenants_ratio": statistics.median(one["two_tenants"]["ratio"] for one in rounds),
    }
    print(json.dumps(summary, indent=2))
    if options.json is not None:
        report = {
            "benchmark": "fair_turns",
            "machine": f"{cpu_report().name}, {cpu_report().usable_cores} cores",
            "load_average": os.getloadavg(),
            "options": {name: str(value) for name, value in vars(options).items()},
            "summary": summary,
            "rounds": rounds,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def start(checkpoint: Path, device: str, threshold: int | None) -> Engine:
    return Engine(
        start_core(
            PagodaConfig(
                model=str(checkpoint),
                load_format="dummy",
                device=device,
                max_model_len=MAX_MODEL_LEN,
                kv_cache_memory_bytes=2**30,
                enable_prefix_caching=True,
                long_prefill_token_threshold=threshold,
                runaway_detection="off",
            )
        )
    )


if __name__ == "__main__":
    main()
