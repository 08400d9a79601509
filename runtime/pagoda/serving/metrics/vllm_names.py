"""The metrics under vLLM's names, beside their own: llm-d's endpoint picker, autoscalers and dashboards read those.

A metric has vLLM's name, meaning, buckets and labels where vLLM has it, so only the prefix differs; each is shown twice, of
the same moment.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

PREFIX = "vllm:"

# Those of vLLM that there are here, without prefix and suffix.
NAMES = frozenset(
    {
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
        *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"),
        *("prompt_tokens", "generation_tokens", "request_success", "iteration_tokens_total"),
        *("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_inference_time_seconds"),
        *("request_prefill_time_seconds", "request_decode_time_seconds"),
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
        *("spec_decode_num_accepted_tokens_per_pos", "lora_requests_info"),
        "engine_sleep_state",
    }
)


class WithVllmNames(CollectorRegistry):
    """A registry's metrics, named with `prefix`, and those that vLLM has under its names behind them."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        super().__init__()
        self._registry = registry
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        """Every family, and then the second ones; values are read once."""
        second = []
        for family in self._registry.collect():
            yield family
            if family.name.removeprefix(self._prefix) in NAMES and family.name.startswith(self._prefix):
                second.append(self._renamed(family))
        yield from second

    def _renamed(self, family: Metric) -> Metric:
        name = PREFIX + family.name.removeprefix(self._prefix)
        renamed = Metric(name, family.documentation, family.type, family.unit)
        renamed.samples = [
            Sample(PREFIX + sample.name.removeprefix(self._prefix), *sample[1:]) for sample in family.samples
        ]
        return renamed
