"""Triton's model configuration and statistics extensions, which perf_analyzer reads before it measures."""

from __future__ import annotations

from typing import Any

from pagoda.sampling.output import FinishReason
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.v2.service import ModelMetadata, V2Service

_NANOSECONDS = 1_000_000_000
_FAILED = (FinishReason.ABORT, FinishReason.ERROR)


def triton_type(datatype: str) -> str:
    """Triton's name of a datatype in a model configuration."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def model_config(model: ModelMetadata) -> dict[str, Any]:
    """The model configuration: not batched by the client, any number of responses to a request."""
    return {
        "name": model.name,
        "platform": model.platform,
        "backend": model.platform,
        "max_batch_size": 0,
        "input": [
            {
                "name": tensor["name"],
                "data_type": triton_type(tensor["datatype"]),
                "dims": tensor["shape"],
                "optional": True,
            }
            for tensor in model.inputs
        ],
        "output": [
            {"name": tensor["name"], "data_type": triton_type(tensor["datatype"]), "dims": tensor["shape"]}
            for tensor in model.outputs
        ],
        "model_transaction_policy": {"decoupled": True},
    }


def statistics(service: V2Service, name: str, version: str | None) -> dict[str, Any]:
    """Triton's statistics of a model up to now. Raises `ModelNotFoundError`."""
    metrics = service.find(name, version).metrics
    metrics.observe_steps()
    return model_statistics(service.model_metadata(name, version), metrics)


def model_statistics(model: ModelMetadata, metrics: Metrics) -> dict[str, Any]:
    """Counts and times of ended requests, whatever protocol they came by; times in nanoseconds."""
    counts = {reason: metrics.value("request_success_total", finished_reason=str(reason)) for reason in FinishReason}
    failed = int(sum(counts[reason] for reason in _FAILED))
    succeeded = int(sum(counts.values())) - failed

    def took(*names: str) -> dict[str, int]:
        seconds = sum(metrics.value(f"{name}_sum") for name in names)
        return {"count": succeeded, "ns": int(seconds * _NANOSECONDS)}

    nothing = {"count": 0, "ns": 0}
    return {
        "name": model.name,
        "version": model.versions[0],
        "inference_count": succeeded,
        "execution_count": int(metrics.value("iteration_tokens_total_count")),
        "inference_stats": {
            "success": took("e2e_request_latency_seconds"),
            "fail": {"count": failed, "ns": 0},
            "queue": took("request_queue_time_seconds"),
            "compute_input": nothing,
            "compute_infer": took("request_prefill_time_seconds", "request_decode_time_seconds"),
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }
