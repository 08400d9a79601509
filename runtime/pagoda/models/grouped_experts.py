"""Experts as DeepSeek has them: chosen among those of the best groups, beside shared ones, behind some dense layers."""

from __future__ import annotations

from pagoda.errors import CheckpointError
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    read_activation,
    read_expert_size,
    read_multiplier,
    read_num_experts,
    read_num_layers,
    read_top_k,
)
from pagoda.models.layer_config import DenseMLP, MoE, RouterConfig

_MAX_SHARED_EXPERTS = 64


def read_router(
    reader: ConfigReader,
    num_experts: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    group_members: int = 2,
    scaling: float = 1.0,
    normalize: bool = True,
    has_groups: bool = True,
    sigmoid: bool = True,
) -> RouterConfig:
    """`n_group`, `topk_group`, `routed_scaling_factor` and `norm_topk_prob`, with these defaults. `sigmoid`: scores are
    corrected sigmoids (DeepSeek V3); else a softmax. Without `has_groups`, groups are not looked at."""
    groups = best = 1
    if has_groups:
        groups = reader.optional_integer("n_group", num_groups) or 1
        best = reader.optional_integer("topk_group", min(top_groups, groups), high=groups) or 1
    if num_experts % groups or (groups > 1 and num_experts // groups < group_members):
        raise CheckpointError(
            f"{reader.where}: n_routed_experts={num_experts} cannot be divided into n_group={groups} groups of "
            f"{group_members} or more"
        )
    return RouterConfig(
        scoring="sigmoid" if sigmoid else "softmax",
        normalize=reader.flag("norm_topk_prob", normalize),
        scaling=read_multiplier(reader, "routed_scaling_factor", scaling),
        correction_bias=sigmoid,
        num_groups=groups,
        top_groups=best,
        group_members=group_members,
    )


def read_routed_experts(reader: ConfigReader, default: int | None) -> int:
    """`n_routed_experts`; it must be given where `default` is None."""
    return read_num_experts(reader, ("n_routed_experts", "num_local_experts"), default)


def read_experts(
    reader: ConfigReader, router: RouterConfig, num_experts: int, *, top_k: int | None, size: int, num_shared: int
) -> MoE:
    """The mixture; `top_k`, `size` and `num_shared` are defaults."""
    size = read_expert_size(reader, "moe_intermediate_size", size)
    return MoE(
        num_experts=num_experts,
        top_k=read_top_k(reader, num_experts // router.num_groups * router.top_groups, default=top_k),
        size=size,
        activation=read_activation(reader),
        router=router,
        shared_size=size * (reader.optional_integer("n_shared_experts", num_shared, high=_MAX_SHARED_EXPERTS) or 0),
        shared_name="shared_experts",
    )


def read_dense_first(reader: ConfigReader, default: int, dense: DenseMLP, experts: MoE) -> list[DenseMLP | MoE]:
    """Of each layer: experts but in the first `first_k_dense_replace`."""
    frequency = reader.integer("moe_layer_freq", 1)
    if frequency != 1:
        raise CheckpointError(f"{reader.where}: moe_layer_freq={frequency} is not supported; supported: 1")
    num_layers = read_num_layers(reader)
    num_dense = min(num_layers, reader.optional_integer("first_k_dense_replace", default, low=0) or 0)
    return [*[dense] * num_dense, *[experts] * (num_layers - num_dense)]
