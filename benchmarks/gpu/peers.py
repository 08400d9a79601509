"""transformers' continuous batching on the same workload, in the same run."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import engine, run_all, workload

MODEL = "Qwen3-0.6B"
GOAL = 5.0


def run(context: Context) -> dict[str, Any]:
    """Output tokens a second of both, and their ratio; fewer requests than in `workload`, for transformers takes long."""
    count = context.choose(64, 2)
    with engine(context, MODEL) as core:
        requests = workload(context, count, core.ready.vocab_size)
        began = time.perf_counter()
        ours = run_all(core, requests) / (time.perf_counter() - began)
    if context.dry_run:
        return {"ours": ours, "headline": "transformers' continuous batching needs a GPU"}
    theirs = _transformers(
        context, [request.prompt_token_ids for request in requests], [r.max_tokens for r in requests]
    )
    return {"ours": ours, "transformers": theirs, "goal": GOAL, "headline": {"ratio": ours / theirs}}


@torch.inference_mode()
def _transformers(context: Context, prompts: list[list[int]], lengths: list[int]) -> float:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = context.scratch / "models" / MODEL
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(context.device)
    # One length for all: the batch API takes no length a request. The tokens generated are counted, not assumed.
    mean = sum(lengths) // len(lengths)
    generation = GenerationConfig(max_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = list(model.generate_batch(inputs=prompts, generation_config=generation).values())
    tokens = sum(len(output.generated_tokens) for output in outputs)
    if tokens < len(prompts):
        raise RuntimeError(f"transformers generated {tokens} tokens: {[output.error for output in outputs][:3]}")
    # From the first request's begin to the last one's end: without its set-up and the capture of its own graphs.
    began, ended = zip(*(output.lifespan for output in outputs), strict=True)
    return tokens / (max(ended) - min(began))
