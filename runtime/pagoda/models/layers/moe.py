"""Mixture of experts: a router, and experts that are gated MLPs.

    x [T, hidden] ─▶ router ─▶ ids, weights [T, k]           one expert at a time sees the rows that chose it:
                 ├─▶ experts, grouped by id ─▶ [T, k, hidden] ─▶ weighted sum over k, in order, float32
                 └─▶ shared expert ───────────────────────────▶ added

Ranks hold a part of the units of every expert, or with expert parallelism some experts whole; in both ways the sum over the
ranks is one, as for any MLP. What a row gets depends on the row alone: its experts are summed in the order of its own choice.

Experts of floats lie in one tensor where the backend runs them as grouped products (`grouped_experts`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from pagoda.models.layer_config import DenseMLP, MoE, RouterConfig
from pagoda.models.layers.builder import LayerBuilder
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.mlp import GatedMLP, activation_of
from pagoda.models.sharding import LayerShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend
from pagoda_kernels.interface import FusedExperts
from pagoda_kernels.types import ExpertWeights

# As the operations number them.
ACTIVATIONS = ("silu", "gelu", "clamped_swiglu")


class Router(nn.Module):
    """Chooses `top_k` experts for every token, the best first, and weights them."""

    def __init__(self, config: MoE, hidden_size: int, build: LayerBuilder, prefix: str) -> None:
        super().__init__()
        self.config: RouterConfig = config.router
        self.top_k = config.top_k
        self.name = config.router_name
        self.linear = build.linear(
            prefix,
            Shard.whole(hidden_size),
            {config.router_name: Shard.whole(config.num_experts)},
            bias=config.router.bias,
            is_router=True,
        )
        self.correction_bias: nn.Parameter | None = None
        if config.router.correction_bias:
            values = torch.empty(config.num_experts, dtype=torch.float32, device=build.device)
            self.correction_bias = nn.Parameter(values, requires_grad=False)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = self.linear.weight_targets(prefix)
        if self.correction_bias is not None:
            name = f"{prefix}{self.name}.e_score_correction_bias"
            targets[name] = WeightTarget.whole(self.correction_bias)
        return targets

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden_size] to weights float32 and ids int64, each [T, top_k]."""
        logits = self.linear(x)
        if self.config.scoring == "softmax_of_chosen":
            chosen, ids = logits.topk(self.top_k, dim=-1)
            return chosen.softmax(dim=-1), ids
        scores = logits.softmax(dim=-1) if self.config.scoring == "softmax" else logits.sigmoid()
        ids = self._comparable(scores).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.config.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights if self.config.scaling == 1.0 else weights * self.config.scaling, ids

    def _comparable(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as they are compared: with the correction bias, and minus infinity outside of the best groups."""
        if self.correction_bias is not None:
            scores = scores + self.correction_bias
        num_groups = self.config.num_groups
        if num_groups == 1:
            return scores
        grouped = scores.view(len(scores), num_groups, -1)
        of_groups = grouped.topk(self.config.group_members, dim=-1).values.sum(dim=-1)
        best = of_groups.topk(self.config.top_groups, dim=-1).indices
        is_open = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~is_open.unsqueeze(2), float("-inf")).flatten(1)


class Expert(nn.Module):
    """A gated MLP over the units held here, without the sum over the ranks; its outputs are float32."""

    def __init__(
        self,
        config: DenseMLP,
        units: Shard,
        hidden_size: int,
        build: LayerBuilder,
        prefix: str,
        weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """`weights`: where the floats of both layers are kept; None: by themselves."""
        super().__init__()
        hidden = Shard.whole(hidden_size)
        gate_up, down = weights or (None, None)
        self.activate = activation_of(config.activation)
        self.gate_up_proj = build.linear(
            prefix, hidden, {"gate_proj": units, "up_proj": units}, bias=config.bias, weight=gate_up
        )
        # A bias that is summed over the ranks must be there once: each rank that has all of an expert has its own.
        has_bias = config.bias and (build.group.rank == 0 or units.is_whole)
        self.down_proj = build.linear(
            prefix, units, {"down_proj": hidden}, bias=has_bias, out_dtype=torch.float32, weight=down
        )

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {**self.gate_up_proj.weight_targets(prefix), **self.down_proj.weight_targets(prefix)}

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, hidden_size] to float32 of the same shape. `rows`: of the step that x has, None: all."""
        output: torch.Tensor = self.down_proj(self.activate(self.gate_up_proj(x, rows)), rows)
        return output


class MixtureOfExperts(nn.Module):
    """The layer that `MoE` describes."""

    def __init__(self, config: MoE, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.group = build.group
        # Set by models.fused_layers where router and experts can run as one operator.
        self.fused: FusedExperts | None = None
        self.router = Router(config, hidden_size, build, prefix)
        self.first_expert = shard.experts.start
        # How many rows chose each expert, on all ranks, since the server started; read by `expert_load`.
        self.load = torch.zeros(config.num_experts, dtype=torch.int64, device=build.device)
        # Of the experts that are here, both layers' weights, where they run as grouped products.
        self.stacks = self._allocate_stacks(shard, hidden_size, build, prefix)
        self.experts = nn.ModuleList(
            Expert(
                config.expert,
                shard.expert_units,
                hidden_size,
                build,
                f"{prefix}experts.{self.first_expert + place}.",
                None if self.stacks is None else (self.stacks[0][place], self.stacks[1][place]),
            )
            for place in range(shard.experts.length)
        )
        self.shared: Expert | None = None
        self.shared_gate: Linear | None = None
        if config.shared is not None:
            shared_prefix = f"{prefix}{config.shared_name}."
            self.shared = Expert(config.shared, shard.shared_units, hidden_size, build, shared_prefix)
            if config.shared_gate:
                parts = {f"{config.shared_name}_gate": Shard.whole(1)}
                self.shared_gate = build.linear(prefix, Shard.whole(hidden_size), parts, is_router=True)

    def _allocate_stacks(
        self, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        hidden, units = Shard.whole(hidden_size), shard.expert_units
        of_one = f"{prefix}experts.{self.first_expert}."
        if not (
            backend.active.implements("grouped_experts")
            and build.keeps_floats(of_one, hidden, {"gate_proj": units, "up_proj": units})
            and build.keeps_floats(of_one, units, {"down_proj": hidden})
        ):
            return None
        shapes = ((2 * units.size, hidden_size), (hidden_size, units.size))
        gate_up, down = (
            torch.empty((shard.experts.length, *shape), dtype=build.dtype, device=build.device) for shape in shapes
        )
        return gate_up, down

    @cached_property
    def expert_weights(self) -> ExpertWeights:
        """What `grouped_experts` takes; to be asked for when the weights are loaded, for biases are stacked then."""
        assert self.stacks is not None
        experts = [expert for expert in self.experts if isinstance(expert, Expert)]

        def stacked(biases: list[torch.Tensor]) -> torch.Tensor | None:
            return torch.stack(biases) if biases else None

        return ExpertWeights(
            gate_up=self.stacks[0],
            down=self.stacks[1],
            gate_up_bias=stacked(
                [each.gate_up_proj.bias.data for each in experts if each.gate_up_proj.bias is not None]
            ),
            down_bias=stacked([each.down_proj.bias.data for each in experts if each.down_proj.bias is not None]),
            activation=ACTIVATIONS.index(self.config.activation),
            first_expert=self.first_expert,
        )

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = self.router.weight_targets(prefix)
        for index, expert in enumerate(self.experts, start=self.first_expert):
            assert isinstance(expert, Expert)
            targets.update(expert.weight_targets(f"{prefix}experts.{index}."))
        if self.shared is not None:
            targets.update(self.shared.weight_targets(f"{prefix}{self.config.shared_name}."))
        if self.shared_gate is not None:
            targets.update(self.shared_gate.weight_targets(prefix))
        return targets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] to the same shape."""
        if self.fused is not None:
            return self.group.all_reduce(self.fused.forward(x.contiguous()))
        output = self._run_experts(x, *self.router(x))
        if self.shared is not None:
            shared = self.shared(x)
            output += shared if self.shared_gate is None else self.shared_gate(x).sigmoid_() * shared
        return self.group.all_reduce(output.to(x.dtype))

    @property
    def _has_adapters(self) -> bool:
        """Whether adapters may add to what experts compute: then those of floats run one after another, too."""
        first = next(iter(self.experts), None)
        return isinstance(first, Expert) and first.gate_up_proj.lora is not None

    def _run_experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what each token's experts give, float32 [T, hidden_size]."""
        self.load.scatter_add_(0, ids.flatten(), self.load.new_ones(1).expand(ids.numel()))
        if self.stacks is not None and not self._has_adapters:
            return backend.active.grouped_experts(x.contiguous(), weights.contiguous(), ids, self.expert_weights)
        top_k, num_experts = self.config.top_k, self.config.num_experts
        chosen = ids.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=num_experts).tolist()
        outputs = torch.zeros((len(chosen), x.shape[1]), dtype=torch.float32, device=x.device)
        by_expert = torch.split(order, counts)[self.first_expert : self.first_expert + len(self.experts)]
        for expert, rows in zip(self.experts, by_expert, strict=True):
            if len(rows):
                tokens = rows // top_k
                outputs[rows] = expert(x[tokens], tokens)
        by_choice = outputs.view(len(x), top_k, -1)
        total = by_choice[:, 0] * weights[:, :1]
        for choice in range(1, top_k):
            total.addcmul_(by_choice[:, choice], weights[:, choice : choice + 1])
        return total


def build_mlp(
    config: DenseMLP | MoE, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
) -> GatedMLP | MixtureOfExperts:
    """The layer that `config` describes; `prefix`: the name of the module."""
    if isinstance(config, MoE):
        return MixtureOfExperts(config, shard, hidden_size, build, prefix)
    return GatedMLP(config, shard.units, hidden_size, build, prefix)
