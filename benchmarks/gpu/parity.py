"""The engine against transformers.

Four families in float32: the same greedy tokens, alone and in a batch. Then one in bfloat16, as it is served, where equality
is not to be had: log-probabilities of a prompt of 3000 tokens, computed in chunks, may be as far from float32's as
transformers' own are in bfloat16. And captured steps against eager ones, bit for bit.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import configuration, run_all
from pagoda.engine.core.startup import start_core
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

# How far ours may be from float32's over how far transformers' are.
MOST_DISTANCE = 1.3

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
        scratch = Path(tempfile.mkdtemp(dir=context.scratch))
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
    equal = not any(entry["wrong_in_batch"] or entry["wrong_alone"] for entry in context.entries)
    half = _half_precision(context)
    context.keep(half)
    passed = equal and half["distance"] <= MOST_DISTANCE * half["distance_of_transformers"] and half["graphs_are_equal"]
    return {
        "results": context.entries,
        "passed": passed,
        "headline": {"families": len(SPECS), "all_equal": equal, **half},
    }


def _half_precision(context: Context) -> dict[str, Any]:
    """Mean distance of a long prompt's log-probabilities from float32's, ours and transformers'; graphs against eager."""
    rng = random.Random(1)
    prompt = [rng.randrange(512) for _ in range(context.choose(3000, 40))]
    spec = replace(SPECS["qwen3"], num_layers=8, max_position_embeddings=4096)
    scratch = Path(tempfile.mkdtemp(dir=context.scratch))
    dtype = context.choose("bfloat16", "float32")
    try:
        folder = write_dummy_checkpoint(scratch / "half", spec)
        exact = _prompt_logprobs(context, folder, prompt, torch.float32)
        theirs = _prompt_logprobs(context, folder, prompt, getattr(torch, dtype))
        ours, tokens = _scored(context, folder, prompt, dtype, enforce_eager=False)
        _, eager = _scored(context, folder, prompt, dtype, enforce_eager=True)
    finally:
        shutil.rmtree(scratch)
    return {
        "check": f"{dtype} in chunks of 256",
        "distance": (ours - exact).abs().mean().item(),
        "distance_of_transformers": (theirs - exact).abs().mean().item() + 1e-5,
        "graphs_are_equal": tokens == eager,
    }


def _scored(
    context: Context, folder: Path, prompt: list[int], dtype: str, *, enforce_eager: bool
) -> tuple[torch.Tensor, dict[str, list[Any]]]:
    """Log-probabilities of the prompt's tokens but the first, and then what 24 steps of three rows give, to the last bit."""
    core = start_core(
        configuration(
            context,
            folder,
            dtype=dtype,
            max_model_len=context.choose(3100, 90),
            max_num_seqs=8,
            max_num_batched_tokens=context.choose(256, 16),
            kv_cache_memory_bytes=1 << 28,
            enforce_eager=enforce_eager,
        )
    )
    try:
        for number in range(3):
            params = SamplingParams(
                temperature=0.7, seed=number, ignore_eos=True, max_tokens=24, logprobs=2, prompt_logprobs=0
            )
            core.add_request(
                EngineRequest(request_id=str(number), prompt_token_ids=prompt[number:], params=params, max_tokens=24)
            )
        scores: list[float] = []
        # By request: which of them share a step follows from how long steps took.
        generated: dict[str, list[Any]] = {}
        while core.has_work:
            for output in core.step().outputs:
                generated.setdefault(output.request_id, []).append((output.new_token_ids, output.logprobs))
                if output.request_id == "0" and output.prompt_logprobs:
                    scores = [entry.logprobs[0] for entry in output.prompt_logprobs if entry is not None]
        return torch.tensor(scores, dtype=torch.float64), generated
    finally:
        core.shutdown()


@torch.inference_mode()
def _prompt_logprobs(context: Context, folder: Path, prompt: list[int], dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(context.device)
    ids = torch.tensor([prompt], device=context.device)
    logits = model(ids, use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()


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
