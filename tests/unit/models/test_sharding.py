"""How a model is cut up for ranks, and which cuts are refused. No torch is imported for it."""

from __future__ import annotations

from typing import Any

import pytest

from pagoda.errors import ConfigError
from pagoda.models.config import ModelConfig
from pagoda.models.sharding import ModelShard, Shard, check_layout
from pagoda.parallel.layout import ParallelLayout


def config_of(**values: Any) -> ModelConfig:
    defaults = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 101,
        "hidden_size": 60,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return ModelConfig.from_dicts({**defaults, **values})


def test_ranks_of_a_stage_are_neighbours_and_the_last_stage_samples() -> None:
    layout = ParallelLayout(2, 3)
    places = [layout.coordinates(rank) for rank in range(6)]
    assert [(place.pipeline_stage, place.tensor_rank) for place in places] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert [place.rank for place in places if place.is_sampling_rank] == [layout.sampling_rank] == [4]
    assert [place.rank for place in places if place.is_first_stage] == [0, 1]
    assert [place.rank for place in places if place.is_last_stage] == [4, 5]
    assert list(layout.tensor_group(1)) == [2, 3]
    assert list(layout.pipeline_group(1)) == [1, 3, 5]
    with pytest.raises(ValueError, match="no rank 6 among 6"):
        layout.coordinates(6)


@pytest.mark.parametrize(("stages", "sizes"), [(1, [7]), (2, [4, 3]), (3, [3, 2, 2]), (7, [1] * 7)])
def test_stages_have_all_layers_between_them_in_order(stages: int, sizes: list[int]) -> None:
    runs = [ParallelLayout(1, stages).layers_of_stage(stage, 7) for stage in range(stages)]
    assert [len(run) for run in runs] == sizes
    assert [layer for run in runs for layer in run] == list(range(7))


def test_layout_of_no_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel_size=0: must be at least 1"):
        ParallelLayout(1, 0)


@pytest.mark.parametrize(("size", "num_ranks"), [(8, 1), (8, 4), (101, 4), (3, 4), (5, 4)])
def test_even_shards_cover_a_dimension_once_with_padding_at_the_end(size: int, num_ranks: int) -> None:
    shards = [Shard.even(size, rank, num_ranks) for rank in range(num_ranks)]
    covered = [element for shard in shards for element in range(size)[shard.slice]]
    assert covered == list(range(size))
    assert len({shard.size for shard in shards}) == 1, "collectives need equal shapes"
    padded = [bool(shard.padding) for shard in shards]
    assert padded == sorted(padded), "padding between shards would shift the vocabulary"


def test_kv_heads_are_shared_where_there_are_fewer_than_ranks() -> None:
    shards = [ModelShard.of(config_of(), ParallelLayout(8, 1), rank) for rank in range(8)]
    assert [shard.kv_heads.start for shard in shards] == [0, 0, 0, 0, 1, 1, 1, 1]
    for shard in shards:
        # Every query head finds the KV head of its group: 8 heads in 2 groups of 4.
        assert shard.kv_heads.start == shard.heads.start // 4
        assert shard.kv_heads.size == 1


def test_kv_memory_is_that_of_the_layers_and_heads_of_the_rank() -> None:
    config = config_of()
    groups = config.kv_groups(16)

    def block_bytes(layout: ParallelLayout, rank: int) -> int:
        shard = ModelShard.of(config, layout, rank)
        return groups.block_bytes(shard.layers, layout.tensor_parallel_size, 16, 2)

    assert block_bytes(ParallelLayout(), 0) == 16 * config.kv_bytes_per_token(2)
    assert block_bytes(ParallelLayout(2, 2), 0) == 16 * 2 * 4 * 1 * 16 * 2
    assert block_bytes(ParallelLayout(4, 2), 7) == 16 * 2 * 3 * 1 * 16 * 2


@pytest.mark.parametrize(
    ("layout", "values", "message"),
    [
        (
            (3, 1),
            {"intermediate_size": 96},
            "tensor_parallel_size=3 does not fit this model: its 8 attention heads cannot be shared evenly by 3 ranks; "
            "its 2 KV heads are neither a multiple nor a divisor of 3. Possible: 1, 2, 4, 8",
        ),
        ((16, 1), {}, "its 8 attention heads cannot be shared evenly by 16 ranks. Possible: 1, 2, 4, 8"),
        ((4, 1), {"intermediate_size": 98}, "its intermediate_size 98 is not a multiple of 4. Possible: 1, 2"),
        (
            (4, 1),
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            "its 6 KV heads are neither a multiple nor a divisor of 4. Possible: 1, 2, 3, 6, 12",
        ),
        (
            (1, 8),
            {},
            "pipeline_parallel_size=8: every stage needs a layer, and this model has 7. Possible: 1 to 7",
        ),
    ],
)
def test_layout_that_cannot_be_is_refused_with_the_numbers_and_what_can(
    layout: tuple[int, int], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_layout(config_of(**values), ParallelLayout(*layout))
    assert message in str(refusal.value)


def test_both_sizes_are_named_where_both_are_wrong() -> None:
    with pytest.raises(ConfigError, match=r"(?s)tensor_parallel_size=5.*pipeline_parallel_size=9"):
        check_layout(config_of(), ParallelLayout(5, 9))


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 7), (8, 2)])
def test_possible_layouts_pass(layout: tuple[int, int]) -> None:
    check_layout(config_of(), ParallelLayout(*layout))
