"""Prompts for a tiny checkpoint, the greedy tokens that transformers gives for them, and an engine run over all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pagoda.adapters import LoraAdapter
from pagoda.engine.core.loop import EngineCore
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams


@dataclass(frozen=True)
class ParityCase:
    """A checkpoint, prompts of 1 to `longest` tokens (every third shares a beginning), and what must come out."""

    directory: Path
    prompts: list[list[int]]
    expected: list[list[int]]
    longest: int
    new_tokens: int
    has_window: bool


def make_parity_case(
    directory: Path, spec: DummySpec, *, num_prompts: int, longest: int, new_tokens: int
) -> ParityCase:
    """Write the checkpoint and let transformers decode the prompts greedily, in float32, one by one."""
    write_dummy_checkpoint(directory, spec)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return parity_case(directory, model, num_prompts=num_prompts, longest=longest, new_tokens=new_tokens)


def parity_case(directory: Path, model: Any, *, num_prompts: int, longest: int, new_tokens: int) -> ParityCase:
    """The same for the checkpoint in `directory`, which `model` is, in float32."""
    generator = random.Random(7)
    vocab_size = min(model.config.vocab_size, 500)
    lengths = [1, 2, 15, 16, 17, longest, *(generator.randint(1, longest) for _ in range(num_prompts - 6))]
    shared = [generator.randrange(3, vocab_size) for _ in range(longest)]
    prompts = []
    for index, length in enumerate(lengths):
        own = [generator.randrange(3, vocab_size) for _ in range(length)]
        prompts.append((shared[: length // 2] + own)[:length] if index % 3 == 0 else own)
    expected = [greedy(model, prompt, new_tokens) for prompt in prompts]
    has_window = getattr(model.config, "sliding_window", None) is not None
    return ParityCase(directory, prompts, expected, longest, new_tokens, has_window)


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """The tokens that transformers gives."""
    inputs = torch.tensor([prompt])
    output = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def run_greedily(
    core: EngineCore, case: ParityCase, name: str, adapters: Sequence[LoraAdapter | None] = (None,)
) -> list[list[int]]:
    """The output of every prompt, all of which arrive at once; request ids begin with `name`.

    `adapters`: of the first prompts, and of those that follow over again.
    """
    outputs: dict[str, list[int]] = {}
    for index, prompt in enumerate(case.prompts):
        outputs[f"{name}{index}"] = []
        core.add_request(
            EngineRequest(
                request_id=f"{name}{index}",
                prompt_token_ids=prompt,
                params=SamplingParams(temperature=0.0, ignore_eos=True),
                max_tokens=case.new_tokens,
                adapter=adapters[index % len(adapters)],
            )
        )
    ended = []
    while core.has_work:
        for news in core.step().outputs:
            outputs[news.request_id] += news.new_token_ids
            if news.finish_reason is not None:
                assert news.finish_reason is FinishReason.LENGTH, news.error
                ended.append(news.request_id)
    assert sorted(ended) == sorted(outputs)
    return list(outputs.values())
