"""OpenVINO GenAI's continuous batching pipeline, in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai

from harness.engine import Engine, EngineSettings, Tokens

# What matrix products compute in. Where the processor has no bfloat16 instructions the plugin takes float32 by itself.
PRECISIONS = {"bf16": "bf16", "fp32": "f32", "int8": None}
MAX_BATCHED_TOKENS = 2048


class OpenVinoEngine(Engine):
    """See `Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = settings.kv_cache_gib
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.enable_prefix_caching = settings.prefix_caching
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads}
        hint = PRECISIONS[settings.weights]
        if hint is not None and _has_precision(hint):
            properties["INFERENCE_PRECISION_HINT"] = hint
            properties["KV_CACHE_PRECISION"] = hint
        elif hint is not None:
            properties["KV_CACHE_PRECISION"] = "f16"  # the default would be 8 bits, which is another class
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(settings.converted, scheduler, "CPU", properties)
        self._handles: dict[int, Any] = {}

    def add(self, request_id: int, prompt: list[int], output_tokens: int) -> None:
        """See `Engine.add`."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[request_id] = self._pipeline.add_request(request_id, ids, config)

    def step(self) -> Tokens:
        """See `Engine.step`."""
        self._pipeline.step()
        tokens: Tokens = {}
        for request_id, handle in list(self._handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    tokens.setdefault(request_id, []).extend(output.generated_ids)
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING and not handle.can_read():
                del self._handles[request_id]
        return tokens

    @property
    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return bool(self._handles)


def _has_precision(hint: str) -> bool:
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return hint == "f32" or hint.upper() in capabilities


def load(settings: EngineSettings) -> Engine:
    """The engine."""
    return OpenVinoEngine(settings)
