"""Pagoda's engine core, in this process."""

from __future__ import annotations

import time

from harness.engine import Engine, EngineSettings, Tokens
from pagoda.config.sources import from_kwargs
from pagoda.engine.core.startup import start_core
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "int8": "bfloat16", "gguf": "bfloat16"}


class PagodaEngine(Engine):
    """See `Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        quantized = {"quantization": "int8"} if settings.weights == "int8" else {}
        config = from_kwargs(
            {
                "model": settings.model,
                "dtype": DTYPES[settings.weights],
                "threads": settings.threads,
                "max_num_seqs": settings.max_num_seqs,
                "max_model_len": settings.max_model_len,
                "kv_cache_memory_bytes": settings.kv_tokens * settings.kv_token_bytes,
                "enable_prefix_caching": settings.prefix_caching,
                **quantized,
            }
        )
        self._core = start_core(config)

    def add(self, request_id: int, prompt: list[int], output_tokens: int) -> None:
        """See `Engine.add`."""
        request = EngineRequest(
            request_id=str(request_id),
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=0, ignore_eos=True, max_tokens=output_tokens),
            max_tokens=output_tokens,
            arrival_time=time.monotonic(),
        )
        self._core.add_request(request)

    def step(self) -> Tokens:
        """See `Engine.step`."""
        outputs = self._core.step().outputs
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        return {int(output.request_id): output.new_token_ids for output in outputs if output.new_token_ids}

    @property
    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return self._core.has_work


def load(settings: EngineSettings) -> Engine:
    """The engine."""
    return PagodaEngine(settings)
