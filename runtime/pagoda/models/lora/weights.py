"""Adapters in a model: one rank's share of their weights, put into the slots of its linear layers.

layer cut by outputs (q, k, v, gate, up)    whole A, the rank's rows of B
layer cut by inputs (o, down)               the rank's columns of A, whole B: products are summed with the layer's own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import nn

from pagoda.adapters import LoraAdapter
from pagoda.errors import CheckpointError, RequestFailedError
from pagoda.models.checkpoint_files import shown_reason
from pagoda.models.config import ModelConfig
from pagoda.models.layers.linear import Linear
from pagoda.models.lora.peft import LoraCheckpoint, LoraTensors, adaptable, read_adapter, read_weights
from pagoda_kernels import backend
from pagoda_kernels.types import LORA_ALIGNMENT, PANEL

_IDLE = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What `LoraLinear.set` takes."""

    a: torch.Tensor
    b: list[torch.Tensor]
    columns: list[int]
    widths: list[int]
    scales: list[float]


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter's weights on one rank, by the places of its layers in `LoraModel`."""

    adapter: LoraAdapter
    layers: dict[int, LayerWeights] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(each.a.nbytes + sum(b.nbytes for b in each.b) for each in self.layers.values())


class LoraModel:
    """The adapters of a model's linear layers, and which rows of a step have which.

    To be made before the layers are fused. `load` may be called from any thread; all else from the one that runs steps.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, *, max_lora_rank: int, max_num_seqs: int) -> None:
        self._config = config
        self._max_lora_rank = max_lora_rank
        self._batch = backend.active.lora_batch()
        self._layers: list[Linear] = []
        for layer in model.modules():
            if isinstance(layer, Linear) and all(adaptable(f"{layer.prefix}{part}") for part in layer.parts):
                layer.lora = backend.active.lora_linear(self._batch, layer.in_features, layer.out_features)
                self._layers.append(layer)
        self._slots: dict[tuple[str, str], int] = {}
        # Of each request slot the slot of its adapter, -1: none.
        self._of_request = np.full(max_num_seqs, -1, dtype=np.int32)
        self._num_requests = 0
        self._is_set = False

    # ---- weights ---------------------------------------------------------------------------------------------------

    def load(self, adapter: LoraAdapter) -> LoadedAdapter:
        """Read this rank's share. Raises `CheckpointError`, also where its files are not of `adapter.version` any more."""
        directory = Path(adapter.path)
        checkpoint = read_adapter(directory, self._config, self._max_lora_rank)
        version, content = read_weights(directory)
        if version != adapter.version:
            raise CheckpointError(f"the files of adapter {adapter.name} in {directory} have changed: load it again")
        try:
            tensors = load_tensors(content)
        except SafetensorError as error:
            raise CheckpointError(f"{checkpoint.file} cannot be read: {shown_reason(error)}") from error
        loaded = LoadedAdapter(adapter)
        for place, layer in enumerate(self._layers):
            weights = _weights_of(layer, checkpoint, tensors)
            if weights is not None:
                loaded.layers[place] = weights
        return loaded

    def bytes_of_rank(self, rank: int, dtype: torch.dtype) -> int:
        """Memory that an adapter of that rank takes at most, with something for every layer."""
        elements = sum(len(layer.parts) * layer.in_features + layer.out_features for layer in self._layers)
        return elements * rank * dtype.itemsize

    def install(self, slot: int, loaded: LoadedAdapter) -> None:
        """Put an adapter into a slot, in place of what is there."""
        self.remove(slot)
        for place, weights in loaded.layers.items():
            lora = self._layers[place].lora
            assert lora is not None
            lora.set(slot, weights.a, weights.b, weights.columns, weights.widths, weights.scales)
        self._slots[loaded.adapter.name, loaded.adapter.version] = slot

    def remove(self, slot: int) -> None:
        """Empty a slot, and free what was in it."""
        self._slots = {key: held for key, held in self._slots.items() if held != slot}
        for layer in self._layers:
            assert layer.lora is not None
            layer.lora.clear(slot)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def enter(self, req_index: int, adapter: LoraAdapter | None) -> None:
        """A request enters a request slot. Raises `RequestFailedError` where its adapter is not here."""
        if adapter is None:
            return
        slot = self._slots.get((adapter.name, adapter.version))
        if slot is None:
            raise RequestFailedError(f"adapter {adapter.name} is not loaded")
        self._of_request[req_index] = slot
        self._num_requests += 1

    def leave(self, req_index: int) -> None:
        """A request slot is released; it may be empty already."""
        if self._of_request[req_index] >= 0:
            self._of_request[req_index] = -1
            self._num_requests -= 1

    def begin_step(self, req_indices: np.ndarray, num_tokens: np.ndarray) -> None:
        """The next step has so many tokens of these request slots, in this order."""
        slots = self._of_request[req_indices] if self._num_requests else _IDLE
        if (slots >= 0).any():
            self._batch.set(torch.from_numpy(slots.repeat(num_tokens)))
            self._is_set = True
        elif self._is_set:
            self._batch.set(None)
            self._is_set = False


def _weights_of(layer: Linear, checkpoint: LoraCheckpoint, stored: Mapping[str, torch.Tensor]) -> LayerWeights | None:
    """This rank's share of what an adapter has for the parts of `layer`; None: nothing."""
    found: list[tuple[LoraTensors, int, int]] = []
    a, b = [], []
    column = 0
    for part, shard in layer.parts.items():
        tensors = checkpoint.layers.get(f"{layer.prefix}{part}")
        if tensors is not None:
            outputs = slice(tensors.first_row + shard.start, tensors.first_row + shard.start + shard.length)
            a.append(stored[tensors.a][:, layer.inputs.slice])
            b.append(stored[tensors.b][outputs])
            found.append((tensors, column, shard.length))
        column += shard.size
    if not found:
        return None
    dtype = _common_dtype([*a, *b], layer.out_dtype)
    return LayerWeights(
        a=_padded(torch.cat(a).to(dtype).T),
        b=[_in_panels(each.to(dtype)) for each in b],
        columns=[column for _, column, _ in found],
        widths=[width for _, _, width in found],
        scales=[tensors.scale for tensors, _, _ in found],
    )


def _common_dtype(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the model is, or where it holds all values exactly; else float32."""
    narrow = torch.bfloat16
    if dtype == narrow or all(torch.equal(each.to(narrow).to(each.dtype), each) for each in tensors):
        return narrow
    return torch.float32


def _in_panels(b: torch.Tensor) -> torch.Tensor:
    """B [outputs, rank] as `LoraLinear.set` takes it."""
    padded = F.pad(b, (0, 0, 0, -b.shape[0] % PANEL))
    return padded.view(-1, PANEL, b.shape[1]).transpose(1, 2).contiguous()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """A copy of [rows, columns] with columns of zeros up to a multiple of `LORA_ALIGNMENT`."""
    padded: torch.Tensor = F.pad(x, (0, -x.shape[1] % LORA_ALIGNMENT))
    return padded.contiguous()
