"""What every engine under comparison looks like to the worker. Imports the standard library only."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

Tokens = dict[int, list[int]]
"""New token ids by request id."""

MODULES = {
    "pagoda": "harness.engines.pagoda_engine",
    "transformers": "harness.engines.transformers_engine",
    "vllm": "harness.engines.vllm_engine",
    "openvino": "harness.engines.openvino_engine",
    "llamacpp": "harness.engines.llamacpp_engine",
}


class NotPossibleError(Exception):
    """The engine does not run this class on this machine; the text says why. Reported, not raised further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is loaded with. `model`: the Hugging Face checkpoint; `converted`: the engine's own form of it, or "".

    `kv_tokens`: what the KV cache must hold in all; `kv_token_bytes`: of one token at the class's precision.
    """

    model: str
    converted: str
    weights: str  # bf16, fp32, int8, or gguf: as the file has them
    threads: int
    max_num_seqs: int
    max_model_len: int
    kv_tokens: int
    kv_token_bytes: int
    prefix_caching: bool

    @property
    def kv_cache_gib(self) -> int:
        """Whole GiB that hold `kv_tokens`, for engines that take a size."""
        return -(-self.kv_tokens * self.kv_token_bytes // 2**30)


@dataclass(frozen=True, slots=True)
class Event:
    """Tokens that were there at `time` (perf_counter seconds)."""

    time: float
    tokens: Tokens


class Engine(ABC):
    """An engine in this process, loaded by its constructor. Generation is greedy and never ends before its length."""

    takes_arrivals = True

    def run_batch(self, prompts: list[list[int]], output_tokens: int) -> list[Event]:
        """Generate `output_tokens` tokens for each prompt, all given at once; the first event is the start, without tokens."""
        events = [Event(time.perf_counter(), {})]
        for number, prompt in enumerate(prompts):
            self.add(number, prompt, output_tokens)
        while self.has_work:
            tokens = self.step()
            if tokens:
                events.append(Event(time.perf_counter(), tokens))
        return events

    @abstractmethod
    def add(self, request_id: int, prompt: list[int], output_tokens: int) -> None:
        """Take a request."""

    @abstractmethod
    def step(self) -> Tokens:
        """Run one step."""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether a request is unfinished."""


def load_engine(name: str, settings: EngineSettings) -> Engine:
    """Load the engine `name`. Raises `NotPossibleError` where it cannot be had."""
    engine: Engine = importlib.import_module(MODULES[name]).load(settings)
    return engine
