"""Which layers share block tables, and how much of a cache a long sequence takes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.config.values import format_bytes
from pagoda.engine.core.kv_sizing import fit_max_model_len
from pagoda.errors import ConfigError
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.kv_groups import (
    MAX_GROUPS,
    FullAttention,
    FullGroup,
    KVGroups,
    KVSpec,
    LatentKV,
    RecurrentState,
    SharedKV,
    SlidingWindow,
    StateGroup,
    WindowGroup,
    group_layers,
    most_blocks,
    most_tokens,
)
from pagoda.scheduling.plan import StepResult
from pagoda.scheduling.scheduler import Scheduler
from tests.support.requests import make_request

BLOCK_SIZE, LENGTH = 16, 32768


def every(period: int, num_layers: int, window: int, num_kv_heads: int, head_dim: int) -> list[KVSpec]:
    """Layers of which every so many keeps all tokens."""
    full = FullAttention(num_kv_heads, head_dim)
    windowed = SlidingWindow(num_kv_heads, head_dim, window)
    return [windowed if (layer + 1) % period else full for layer in range(num_layers)]


MODELS = {
    "gemma-3-1b": every(6, 26, 512, 1, 256),
    "gemma-3-4b": every(6, 34, 1024, 4, 256),
    "gemma-3-12b": every(6, 48, 1024, 8, 256),
    "gemma-3-27b": every(6, 62, 1024, 16, 128),
    "gpt-oss-20b": every(2, 24, 128, 8, 64),
    "cohere2-7b": every(4, 32, 4096, 8, 128),
}


@pytest.mark.parametrize(
    ("model", "num_groups", "layers_a_group"),
    [
        ("gemma-3-1b", 7, 4),
        ("gemma-3-4b", 7, 5),
        ("gemma-3-12b", 6, 8),
        ("gemma-3-27b", 7, 10),
        ("gpt-oss-20b", 2, 12),
        ("cohere2-7b", 4, 8),
    ],
)
def test_layers_are_grouped_so_that_a_long_sequence_takes_least(
    model: str, num_groups: int, layers_a_group: int
) -> None:
    specs = MODELS[model]
    groups = group_layers(specs, LENGTH, BLOCK_SIZE)
    sizes = Counter(groups.group_of_layer)
    assert (len(groups), max(sizes.values())) == (num_groups, layers_a_group)
    assert groups.windows[0] is None, "a draft model uses the first group"
    for layer, group in enumerate(groups.group_of_layer):
        assert specs[layer].rule == groups.rules[group]


@pytest.mark.parametrize("model", MODELS)
def test_each_pipeline_stage_has_its_part_of_every_block(model: str) -> None:
    groups = group_layers(MODELS[model], LENGTH, BLOCK_SIZE)
    num_layers = len(MODELS[model])
    whole = groups.block_bytes(range(num_layers), 1, BLOCK_SIZE, 2)
    for stage in (range(num_layers // 2), range(num_layers // 2, num_layers)):
        assert groups.block_bytes(stage, 1, BLOCK_SIZE, 2) <= 0.61 * whole
    heads = MODELS[model][0].num_kv_heads  # type: ignore[union-attr]
    assert groups.block_bytes(range(num_layers), 2, BLOCK_SIZE, 2) == whole // min(2, heads)


@pytest.mark.parametrize("model", [name for name in MODELS if name.startswith("gemma")])
def test_kv_of_32k_tokens_is_a_quarter_or_less_of_what_one_group_takes(model: str) -> None:
    """By the equation, and by what the pool has given out while a scheduler runs the sequence."""
    specs = MODELS[model]
    groups = group_layers(specs, LENGTH, BLOCK_SIZE)
    layers = range(len(specs))
    block = groups.block_bytes(layers, 1, BLOCK_SIZE, 2)
    of_one_group = LENGTH // BLOCK_SIZE * KVGroups.one(specs).block_bytes(layers, 1, BLOCK_SIZE, 2)
    of_sequence = most_blocks(groups.rules, LENGTH, 1, BLOCK_SIZE)
    assert of_one_group >= 4 * of_sequence * block
    equation = fit_max_model_len(
        block_bytes=block,
        available_bytes=block * 10_000,
        block_size=BLOCK_SIZE,
        model_max_len=LENGTH,
        rules=groups.rules,
        max_step_tokens=2048,
        one_group_factor=groups.one_group_factor(BLOCK_SIZE),
    ).equation
    assert f"a sequence takes {of_sequence} blocks" in equation
    assert f"{of_one_group / (of_sequence * block):.1f} times less than if all layers kept all tokens" in equation

    kv = KVCacheManager(10_000, BLOCK_SIZE, groups=groups.rules, max_step_tokens=2048, enable_prefix_caching=False)
    limits = SchedulerLimits(max_num_seqs=1, max_num_batched_tokens=2048, max_model_len=LENGTH, max_num_waiting=1)
    scheduler = Scheduler(limits, kv)
    scheduler.add(make_request("a", LENGTH - 100, max_tokens=100))
    most = 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        most = max(most, kv.pool.num_in_use)
        held = kv.pool.num_in_use
        scheduler.apply(plan, StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples]))
    assert most == most_blocks(groups.rules, LENGTH - 100, 2048, BLOCK_SIZE)  # with the tokens of a step
    assert of_one_group >= 4 * held * block
    assert held <= of_sequence


def test_a_window_that_no_sequence_fills_makes_no_group() -> None:
    assert len(group_layers(every(2, 8, 4096, 8, 128), 4096, BLOCK_SIZE)) == 1
    assert len(group_layers(every(2, 8, 4096, 8, 128), 4097, BLOCK_SIZE)) == 2
    assert group_layers([SlidingWindow(8, 128, 64)] * 4, 4096, BLOCK_SIZE).windows == (64,)


def test_layers_of_different_forms_have_caches_of_their_own() -> None:
    specs = [FullAttention(2, 64), LatentKV(512, 64), FullAttention(2, 64), FullAttention(4, 32)]
    groups = group_layers(specs, 1024, BLOCK_SIZE)
    assert groups.windows.count(None) == len(groups)
    caches = groups.caches(range(4), 1)
    assert (caches[1].spec, caches[1].index) == (LatentKV(512, 64), 0)
    assert len({(groups.group_of_layer[layer], cache.form, cache.index) for layer, cache in enumerate(caches)}) == 4


SPECS = st.sampled_from([FullAttention(2, 8), FullAttention(1, 8), SlidingWindow(2, 8, 8), SlidingWindow(2, 8, 40)])


@settings(max_examples=60, deadline=None)
@given(st.lists(SPECS, min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 64))
def test_groups_and_lengths_fit_each_other(specs: list[KVSpec], longest: int, step_tokens: int) -> None:
    groups = group_layers(specs, longest, 4)
    assert len(groups) <= max(MAX_GROUPS, len(set(specs)))
    places = list(zip(groups.group_of_layer, groups.caches(range(len(specs)), 1), strict=True))
    assert len(set(places)) == len(places), "two layers of a group have the same cache"
    blocks = most_blocks(groups.rules, longest, step_tokens, 4)
    assert most_tokens(groups.rules, blocks, step_tokens, 4) >= longest
    if blocks > len(groups):
        fewer = most_tokens(groups.rules, blocks - 1, step_tokens, 4)
        assert most_blocks(groups.rules, fewer, step_tokens, 4) <= blocks - 1
        assert most_blocks(groups.rules, fewer + 1, step_tokens, 4) > blocks - 1


def test_layers_that_read_what_others_keep_change_nothing_for_those() -> None:
    own = every(3, 9, 512, 2, 64)
    alone, shared = (
        group_layers(own, LENGTH, BLOCK_SIZE),
        group_layers([*own, SharedKV(7), SharedKV(8)], LENGTH, BLOCK_SIZE),
    )
    assert shared.group_of_layer == (*alone.group_of_layer, alone.group_of_layer[7], alone.group_of_layer[8])
    assert shared.rules == alone.rules
    caches = shared.caches(range(11), 2)
    assert caches[:9] == alone.caches(range(9), 2)
    assert caches[9:] == [caches[7], caches[8]]
    assert shared.block_bytes(range(11), 2, BLOCK_SIZE, 2) == alone.block_bytes(range(9), 2, BLOCK_SIZE, 2)
    assert shared.one_group_factor(BLOCK_SIZE) == alone.one_group_factor(BLOCK_SIZE)


def test_a_request_with_a_window_alone_is_as_long_as_the_model_allows() -> None:
    fit = fit_max_model_len(
        block_bytes=100,
        available_bytes=1000,
        block_size=16,
        model_max_len=10**6,
        rules=(WindowGroup(64),),
        max_step_tokens=32,
    )
    assert fit.max_model_len == 10**6
    with pytest.raises(ConfigError, match="needs 400 B for 3 blocks, one a group of layers, of 16 tokens"):
        fit_max_model_len(
            block_bytes=100,
            available_bytes=399,
            block_size=16,
            model_max_len=64,
            rules=(FullGroup(), WindowGroup(8), WindowGroup(8)),
        )


@pytest.mark.parametrize("num_computed", [0, 1, 63, 64, 65, 100, 127, 128, 500])
@pytest.mark.parametrize("window", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_a_window_and_a_step_fit_the_most_blocks(num_computed: int, window: int, chunk: int) -> None:
    rule = WindowGroup(window)
    held = -(-(num_computed + chunk) // 16) - rule.first_needed(num_computed, 16)
    assert held <= rule.most_blocks(10**6, chunk, 16)
    first_visible = max(0, num_computed - window + 1)
    assert rule.first_needed(num_computed, 16) == first_visible // 16


# Qwen3-Next-80B, Qwen3.5-35B-A3B and a dense one: of four layers, three keep a state.
def hybrid(num_layers: int, num_kv_heads: int, key_heads: int, value_heads: int) -> list[KVSpec]:
    full, state = FullAttention(num_kv_heads, 256), RecurrentState(key_heads, value_heads, 128, 128, 3)
    return [state if (layer + 1) % 4 else full for layer in range(num_layers)]


HYBRIDS = {
    "qwen3-next-80b": (hybrid(48, 2, 16, 32), 12, 1024, 36 * (32 * 128 * 128 + 8192 * 3) * 4),
    "qwen3.5-35b-a3b": (hybrid(40, 2, 16, 32), 10, 1024, 30 * (32 * 128 * 128 + 8192 * 3) * 4),
    "qwen3.5-27b": (hybrid(64, 4, 16, 48), 16, 1024, 48 * (48 * 128 * 128 + 10240 * 3) * 4),
}


@pytest.mark.parametrize("model", HYBRIDS)
def test_a_block_is_as_large_with_keys_and_values_as_with_a_state(model: str) -> None:
    specs, layers_a_group, block_size, state_bytes = HYBRIDS[model]
    groups = group_layers(specs, LENGTH, BLOCK_SIZE)
    assert groups.least_block_size(1, 2) == groups.least_block_size(2, 2) == block_size
    groups = group_layers(specs, LENGTH, block_size)
    assert groups.rules == (FullGroup(), StateGroup(), StateGroup(), StateGroup())
    assert [(rule.kind, rule.window) for rule in groups.rules[:2]] == [("full_attention", None), ("mamba", None)]
    assert max(Counter(groups.group_of_layer).values()) == layers_a_group
    assert groups.state_bytes() == state_bytes
    keys_and_values = layers_a_group * 2 * specs[3].num_kv_heads * 256 * block_size * 2  # type: ignore[union-attr]
    block = groups.block_bytes(range(len(specs)), 1, block_size, 2)
    assert keys_and_values <= block <= 1.05 * keys_and_values, "the inputs of the convolution lie beside"
    num_states = sum(isinstance(spec, RecurrentState) for spec in specs)
    state_of_group = layers_a_group * state_bytes // num_states
    assert 0.7 * block <= state_of_group <= block
    equation = fit_max_model_len(
        block_bytes=block,
        available_bytes=block * 200,
        block_size=block_size,
        model_max_len=LENGTH,
        rules=groups.rules,
        state_bytes=groups.state_bytes(),
    ).equation
    assert "1 of full attention and 3 of recurrent state" in equation
    assert f"of which 6 blocks for its recurrent state of {format_bytes(state_bytes)}" in equation


def test_a_prefix_can_be_continued_where_its_last_state_is_cached() -> None:
    kv = KVCacheManager(12, 4, groups=(FullGroup(), StateGroup()))
    limits = SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=40, max_num_waiting=4)
    scheduler = Scheduler(limits, kv)

    def hits_of(name: str, length: int) -> int:
        request = make_request(name, length, first=0, max_tokens=1)
        scheduler.add(request)
        while scheduler.has_work:
            plan = scheduler.schedule()
            assert plan is not None
            scheduler.apply(plan, StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples]))
        return request.num_cached_tokens

    assert hits_of("a", 14) == 0
    assert hits_of("b", 14) == 12
    assert hits_of("shorter", 9) == 8, "a state is left at the end of every block"
    # The states of blocks 1 and 2 are evicted, and keys and values of all three stay.
    find = kv.pool.finder(1)
    for block in [find(key) for key in list(kv.pool._blocks_of_hashes[1])[1:3]]:
        assert block is not None
        kv.pool._forget(block)
        kv.pool._num_cached -= 1
    assert hits_of("c", 14) == 4, "up to the last border that has a state"


def test_rows_of_one_step_do_not_go_on_from_each_others_states() -> None:
    kv = KVCacheManager(40, 4, groups=(FullGroup(), StateGroup()))
    limits = SchedulerLimits(max_num_seqs=3, max_num_batched_tokens=64, max_model_len=40, max_num_waiting=4)
    scheduler = Scheduler(limits, kv)
    requests = [make_request(name, 14, first=0, max_tokens=2) for name in "abc"]
    for request in requests[:2]:
        scheduler.add(request)
    scheduler.schedule()
    scheduler.add(requests[2])
    scheduler.schedule()
    assert [request.num_cached_tokens for request in requests] == [0, 0, 12]
