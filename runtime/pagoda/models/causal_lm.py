"""What a runner asks of a model, whoever made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pagoda.parallel.groups import ParallelGroups
from pagoda.scheduling.kv_groups import KVSpec, SharedKV
from pagoda_kernels.types import AttentionMetadata

KVCache = tuple[torch.Tensor, ...]
"""What a layer keeps, as its `KVSpec` says: keys and values, each [num_blocks, num_kv_heads, block_size, head_dim] with the KV
heads held here, or one tensor of latents."""


def allocate_kv_caches(
    specs: Sequence[KVSpec], block_size: int, allocate: Callable[[tuple[int, ...], KVSpec], torch.Tensor]
) -> list[KVCache]:
    """The cache of each layer of a whole model: `allocate` makes a tensor, given the shape of one of its blocks."""
    caches: list[KVCache] = []
    for spec in specs:
        if isinstance(spec, SharedKV):
            caches.append(caches[spec.source])
        else:
            caches.append(tuple(allocate(shape, spec) for shape in spec.page_shapes(block_size)))
    return caches


class CausalLM(nn.Module, ABC):
    """A language model, or the part of it that one rank holds: `DecoderForCausalLM`, or one that runs through transformers.

    `layer_groups`: for each layer held here, the group whose block tables it reads (`scheduling.kv_groups`).
    """

    groups: ParallelGroups
    dtype: torch.dtype
    device: torch.device
    layer_groups: list[int]

    @abstractmethod
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[KVCache],
        metadata: Sequence[AttentionMetadata],
    ) -> torch.Tensor | None:
        """One step for a ragged batch of T tokens.

        Args:
            input_ids, positions: int64 [T].
            kv_caches: one for each layer held here; written in place.
            metadata: which tokens belong together and where their keys and values are, for each group of layers.

        Returns:
            Hidden states after the final norm, [T, hidden_size], for `compute_logits`. None if this is not the last pipeline
            stage: it has sent the residual stream on.
        """

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [N, hidden_size] of the positions to predict from, to logits, float32 [N, vocab_size].

        On the last stage only, and there by all ranks. Only tensor rank 0 gets the logits, the others None: it alone samples,
        so ranks can never disagree on a token, even if their devices round differently.
        """
