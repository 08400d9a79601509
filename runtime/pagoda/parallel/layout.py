"""The layout of ranks.

Ranks are grouped in pipeline stages, each a run of layers; the ranks of a stage share its layers by tensors:

    tensor_parallel_size 2, pipeline_parallel_size 2

                      stage 0              stage 1
                      embedding, layers    layers, norm, head
    tensor rank 0     rank 0      ──▶      rank 2  (samples: the sampling rank)
    tensor rank 1     rank 1      ──▶      rank 3

Of a mixture of experts they share each expert's units, or, with expert parallelism, the experts: each has some of them whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoordinates:
    """The coordinates of one rank: `rank = pipeline_stage * tensor_parallel_size + tensor_rank`.

    `is_sampling_rank`: this rank samples, and its results are the engine's.
    """

    rank: int
    tensor_rank: int
    pipeline_stage: int
    is_first_stage: bool
    is_last_stage: bool
    is_sampling_rank: bool


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """How many ranks share each layer's tensors, and into how many stages the layers are cut. Raises `ConfigError` below 1.

    `expert_parallel`: the ranks that share a layer's tensors share out its experts and do not cut them.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def sampling_rank(self) -> int:
        """The rank that samples: tensor rank 0 of the last stage."""
        return self.tensor_group(self.pipeline_parallel_size - 1)[0]

    def coordinates(self, rank: int) -> RankCoordinates:
        """The coordinates of `rank`. Raises `ValueError` for one that does not exist."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"there is no rank {rank} among {self.world_size}")
        stage, tensor_rank = divmod(rank, self.tensor_parallel_size)
        return RankCoordinates(
            rank=rank,
            tensor_rank=tensor_rank,
            pipeline_stage=stage,
            is_first_stage=stage == 0,
            is_last_stage=stage == self.pipeline_parallel_size - 1,
            is_sampling_rank=rank == self.sampling_rank,
        )

    def tensor_group(self, stage: int) -> range:
        """The ranks that share the tensors of a stage's layers, by tensor rank."""
        first = stage * self.tensor_parallel_size
        return range(first, first + self.tensor_parallel_size)

    def pipeline_group(self, tensor_rank: int) -> range:
        """The ranks of equal tensor rank, by stage: each hands its hidden states to the next."""
        return range(tensor_rank, self.world_size, self.tensor_parallel_size)

    def layers_of_stage(self, stage: int, num_layers: int) -> range:
        """The layers of a stage. Where they do not divide evenly the first stages have one more: the last has the head."""
        size, extra = divmod(num_layers, self.pipeline_parallel_size)
        first = stage * size + min(stage, extra)
        return range(first, first + size + (stage < extra))
