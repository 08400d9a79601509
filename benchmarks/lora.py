"""Tokens a second with LoRA adapters and without, in alternating pairs of one run.

python benchmarks/lora.py MODEL [--rank 16] [--pairs 5] [--tokens 32] [--threads 2] [--cases 32x8,32x1,1x1]

32 rows over 8 adapters, 32 rows of one, and one row; adapters with random weights, of every linear layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pagoda import LLM, LoRARequest
from pagoda.models.config import ModelConfig
from pagoda.models.lora.peft import adaptable
from pagoda.sampling.params import SamplingParams


def write_adapter(directory: Path, model: ModelConfig, rank: int, seed: int) -> LoRARequest:
    """An adapter of every layer that may have one, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear in model.linears():
        if adaptable(linear.name):
            name = f"base_model.model.{linear.name}"
            for which, shape in (("A", (rank, linear.inputs)), ("B", (linear.outputs, rank))):
                values = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{name}.lora_{which}.weight"] = values.to(torch.bfloat16)
    directory.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors")
    return LoRARequest(directory.name, 0, str(directory))


def seconds_of(llm: LLM, adapters: list[LoRARequest | None], num_tokens: int, seed: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, for an answer of `num_tokens` tokens for each adapter of the list."""
    prompts = [[(17 * index + n + seed) % 400 + 100 for n in range(16)] for index in range(len(adapters))]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    started, used = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, lora_request=adapters)
    taken = time.perf_counter() - started, time.process_time() - used
    assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cases", default="32x8,32x1,1x1", help="rows x adapters, comma-separated")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = ModelConfig.from_directory(arguments.model)
        written = [write_adapter(Path(directory) / f"adapter{seed}", model, arguments.rank, seed) for seed in range(8)]
        settings = {"enable_lora": True, "max_loras": 8, "max_lora_rank": arguments.rank, "max_model_len": 256}
        llm = LLM(arguments.model, threads=arguments.threads, enable_prefix_caching=False, **settings)
        try:
            for rows, count in (map(int, case.split("x")) for case in arguments.cases.split(",")):
                adapted: list[LoRARequest | None] = [written[row % count] for row in range(rows)]
                plain: list[LoRARequest | None] = [None] * rows
                for adapters in (plain, adapted):
                    seconds_of(llm, adapters, 4, 0)
                ratios: list[tuple[float, float]] = []
                for pair in range(arguments.pairs):
                    order = (True, False) if pair % 2 else (False, True)
                    taken = {has: seconds_of(llm, adapted if has else plain, arguments.tokens, pair) for has in order}
                    ratios.append((taken[False][0] / taken[True][0], taken[False][1] / taken[True][1]))
                print(f"{rows} rows, {count} adapters of rank {arguments.rank}: with / without", end="", flush=True)
                for name, values in zip(("by time", "by CPU time"), zip(*ratios, strict=True), strict=True):
                    print(f" {name} {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})", end="")
                print(flush=True)
        finally:
            llm.close()


if __name__ == "__main__":
    main()
