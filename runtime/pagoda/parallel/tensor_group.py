"""What the ranks of a tensor-parallel group do together."""

from __future__ import annotations

import torch


class TensorParallelGroup:
    """The ranks that share the tensors of a layer. This one is a rank alone; subclasses are several."""

    rank = 0
    size = 1
    num_operations = 0
    """Collectives that were begun: ranks that have begun equally many are in step with each other."""

    def count_replayed(self, num_operations: int) -> None:
        """Count the collectives of a step that was captured: as a graph they run without any of the calls below."""
        self.num_operations += num_operations

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `values`, the same to the last bit on each; `values` may be overwritten."""
        return values

    def all_gather(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' `values`, of equal shapes, one after the other along `dim`, in the order of ranks."""
        return values

    def gather(self, values: torch.Tensor, dim: int) -> torch.Tensor | None:
        """Like `all_gather`, on tensor rank 0 only; None on the others."""
        return values

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The `values` of tensor rank 0, written into those of the others (of equal shape and dtype)."""
        return values

    def close(self) -> None:
        """Leave: other ranks that still wait for this one fail."""
