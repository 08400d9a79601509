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
from pagoda.parallel.layout import ParallelLayout


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
class ModelShard:
    """The part of a model that one rank holds, in layers, heads, units of the MLP and tokens of the vocabulary.

    `has_embedding`: the rank is of the first stage; `has_head`: of the last, with the final norm and the language model head.
    """

    layers: range
    heads: Shard
    kv_heads: Shard
    intermediate: Shard
    vocabulary: Shard
    has_embedding: bool
    has_head: bool
    head_dim: int

    @classmethod
    def of(cls, config: ModelConfig, layout: ParallelLayout, rank: int) -> ModelShard:
        """The part of `rank`. The layout must have passed `check_layout`."""
        coordinates, num_ranks = layout.coordinates(rank), layout.tensor_parallel_size
        if num_ranks > config.num_kv_heads:
            kv_heads = Shard(config.num_kv_heads, coordinates.tensor_rank * config.num_kv_heads // num_ranks, 1)
        else:
            kv_heads = Shard.even(config.num_kv_heads, coordinates.tensor_rank, num_ranks)
        return cls(
            layers=layout.layers_of_stage(coordinates.pipeline_stage, config.num_layers),
            heads=Shard.even(config.num_heads, coordinates.tensor_rank, num_ranks),
            kv_heads=kv_heads,
            intermediate=Shard.even(config.intermediate_size, coordinates.tensor_rank, num_ranks),
            vocabulary=Shard.even(config.vocab_size, coordinates.tensor_rank, num_ranks),
            has_embedding=coordinates.is_first_stage,
            has_head=coordinates.is_last_stage,
            head_dim=config.head_dim,
        )

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that one token's keys and values take in the layers and heads held here, at `dtype_bytes` an element."""
        return 2 * len(self.layers) * self.kv_heads.size * self.head_dim * dtype_bytes


def check_layout(config: ModelConfig, layout: ParallelLayout) -> None:
    """Raise `ConfigError`, with the numbers and what is possible, if the model cannot be cut like this."""
    problems = []
    size = layout.tensor_parallel_size
    if reasons := _tensor_problems(config, size):
        possible = [str(n) for n in range(1, config.num_heads + 1) if not _tensor_problems(config, n)]
        problems.append(
            f"tensor_parallel_size={size} does not fit this model: {'; '.join(reasons)}. Possible: {', '.join(possible)}"
        )
    stages = layout.pipeline_parallel_size
    if stages > config.num_layers:
        problems.append(
            f"pipeline_parallel_size={stages}: every stage needs a layer, and this model has {config.num_layers}. "
            f"Possible: 1 to {config.num_layers}"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _tensor_problems(config: ModelConfig, size: int) -> list[str]:
    problems = []
    if config.num_heads % size:
        problems.append(f"its {config.num_heads} attention heads cannot be shared evenly by {size} ranks")
    if config.num_kv_heads % size and size % config.num_kv_heads:
        problems.append(f"its {config.num_kv_heads} KV heads are neither a multiple nor a divisor of {size}")
    if config.intermediate_size % size:
        problems.append(f"its intermediate_size {config.intermediate_size} is not a multiple of {size}")
    return problems
