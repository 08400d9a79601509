"""Adapters in a model: one rank's share of their weights, put into the slots of its linear layers.

layer cut by outputs (q, k, v, gate, up)    whole A, the rank's rows of B
layer cut by inputs (o, down)               the rank's columns of A, whole B: products are summed with the layer's own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from pagoda.adapters import LoraAdapter
from pagoda.errors import CheckpointError, RequestFailedError
from pagoda.models.causal_lm import CausalLM
from pagoda.models.checkpoint_files import shown_name, shown_reason
from pagoda.models.config import ModelConfig
from pagoda.models.layers.linear import Linear
from pagoda.models.lora.peft import LoraCheckpoint, LoraTensors, adaptable, read_adapter, read_weights
from pagoda_kernels import backend
from pagoda_kernels.types import LORA_ALIGNMENT, PANEL, LoraLimits

_IDLE = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What `LoraLinear.set` takes."""

    a: torch.Tensor
    b: list[torch.Tensor]
    columns: list[int]
    widths: list[int]
    scales: list[float]

    def on(self, limits: LoraLimits) -> LayerWeights:
        """On the model's device, in its dtype."""
        a, *b = (each.to(limits.device, limits.dtype) for each in (self.a, *self.b))
        return replace(self, a=a, b=b)


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
    `assumes_adapters`: steps are run as if some rows had adapters, to see what they take and to compile what they need.
    """

    def __init__(self, model: CausalLM, config: ModelConfig, limits: LoraLimits, *, max_num_seqs: int) -> None:
        self._config = config
        self._limits = limits
        self._batch = backend.active.lora_batch(limits)
        self._layers: list[Linear] = []
        # On a GPU experts run as grouped products, to which nothing is added yet.
        self._serves_experts = limits.device.type == "cpu"
        for layer in model.modules():
            if not isinstance(layer, Linear) or not all(adaptable(f"{layer.prefix}{part}") for part in layer.parts):
                continue
            if self._serves_experts or ".experts." not in layer.prefix:
                layer.lora = backend.active.lora_linear(self._batch, layer.in_features, layer.out_features)
                self._layers.append(layer)
        self._slots: dict[tuple[str, str], int] = {}
        # Of each request slot the slot of its adapter, -1: none. A step that is run for its memory may have more of them.
        self._of_request = np.full(max(max_num_seqs, limits.max_num_tokens), -1, dtype=np.int32)
        self._num_requests = 0
        self._is_set = False
        self.assumes_adapters = False

    # ---- weights ---------------------------------------------------------------------------------------------------

    def load(self, adapter: LoraAdapter) -> LoadedAdapter:
        """Read this rank's share. Raises `CheckpointError`, also where its files are not of `adapter.version` any more."""
        directory = Path(adapter.path)
        checkpoint = read_adapter(directory, self._config, self._limits.max_rank)
        of_expert = next((name for name in checkpoint.layers if ".experts." in name), None)
        if of_expert is not None and not self._serves_experts:
            raise CheckpointError(
                f"{checkpoint.file}: {of_expert}: adapters of experts are served on a CPU only; those of attention and shared "
                "experts are served on a GPU, too"
            )
        version, content = read_weights(directory)
        if version != adapter.version:
            raise CheckpointError(f"the files of adapter {adapter.name} in {directory} have changed: load it again")
        try:
            tensors = load_tensors(content)
        except SafetensorError as error:
            raise CheckpointError(f"{checkpoint.file} cannot be read: {shown_reason(error)}") from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{checkpoint.file}: {shown_name(name)} holds values that are no finite numbers")
        loaded = LoadedAdapter(adapter)
        for place, layer in enumerate(self._layers):
            weights = _weights_of(layer, checkpoint, tensors)
            if weights is not None:
                loaded.layers[place] = weights if self._limits.device.type == "cpu" else weights.on(self._limits)
        return loaded

    @property
    def max_bytes(self) -> int:
        """Memory that adapters of the greatest rank take in all slots, with something for every layer."""
        elements = sum(len(layer.parts) * layer.in_features + layer.out_features for layer in self._layers)
        return self._limits.num_slots * elements * self._limits.max_rank * self._limits.dtype.itemsize

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

    def begin_step(self, req_indices: np.ndarray, num_tokens: np.ndarray) -> bool:
        """The next step has so many tokens of these request slots, in this order; returns whether any has an adapter."""
        if self.assumes_adapters:
            self.begin_capture(int(num_tokens.sum()))
            return True
        slots = self._of_request[req_indices] if self._num_requests else _IDLE
        if (slots >= 0).any():
            self._batch.set(torch.from_numpy(slots.repeat(num_tokens)))
            self._is_set = True
        elif self._is_set:
            self._batch.set(None)
            self._is_set = False
        return self._is_set

    def begin_capture(self, num_tokens: int) -> None:
        """The next step is captured as a graph, for steps of up to so many tokens some of which have adapters; 0: none has."""
        self._batch.expect(num_tokens)
        self._is_set = num_tokens > 0


def _weights_of(layer: Linear, checkpoint: LoraCheckpoint, stored: Mapping[str, torch.Tensor]) -> LayerWeights | None:
    """This rank's share of what an adapter has for the parts of `layer`; None: nothing."""
    found: list[tuple[LoraTensors, int, int]] = []
    a, b = [], []
    column = 0
    for part, shard in layer.parts.items():
        tensors = checkpoint.layers.get(f"{layer.prefix}{part}")
        if tensors is not None:
            of_expert_a, of_expert_b = _of_expert(tensors, stored)
            a.append(of_expert_a[:, layer.inputs.slice])
            b.append(of_expert_b[tensors.first_row :: tensors.row_step][shard.start : shard.start + shard.length])
            found.append((tensors, column, shard.length))
        column += shard.size
    if not found:
        return None
    dtype = _common_dtype([*a, *b], layer.out_dtype)
    return LayerWeights(
        a=_padded(F.pad(torch.cat(a).to(dtype).T, (0, 0, 0, layer.inputs.padding))),
        b=[_in_panels(each.to(dtype)) for each in b],
        columns=[column for _, column, _ in found],
        widths=[width for _, _, width in found],
        scales=[tensors.scale for tensors, _, _ in found],
    )


def _of_expert(tensors: LoraTensors, stored: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, inputs] and B [outputs, rank], of one expert where those of all are stacked."""
    a, b = stored[tensors.a], stored[tensors.b]
    if tensors.num_experts == 1:
        return a, b
    shape = (tensors.num_experts, tensors.rank)
    return a.view(*shape, -1)[tensors.expert], b.view(-1, *reversed(shape))[..., tensors.expert]


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
