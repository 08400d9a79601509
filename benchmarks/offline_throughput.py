"""Throughput of the engine without a server: prompt tokens and generated tokens a second, by batch size.

    python benchmarks/offline_throughput.py --model ./Qwen3-0.6B --batch-sizes 1 8 32 --json results.json

Prompts are random token ids, so that nothing hits the prefix cache, and every sequence generates its full length. A batch runs
once for one token and once for all of them: the first gives the prefill rate, the difference the decode rate. Each pair runs
`--repeats` times and the median counts. Only pairs measured next to each other on a quiet machine compare.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pagoda.cli.models import inspect_checkpoint
from pagoda.config.hardware import cpu_report, gpu_reports, versions
from pagoda.llm import LLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.sampling.params import SamplingParams

# About 15 million weights: what a step costs besides its arithmetic shows here.
SMALL = DummySpec(
    family="llama",
    hidden_size=288,
    intermediate_size=768,
    num_layers=6,
    num_heads=6,
    num_kv_heads=6,
    head_dim=48,
    vocab_size=16000,
    max_position_embeddings=2048,
)


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint directory; default: a small one with random weights")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go, with machine and versions")
    own = parser.parse_args()
    with TemporaryDirectory() as scratch:
        model = own.model or str(write_dummy_checkpoint(Path(scratch) / "small", SMALL))
        facts = inspect_checkpoint(model)
        report = {
            "model": facts,
            "machine": {"cpu": asdict(cpu_report()), "gpus": [asdict(gpu) for gpu in gpu_reports()]},
            "versions": versions(),
            "settings": {key: value for key, value in vars(own).items() if key != "json"},
            **measure(model, facts["vocab_size"], own),
        }
    if own.json:
        own.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(model: str, vocab_size: int, own: argparse.Namespace) -> dict[str, Any]:
    """Load the model and measure every batch size; prints a line for each."""
    started = time.perf_counter()
    llm = LLM(
        model,
        dtype=own.dtype,
        threads=own.threads,
        max_model_len=own.prompt_tokens + own.output_tokens,
        max_num_seqs=max(own.batch_sizes),
        max_num_batched_tokens=max(512, *own.batch_sizes),
    )
    load_seconds = time.perf_counter() - started
    print(f"loaded in {load_seconds:.1f} s")
    print(f"{'batch':>6} {'prefill tok/s':>15} {'decode tok/s':>15} {'ms a step':>10}")
    with llm:
        _timed(llm, vocab_size, 1, own.prompt_tokens, 2)  # the first pass through everything is slower
        rows = [_measure_batch(llm, vocab_size, size, own) for size in own.batch_sizes]
    return {"load_seconds": load_seconds, "results": rows}


def _measure_batch(llm: LLM, vocab_size: int, size: int, own: argparse.Namespace) -> dict[str, float]:
    prefills, decodes = [], []
    for _ in range(own.repeats):
        first = _timed(llm, vocab_size, size, own.prompt_tokens, 1)
        whole = _timed(llm, vocab_size, size, own.prompt_tokens, own.output_tokens)
        prefills.append(first)
        decodes.append(max(1e-9, whole - first))
    prefill, decode = statistics.median(prefills), statistics.median(decodes)
    steps = own.output_tokens - 1
    row = {
        "batch_size": size,
        "prefill_tokens_per_second": size * own.prompt_tokens / prefill,
        "decode_tokens_per_second": size * steps / decode,
        "step_milliseconds": 1000 * decode / steps,
    }
    print(
        f"{size:>6} {row['prefill_tokens_per_second']:>15.1f} {row['decode_tokens_per_second']:>15.1f} "
        f"{row['step_milliseconds']:>10.2f}"
    )
    return row


def _timed(llm: LLM, vocab_size: int, size: int, prompt_tokens: int, output_tokens: int) -> float:
    """Seconds in which `size` fresh random prompts get `output_tokens` tokens each."""
    prompts = [random.choices(range(4, vocab_size), k=prompt_tokens) for _ in range(size)]
    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling)
    seconds = time.perf_counter() - started
    if any(len(output.outputs[0].token_ids) != output_tokens for output in outputs):
        raise RuntimeError("a sequence did not generate its full length")
    return seconds


if __name__ == "__main__":
    main()
