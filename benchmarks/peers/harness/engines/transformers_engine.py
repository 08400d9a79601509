"""Hugging Face transformers: `generate` on a static batch."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from harness.engine import Engine, EngineSettings, Event, NotPossibleError, Tokens

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class _Clock(StoppingCriteria):
    """Notes when each step's tokens are there; stops nothing."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called after each token, with all ids so far `[batch, tokens]`."""
        tokens = {number: [token] for number, token in enumerate(input_ids[:, -1].tolist())}
        self._events.append(Event(time.perf_counter(), tokens))
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TransformersEngine(Engine):
    """See `Engine`."""

    takes_arrivals = False

    def __init__(self, settings: EngineSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=DTYPES[settings.weights])
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run_batch(self, prompts: list[list[int]], output_tokens: int) -> list[Event]:
        """See `Engine.run_batch`."""
        events = [Event(time.perf_counter(), {})]
        ids = torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=output_tokens,
            stopping_criteria=StoppingCriteriaList([_Clock(events)]),
        )
        return events

    def add(self, request_id: int, prompt: list[int], output_tokens: int) -> None:
        """Not there."""
        raise NotPossibleError("generate takes one batch and no arrivals")

    def step(self) -> Tokens:
        """Not there."""
        raise NotPossibleError("generate takes one batch and no arrivals")

    @property
    def has_work(self) -> bool:
        """Nothing outlasts `run_batch`."""
        return False


def load(settings: EngineSettings) -> Engine:
    """The engine."""
    if settings.weights not in DTYPES:
        raise NotPossibleError("no int8 weights for CPU in the package itself")
    return TransformersEngine(settings)
