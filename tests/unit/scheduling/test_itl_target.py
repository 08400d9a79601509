"""With a target, 99 of 100 times between tokens keep to it while prompts are computed, and prompts go on."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.timed_engine import TimedEngine


@settings(max_examples=12, deadline=None)
@given(
    fixed=st.floats(0.001, 0.05),
    per_token=st.floats(0.0001, 0.002),
    num_streams=st.integers(1, 16),
    room=st.floats(1.3, 20),
    noise=st.floats(0, 0.25),
    seed=st.integers(0, 2**16),
)
def test_p99_between_tokens_holds_the_target(
    fixed: float, per_token: float, num_streams: int, room: float, noise: float, seed: int
) -> None:
    rng = random.Random(seed)
    alone = fixed + per_token * num_streams
    target = room * alone * (1 + noise)
    engine = TimedEngine(
        fixed=fixed,
        per_token=per_token,
        noise=lambda: 1 + noise * rng.uniform(-1, 1),
        long_prefill_token_threshold=None,
        target_itl_ms=1000 * target,
    )
    streams = [engine.add("a", 8, 600) for _ in range(num_streams)]
    prompts = []
    while any(len(engine.token_times[stream.spec.request_id]) < 500 for stream in streams):
        if not prompts or engine.token_times[prompts[-1].spec.request_id]:
            prompts.append(engine.add("a", 4096, 1))
        assert engine.step()
    for stream in streams:
        times = engine.token_times[stream.spec.request_id][60:]  # what a token costs is learned first
        gaps = sorted(after - before for before, after in pairwise(times))
        assert gaps[int(0.98 * len(gaps))] <= 1.001 * target
    mixed = [plan.total_tokens - num_streams for plan in engine.plans[60:] if plan.total_tokens > num_streams]
    used = sum(mixed) / len(mixed) * per_token + alone
    most = min(target, fixed + per_token * 512)
    assert used >= 0.4 * most, "chunks are as long as the target allows, but for noise"


def test_a_target_below_what_the_rows_take_alone_leaves_prompts_a_tenth() -> None:
    engine = TimedEngine(fixed=0.1, per_token=0.001, long_prefill_token_threshold=None, target_itl_ms=50)
    stream = engine.add("a", 8, 600)
    prompt = engine.add("a", 2000, 1)
    engine.run_until(lambda: bool(engine.token_times[prompt.spec.request_id]), max_steps=300)
    gaps = [after - before for before, after in pairwise(engine.token_times[stream.spec.request_id][20:])]
    assert max(gaps) < 1.25 * 0.101
