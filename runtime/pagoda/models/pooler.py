"""From hidden states to vectors and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.models.encoders.config import Stored
from pagoda.models.encoders.encoder import EncoderWeights
from pagoda.models.pooling_config import HeadLayer, PoolerConfig
from pagoda.pooling.params import SCORE, TOKEN_EMBED, PoolingParams
from pagoda_kernels import backend
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PackedWeight

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "identity": lambda x: x,
}


class PoolState:
    """What is known of the hidden states of one prompt, which may come in chunks.

    Sums are float64: whatever the chunks were, the mean is the same when it is rounded to float32.
    """

    __slots__ = ("_first", "_last", "_modes", "_num_tokens", "_parts", "_sum", "_top", "_weighted")

    def __init__(self, modes: tuple[str, ...], *, keeps_tokens: bool) -> None:
        self._modes = modes
        self._num_tokens = 0
        self._parts: list[Tensor] | None = [] if keeps_tokens else None
        self._first = self._last = self._sum = self._weighted = self._top = torch.empty(0)

    def add(self, hidden: Tensor, first_position: int) -> None:
        """The hidden states [n, hidden_size] of the tokens from `first_position` on."""
        if self._parts is not None:
            self._parts.append(hidden)
            return
        is_first = self._num_tokens == 0
        self._num_tokens += len(hidden)
        for mode in self._modes:
            if mode == "last":
                self._last = hidden[-1]
            elif mode == "cls":
                self._first = hidden[0] if is_first else self._first
            elif mode == "max":
                top = hidden.amax(dim=0)
                self._top = top if is_first else torch.maximum(self._top, top)
            elif mode == "weightedmean":
                places = torch.arange(first_position + 1, first_position + 1 + len(hidden), device=hidden.device)
                weighted = (hidden.double() * places.unsqueeze(1)).sum(dim=0)
                self._weighted = weighted if is_first else self._weighted + weighted
            else:
                total = hidden.sum(dim=0, dtype=torch.float64)
                self._sum = total if is_first else self._sum + total

    def vector(self) -> Tensor:
        """The pooled vector, float32 [hidden_size times modes]."""
        count = self._num_tokens
        parts = []
        for mode in self._modes:
            if mode == "last":
                part = self._last
            elif mode == "cls":
                part = self._first
            elif mode == "max":
                part = self._top
            elif mode == "weightedmean":
                part = self._weighted / (count * (count + 1) / 2)
            else:
                part = self._sum / (count if mode == "mean" else count**0.5)
            parts.append(part.float())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tokens(self) -> Tensor:
        """The hidden states of all tokens, float32 [tokens, hidden_size]."""
        assert self._parts is not None
        return (self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)).float()


class Pooler:
    """The layers behind the pooling, in float32, and what a request wants of their output."""

    def __init__(
        self, config: PoolerConfig, directory: str | Path, prefixes: tuple[str, ...], device: torch.device
    ) -> None:
        """Reads the layers' weights. Raises `CheckpointError` for what is missing or does not fit."""
        self.config = config
        self._layers = []
        for layer in config.layers:
            weights = EncoderWeights.of(Path(directory) / layer.directory, ("", *prefixes)) if layer.names else None
            self._layers.append(_Layer(layer, weights, device))

    def finish(self, vectors: Sequence[Tensor], params: Sequence[PoolingParams]) -> list[Tensor]:
        """What each request gets of its vector, or of its tokens' vectors: float32 `[size]` or `[tokens, size]`."""
        # The layers are made for pooled vectors, and for a classifier's tokens.
        read = [index for index, one in enumerate(params) if one.task != TOKEN_EMBED]
        rows = [vector.view(-1, vector.shape[-1]) for vector in vectors]
        if read and self._layers:
            batch = torch.cat([rows[index] for index in read])
            for layer in self._layers:
                batch = layer(batch)
            for index, part in zip(read, torch.split(batch, [len(rows[index]) for index in read]), strict=True):
                rows[index] = part
        finished = [self._finish(row, one) for row, one in zip(rows, params, strict=True)]
        return [row[0] if vector.dim() == 1 else row for row, vector in zip(finished, vectors, strict=True)]

    def _finish(self, rows: Tensor, params: PoolingParams) -> Tensor:
        config = self.config
        if config.labels:
            if params.use_activation is not False:
                rows = _activated(config.activation, rows)
            return rows[:, -1:] if params.task == SCORE else rows
        if params.dimensions is not None:
            rows = rows[:, : params.dimensions]
        normalizes = config.normalizes and params.task != TOKEN_EMBED
        wants = normalizes if params.normalize is None else params.normalize
        return F.normalize(rows, dim=1) if wants or params.dimensions is not None else rows


def _activated(name: str, logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=1) if name == "softmax" else _ACTIVATIONS[name](logits)


class _Layer:
    """One layer; where the backend packs weights, a row has the same bits alone and in any batch."""

    def __init__(self, config: HeadLayer, weights: EncoderWeights | None, device: torch.device) -> None:
        self._config = config
        self._activate = _ACTIVATIONS[config.activation]
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._packed: PackedWeight | None = None
        if weights is None:
            return
        stored = Stored(config.names)
        inputs = weights.shape(stored, ".weight")[-1]
        shape = (config.outputs,) if config.kind == "layer_norm" else (config.outputs, inputs)
        weight = weights.tensor(stored, ".weight", shape).float().to(device)
        if config.has_bias:
            self._bias = weights.tensor(stored, ".bias", (config.outputs,)).float().to(device).clone()
        if config.kind == "dense" and torch.float32 in backend.active.packed_dtypes:
            self._packed = empty_packed(config.outputs, inputs, torch.float32)
            pack_into(self._packed, 0, weight)
        else:
            self._weight = weight.clone()

    def __call__(self, x: Tensor) -> Tensor:
        if self._config.kind == "normalize":
            return F.normalize(x, dim=1)
        if self._config.kind == "layer_norm":
            return F.layer_norm(x, x.shape[1:], self._weight, self._bias, self._config.eps)
        if self._packed is not None:
            return self._activate(backend.active.packed_linear(x.contiguous(), self._packed, self._bias))
        assert self._weight is not None
        return self._activate(F.linear(x, self._weight, self._bias))
