"""What a step costs the engine's thread apart from the model: plan, inputs, sampling, results, messages to the API process.

    python benchmarks/step_overhead.py [--batch-sizes 1 32 256] [--device auto] [--json FILE]

The layers of the model are taken out: what they would have computed is there already. Every sequence decodes greedily over a
small vocabulary. Reported is the CPU time of the engine's thread a step, the least of several rounds, so neighbours do not
count. On a GPU launches count and are all that is left of the device's part; this time is hidden behind the model as long as
a step of the model takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pagoda.config.schema import PagodaConfig
from pagoda.engine import wire
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.execution.in_process import InProcessExecutor
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.platform.hardware import cpu_report, versions
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

PROMPT_TOKENS = 32
MAX_MODEL_LEN = 2048
SPEC = DummySpec(num_layers=1, max_position_embeddings=MAX_MODEL_LEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_dummy_checkpoint(Path(directory) / "tiny", SPEC, weights=False)
        seconds = {batch: measure(checkpoint, batch, options) for batch in options.batch_sizes}
    print("| sequences | µs a step | encoded for the API process | µs a sequence |")
    print("|---:|---:|---:|---:|")
    for batch, (step, encoded) in seconds.items():
        print(f"| {batch} | {1e6 * step:.0f} | {1e6 * encoded:.0f} | {1e6 * encoded / batch:.1f} |")
    if options.json is not None:
        report = {
            "benchmark": "step_overhead",
            "machine": f"{cpu_report().name}, {cpu_report().usable_cores} cores, {platform.system()} {platform.release()}",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: version for name, version in versions().items() if version is not None},
            "load_average": os.getloadavg(),
            "cpu_seconds_a_step": {batch: step for batch, (step, _) in seconds.items()},
            "cpu_seconds_a_step_encoded": {batch: encoded for batch, (_, encoded) in seconds.items()},
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(checkpoint: Path, batch: int, options: argparse.Namespace) -> tuple[float, float]:
    """CPU seconds of a step of `batch` sequences that decode: without and with its outputs encoded."""
    core = start_core(
        PagodaConfig(
            model=str(checkpoint),
            load_format="dummy",
            device=options.device,
            threads=1,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=batch,
            max_num_batched_tokens=max(2048, batch * PROMPT_TOKENS),
            kv_cache_memory_bytes=512 * 2**20,
            runaway_detection="off",  # the same logits at every step are one
        )
    )
    try:
        without_layers(core)
        rng = random.Random(0)
        for index in range(batch):
            core.add_request(
                EngineRequest(
                    request_id=f"{rng.getrandbits(128):032x}",
                    prompt_token_ids=rng.choices(range(SPEC.vocab_size), k=PROMPT_TOKENS + index % 16),
                    params=SamplingParams(temperature=0.0, ignore_eos=True),
                    max_tokens=MAX_MODEL_LEN - 2 * PROMPT_TOKENS,
                )
            )
        for _ in range(options.steps):
            core.step()
        step = least_seconds(core.step, options)
        return step, least_seconds(lambda: wire.encode(core.step()), options)
    finally:
        core.shutdown()


def without_layers(core: EngineCore) -> None:
    """Let the model answer with hidden states and logits that were computed once."""
    executor = core._executor
    assert isinstance(executor, InProcessExecutor)
    runner = executor._worker.runner
    assert runner is not None
    runner.graphs = None
    model: DecoderForCausalLM = runner.model
    hidden = torch.zeros(1 << 14, SPEC.hidden_size, device=model.device)
    logits = torch.randn(len(runner.batch.num_tokens), SPEC.vocab_size, device=model.device)

    def forward(input_ids: Tensor, *_: object) -> Tensor:
        return hidden[: len(input_ids)]

    def compute_logits(states: Tensor) -> Tensor:
        return logits[: len(states)].clone()  # the sampler may change them

    model.forward, model.compute_logits = forward, compute_logits  # type: ignore[method-assign, assignment]


def least_seconds(step: Callable[[], object], options: argparse.Namespace) -> float:
    found: list[float] = []
    for _ in range(options.rounds):
        began = time.thread_time()
        for _ in range(options.steps):
            step()
        found.append((time.thread_time() - began) / options.steps)
    return min(found)


if __name__ == "__main__":
    main()
