"""What speculative decoding did during a run, from the server's metrics before and after it; Pagoda has vLLM's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from pagoda.benchmarking.endpoints import Target

_NAMES = ("drafts", "draft_tokens", "accepted_tokens")
_PER_POSITION = "accepted_tokens_per_pos"
_MIDDLE = "spec_decode_num_"

Counters = Mapping[str, float]
"""By name, with the position behind it for counts per position; all replicas of all models together."""


async def spec_decode_counters(target: Target, timeout_seconds: float) -> Counters | None:
    """The server's counters as of now; None where it has none, or no metrics that can be read."""
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=target.headers) as session,
            session.get(f"{target.base_url}/metrics") as response,
        ):
            return counters_of(await response.text()) if response.status == 200 else None
    except (TimeoutError, aiohttp.ClientError, ValueError):
        return None


def counters_of(exposition: str) -> Counters | None:
    """The same from the text of Prometheus' exposition format. Raises `ValueError` for what is none."""
    by_prefix: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            prefix, _, name = sample.name.removesuffix("_total").partition(_MIDDLE)
            if name in (*_NAMES, _PER_POSITION):
                by_prefix[prefix][f"{name} {sample.labels.get('position', '')}".strip()] += sample.value
    # A server may show them under two prefixes.
    return dict(next(iter(by_prefix.values()))) if by_prefix else None


def spec_decode_figures(before: Counters | None, after: Counters | None) -> dict[str, Any] | None:
    """What came in between. `acceptance_length`: tokens of a sequence a step in which it had drafts; None without any."""
    if after is None:
        return None
    grown = {name: int(value - (before or {}).get(name, 0)) for name, value in after.items()}
    drafts, draft_tokens, accepted = (grown.get(name, 0) for name in _NAMES)
    positions = sorted(int(name.split()[1]) for name in grown if name.startswith(f"{_PER_POSITION} "))
    return {
        "num_drafts": drafts,
        "num_draft_tokens": draft_tokens,
        "num_accepted_tokens": accepted,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "acceptance_rate": accepted / draft_tokens if draft_tokens else None,
        "accepted_per_position": [grown[f"{_PER_POSITION} {position}"] for position in positions],
    }
