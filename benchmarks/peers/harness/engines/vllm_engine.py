"""vLLM's engine on CPU, in this process."""

from __future__ import annotations

import os
from pathlib import Path

from harness.engine import Engine, EngineSettings, NotPossibleError, Tokens

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class VllmEngine(Engine):
    """See `Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        cores = sorted(os.sched_getaffinity(0))[: settings.threads]
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_CACHE_ROOT"] = str(Path(settings.model).parent.parent / "vllm-cache")  # what it compiles
        from vllm import EngineArgs, LLMEngine, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def sampling(output_tokens: int) -> SamplingParams:
            return SamplingParams(
                temperature=0,
                max_tokens=output_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )

        self._sampling = sampling
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.model,
                dtype=DTYPES[settings.weights],
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                enable_prefix_caching=settings.prefix_caching,
                disable_log_stats=True,
            )
        )

    def add(self, request_id: int, prompt: list[int], output_tokens: int) -> None:
        """See `Engine.add`."""
        self._engine.add_request(str(request_id), {"prompt_token_ids": prompt}, self._sampling(output_tokens))

    def step(self) -> Tokens:
        """See `Engine.step`."""
        return {
            int(output.request_id): list(output.outputs[0].token_ids)
            for output in self._engine.step()
            if output.outputs and output.outputs[0].token_ids
        }

    @property
    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return bool(self._engine.has_unfinished_requests())


def load(settings: EngineSettings) -> Engine:
    """The engine."""
    if settings.weights not in DTYPES:
        raise NotPossibleError("no int8 at load on CPU: it needs a checkpoint in compressed-tensors form")
    return VllmEngine(settings)
