"""Figures of speculative decoding from two scrapes of a server's metrics."""

from __future__ import annotations

import pytest

from pagoda.benchmarking.spec_decode import counters_of, spec_decode_figures


def exposition(prefix: str, drafts: int, tokens: int, accepted: list[int], replicas: int = 1) -> str:
    lines = []
    for name, value in (("drafts", drafts), ("draft_tokens", tokens), ("accepted_tokens", sum(accepted))):
        lines.append(f"# TYPE {prefix}spec_decode_num_{name}_total counter")
        lines += [f'{prefix}spec_decode_num_{name}_total{{replica="{n}"}} {value}.0' for n in range(replicas)]
    lines.append(f"# TYPE {prefix}spec_decode_num_accepted_tokens_per_pos_total counter")
    lines += [
        f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{position="{position}",replica="{n}"}} {count}.0'
        for position, count in enumerate(accepted)
        for n in range(replicas)
    ]
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("prefix", ["pagoda_", "vllm:"])
def test_acceptance_is_what_came_between_two_scrapes_over_all_replicas(prefix: str) -> None:
    before = counters_of(exposition(prefix, 10, 30, [8, 4, 1], replicas=2))
    after = counters_of(exposition(prefix, 30, 90, [20, 14, 3], replicas=2))
    figures = spec_decode_figures(before, after)
    assert figures == {
        "num_drafts": 40,
        "num_draft_tokens": 120,
        "num_accepted_tokens": 48,
        "acceptance_length": pytest.approx(2.2),
        "acceptance_rate": pytest.approx(0.4),
        "accepted_per_position": [24, 20, 4],
    }


def test_counters_under_two_prefixes_count_once() -> None:
    text = exposition("pagoda_", 10, 30, [8]) + exposition("vllm:", 10, 30, [8])
    figures = spec_decode_figures(None, counters_of(text))
    assert figures is not None
    assert figures["num_drafts"] == 10


def test_server_without_speculative_decoding_or_without_drafts() -> None:
    assert counters_of("# TYPE up gauge\nup 1.0\n") is None
    assert spec_decode_figures(None, None) is None
    figures = spec_decode_figures(None, counters_of(exposition("pagoda_", 0, 0, [])))
    assert figures is not None
    assert figures["acceptance_length"] is None
