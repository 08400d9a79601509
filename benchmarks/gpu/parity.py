"""The engine's greedy tokens against transformers' in float32, for the four families, alone and in a batch."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import configuration, run_all
from pagoda.engine.core.startup import start_core
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

SPECS = {
    "llama": DummySpec(family="llama", num_heads=6, num_kv_heads=2, head_dim=64, hidden_size=384),
    "mistral": DummySpec(
        family="mistral", sliding_window=24, num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=256
    ),
    "qwen2": DummySpec(family="qwen2", num_heads=4, num_kv_heads=1, head_dim=64, hidden_size=256),
    "qwen3": DummySpec(family="qwen3", num_heads=7, num_kv_heads=1, head_dim=128, hidden_size=256),
}


def run(context: Context) -> dict[str, Any]:
    """Every family; a sequence that differs is listed with the place where it does."""
    num_tokens = context.choose(32, 3)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(512) for _ in range(length)] for length in context.choose((1, 15, 16, 17, 70, 130, 300), (1, 17))
    ]
    for family, spec in SPECS.items():
        scratch = Path(tempfile.mkdtemp(dir=context.out))
        try:
            folder = write_dummy_checkpoint(scratch / family, spec)
            expected = _transformers(context, folder, prompts, num_tokens)
            together, alone = _engine(context, folder, prompts, num_tokens)
        finally:
            shutil.rmtree(scratch)
        context.keep(
            {
                "family": family,
                "wrong_in_batch": _differences(together, expected),
                "wrong_alone": _differences(alone, expected),
                "sequences": len(prompts),
            }
        )
    passed = not any(entry["wrong_in_batch"] or entry["wrong_alone"] for entry in context.entries)
    return {
        "results": context.entries,
        "passed": passed,
        "headline": {"families": len(context.entries), "all_equal": passed},
    }


def _engine(
    context: Context, folder: Path, prompts: list[list[int]], num_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    core = start_core(
        configuration(
            context,
            folder,
            dtype="float32",
            max_model_len=400,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=1 << 28,  # more would be millions of blocks of so small a model
        )
    )
    try:
        together = _generate(core, prompts, num_tokens)
        return together, [_generate(core, [prompt], num_tokens)[0] for prompt in prompts]
    finally:
        core.shutdown()


def _generate(core: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    requests = [
        EngineRequest(
            request_id=str(number),
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens),
            max_tokens=num_tokens,
        )
        for number, prompt in enumerate(prompts)
    ]
    run_all(core, requests, tokens)
    return list(tokens.values())


@torch.inference_mode()
def _transformers(context: Context, folder: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(context.device)
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(num_tokens):
            logits = model(torch.tensor([tokens], device=context.device), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def _differences(actual: list[list[int]], expected: list[list[int]]) -> list[dict[str, int]]:
    """Sequences that differ, and from which token on."""
    return [
        {"sequence": number, "from_token": next(i for i, (a, e) in enumerate(zip(ours, theirs, strict=True)) if a != e)}
        for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True))
        if ours != theirs
    ]
