"""The layer for multi-token prediction (DeepSeek-V3, section 2.2), which drafts from the model's last hidden states.

hidden state of the model at position p, behind its final norm ─ hnorm ──╮
                                     token at p + 1 ─ embed ─ enorm ─▶ concat [2H] ─ eh_proj ─▶ decoder layer ─▶ [H]
                                                                                                     │
                hidden state of p + 1, where the model has not been yet ◀────────────────────────────┤
                                                  token at p + 2 ◀── the model's head ◀── norm ──────╯
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from typing_extensions import override

from pagoda.models.causal_lm import KVCache
from pagoda.models.decoder import DecoderForCausalLM, DecoderLayer
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.loading.packed import pack_linear
from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda_kernels.types import AttentionMetadata

_LAYER = "model.layers.0."


class MTPLayer(DecoderForCausalLM):
    """The layer with embedding, norm and head, whole on one rank; of `read_mtp_config`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        hidden = self.config.hidden_size
        self.enorm, self.hnorm = self.builder.rms_norm(hidden), self.builder.rms_norm(hidden)
        # A float in every checkpoint, quantized or not.
        self.eh_proj = Linear(
            Shard.whole(2 * hidden), {"eh_proj": Shard.whole(hidden)}, bias=False, dtype=self.dtype, device=self.device
        )
        self._has_own_ends = True

    def share_ends(self, target: DecoderForCausalLM) -> None:
        """Take embedding and head of the model `target`, of one rank, instead of ones of its own."""
        self.embed_tokens, self.lm_head = target.embed_tokens, target.lm_head
        self._has_own_ends = False

    @override
    def weight_targets(self) -> dict[str, WeightTarget]:
        assert self.norm is not None
        targets = (
            super().weight_targets()
            if self._has_own_ends
            else {**self._decoder_layer.weight_targets(_LAYER), **self.norm.weight_targets("model.norm.")}
        )
        return {
            **targets,
            **self.enorm.weight_targets(f"{_LAYER}enorm."),
            **self.hnorm.weight_targets(f"{_LAYER}hnorm."),
            **self.eh_proj.weight_targets(_LAYER),
        }

    @override
    def tied_weights(self) -> dict[str, str]:
        return super().tied_weights() if self._has_own_ends else {}

    @property
    def _decoder_layer(self) -> DecoderLayer:
        (layer,) = self.layers
        assert isinstance(layer, DecoderLayer)
        return layer

    def draft(
        self,
        token_ids: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MTPHead.forward`."""
        assert self.embed_tokens is not None
        assert self.norm is not None
        joined = torch.cat((self.enorm(self.embed_tokens(token_ids))[0], self.hnorm(states)[0]), dim=-1)
        rotary = self.rotary_embeddings[0](positions)
        hidden, residual = self._decoder_layer(self.eh_proj(joined), None, rotary, kv_cache, metadata)
        normed, stream = self.norm(hidden, residual)
        return normed, stream


class MTPHead(nn.Module):
    """`layer` as what `execution.head_drafter` runs, for the model whose final norm is `norm`."""

    def __init__(self, layer: MTPLayer, norm: RMSNorm, num_layers: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.aux_layers: Sequence[int] = (num_layers,)

    def pack(self) -> None:
        """Put the projection in the form of the CPU's kernels, once it is loaded."""
        pack_linear(self.layer.eh_proj)

    def features_of(self, states: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the model's last layer, [T, hidden_size], to the hidden states that are read."""
        # Not by a call: what is called of the model's modules may be recorded (`AuxHiddenStates`).
        normed: torch.Tensor = self.norm.forward(states)[0]
        return normed

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Eagle3Head.forward`."""
        return self.layer.draft(token_ids, features, positions, kv_cache, metadata)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] to float32 [N, vocab_size]."""
        logits = self.layer.compute_logits(hidden)
        assert logits is not None, "a layer of one rank has its logits"
        return logits

    def best_token(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the token with the greatest logit, int64 [N], and that logit."""
        best, chosen = self.compute_logits(hidden).max(dim=-1)
        return chosen, best
