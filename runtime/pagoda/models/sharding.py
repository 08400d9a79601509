"""What of a model each rank holds.

tensor_parallel_size 2         rank 0                     rank 1
q_proj  [heads × d, hidden]    rows of the first heads    rows of the others         nothing to exchange
o_proj  [hidden, heads × d]    columns of the first       columns of the others      outputs are summed
gate, up, down                 like q and o, by halves of intermediate_size
k_proj, v_proj                 like q; where there are fewer KV heads than ranks, ranks hold the same one
embedding, lm_head             the first half of the vocabulary, the second one      rows are summed, logits gathered
norms                          all                        all
"""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.errors import ConfigError
from pagoda.models.config import ModelConfig
from pagoda.models.layer_config import DeltaNetConfig, LayerConfig, MoE
from pagoda.parallel.layout import ParallelLayout
from pagoda.scheduling.kv_groups import SharedKV


@dataclass(frozen=True, slots=True)
class Shard:
    """Elements `start .. start + length - 1` of a dimension of `full_size`, with `padding` of no meaning behind them here."""

    full_size: int
    start: int
    length: int
    padding: int = 0

    @classmethod
    def whole(cls, size: int) -> Shard:
        """All of a dimension."""
        return cls(size, 0, size)

    @classmethod
    def even(cls, size: int, rank: int, num_ranks: int) -> Shard:
        """The share of `rank` among `num_ranks` equal ones; where they do not divide, the last ones are padded."""
        each = -(-size // num_ranks)
        start = min(size, rank * each)
        length = min(each, size - start)
        return cls(size, start, length, each - length)

    @property
    def size(self) -> int:
        """Elements that are allocated here."""
        return self.length + self.padding

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the dimension."""
        return self.length == self.full_size

    @property
    def slice(self) -> slice:
        """Where the elements are in the full dimension."""
        return slice(self.start, self.start + self.length)

    def times(self, factor: int) -> Shard:
        """The same share where every element is `factor` ones."""
        return Shard(self.full_size * factor, self.start * factor, self.length * factor, self.padding * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShard:
    """The part of one layer that a rank holds: query heads, the KV heads that they read (of a recurrent layer: value heads,
    and key heads), units of the MLP, and of a mixture some experts or all, units of each, and of the shared one."""

    heads: Shard
    kv_heads: Shard
    head_dim: int
    units: Shard
    experts: Shard
    expert_units: Shard
    shared_units: Shard
    is_recurrent: bool = False

    @classmethod
    def of(cls, layer: LayerConfig, rank: int, num_ranks: int, *, expert_parallel: bool = False) -> LayerShard:
        """The part of `rank` among `num_ranks`."""
        attention, mlp = layer.attention, layer.mlp
        mixture = layer.mixture
        num_experts, size = (0, 0) if mixture is None else (mixture.num_experts, mixture.size)
        experts, expert_units = Shard.whole(num_experts), Shard.even(size, rank, num_ranks)
        if expert_parallel:
            experts, expert_units = Shard.even(num_experts, rank, num_ranks), Shard.whole(size)
        if num_ranks > attention.num_kv_heads:
            kv_heads = Shard(attention.num_kv_heads, rank * attention.num_kv_heads // num_ranks, 1)
        else:
            kv_heads = Shard.even(attention.num_kv_heads, rank, num_ranks)
        return cls(
            heads=Shard.even(attention.num_heads, rank, num_ranks),
            kv_heads=kv_heads,
            head_dim=attention.head_dim,
            units=Shard.even(mlp.size, rank, num_ranks),
            experts=experts,
            expert_units=expert_units,
            shared_units=Shard.even(0 if mixture is None else mixture.shared_size, rank, num_ranks),
            is_recurrent=isinstance(attention, DeltaNetConfig),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShard:
    """The part of a model that one rank holds: a run of layers, its part of each, and of the tokens of the vocabulary.

    `has_embedding`: the rank is of the first stage; `has_head`: of the last, with the final norm and the language model head.
    """

    layers: range
    layer_shards: tuple[LayerShard, ...]
    vocabulary: Shard
    has_embedding: bool
    has_head: bool

    @classmethod
    def of(cls, config: ModelConfig, layout: ParallelLayout, rank: int) -> ModelShard:
        """The part of `rank`. The layout must have passed `check_layout`."""
        coordinates, num_ranks = layout.coordinates(rank), layout.tensor_parallel_size
        layers = layout.layers_of_stage(coordinates.pipeline_stage, config.num_layers)
        shards = {
            layer: LayerShard.of(layer, coordinates.tensor_rank, num_ranks, expert_parallel=layout.expert_parallel)
            for layer in dict.fromkeys(config.layers)
        }
        return cls(
            layers=layers,
            layer_shards=tuple(shards[config.layers[index]] for index in layers),
            vocabulary=Shard.even(config.vocab_size, coordinates.tensor_rank, num_ranks),
            has_embedding=coordinates.is_first_stage,
            has_head=coordinates.is_last_stage,
        )

    @property
    def heads(self) -> Shard:
        """Query heads of the layer that has most of them here."""
        return self._most([layer.heads for layer in self.layer_shards if not layer.is_recurrent])

    @property
    def kv_heads(self) -> Shard:
        """KV heads of the layer that has most of them here."""
        return self._most([layer.kv_heads for layer in self.layer_shards if not layer.is_recurrent])

    @staticmethod
    def _most(shards: list[Shard]) -> Shard:
        return max(shards, key=lambda shard: shard.size, default=Shard.whole(1))


def check_layout(config: ModelConfig, layout: ParallelLayout) -> None:
    """Raise `ConfigError`, with the numbers and what is possible, if the model cannot be cut like this."""
    problems = []
    size = layout.tensor_parallel_size
    if config.transformers is not None and layout.world_size > 1:
        raise ConfigError(
            f"tensor_parallel_size={size}, pipeline_parallel_size={layout.pipeline_parallel_size}: {config.architecture} runs "
            "through transformers (model_impl), on one rank only"
        )
    experts = layout.expert_parallel
    if reasons := _tensor_problems(config, size, experts):
        possible = [str(n) for n in range(1, config.num_heads + 1) if not _tensor_problems(config, n, experts)]
        problems.append(
            f"tensor_parallel_size={size} does not fit this model: {'; '.join(reasons)}. Possible: {', '.join(possible)}"
        )
    stages = layout.pipeline_parallel_size
    shares = config.per_layer_inputs is not None or any(isinstance(spec, SharedKV) for spec in config.kv_specs)
    if stages > 1 and shares:
        problems.append(
            f"pipeline_parallel_size={stages}: layers of {config.architecture} read keys and values of others, or have inputs "
            "of their own, which stages do not send each other. Possible: 1"
        )
    if stages > config.num_layers:
        problems.append(
            f"pipeline_parallel_size={stages}: every stage needs a layer, and this model has {config.num_layers}. "
            f"Possible: 1 to {config.num_layers}"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _tensor_problems(config: ModelConfig, size: int, expert_parallel: bool) -> list[str]:
    problems: dict[str, None] = {}
    for layer in dict.fromkeys(config.layers):
        attention, mlp = layer.attention, layer.mlp
        is_recurrent = isinstance(attention, DeltaNetConfig)
        if is_recurrent and attention.num_kv_heads % size:
            problems[f"its {attention.num_kv_heads} key heads of recurrent layers are not a multiple of {size}"] = None
        if not is_recurrent and attention.num_heads % size:
            problems[f"its {attention.num_heads} attention heads cannot be shared evenly by {size} ranks"] = None
        if not is_recurrent and attention.num_kv_heads % size and size % attention.num_kv_heads:
            problems[f"its {attention.num_kv_heads} KV heads are neither a multiple nor a divisor of {size}"] = None
        mixture, sizes = layer.mixture, {}
        if not isinstance(mlp, MoE):
            sizes["intermediate_size"] = mlp.size
        if mixture is not None:
            sizes["shared expert intermediate_size"] = mixture.shared_size
            if not expert_parallel:
                sizes["expert intermediate_size"] = mixture.size
            elif size > mixture.num_experts:
                problems[f"its {mixture.num_experts} experts are fewer than {size}"] = None
        for name, units in sizes.items():
            if units % size:
                problems[f"its {name} {units} is not a multiple of {size}"] = None
    return list(problems)
