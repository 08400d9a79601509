"""An encoder with its weights, as one operator of the kernel backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.checkpoint_files import shown, shown_name
from pagoda.models.encoders.config import EncoderConfig, Stored
from pagoda.models.loading.checkpoint import FLOAT_TYPES, StoredTensors, stored_tensors
from pagoda.models.loading.stored_tensor import StoredTensor
from pagoda.models.quantization.packing import PackedWeightBuilder
from pagoda.models.quantization.rounding import round_rows
from pagoda.models.weight_files import listed, weight_files
from pagoda_kernels import backend
from pagoda_kernels.interface import Encoder as EncoderKernel
from pagoda_kernels.interface import PackedLinear
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PANEL, PackedWeight

# Values that are read and packed at a time.
_ELEMENTS_AT_ONCE = 1 << 20
# Beyond this distance all positions are in MPNet's last bucket.
_MAX_DISTANCE = 128

# Inputs that share a scale, in weights and in activations. With one scale a row, vectors of all-MiniLM-L6-v2 come as close as
# 0.9955 to those of float32 (cosine, the worst of 40), with 128: 0.9979, with 64: 0.9992, with 32: 0.9994.
_INT8_GROUPS = (64, 32)

LoadListener = Callable[[str, int, int], None]


class Encoder:
    """An encoder on one rank. `load` fills it; `forward` runs a step."""

    def __init__(
        self, config: EncoderConfig, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> None:
        """`bits`: 8 for linear layers rounded to int8 as they are read, None for floats."""
        if device.type == "cpu" and dtype not in backend.active.packed_dtypes and backend.active.name == "cpu":
            raise ConfigError(
                f"dtype={str(dtype).removeprefix('torch.')}: encoders run in float32 or bfloat16 on a CPU"
            )
        if bits not in (None, 8):
            raise ConfigError(f"quantization with {bits} bits is not supported for encoders; int8 is")
        if bits is not None and not backend.active.packed_dtypes:
            raise ConfigError("quantization=int8 of an encoder needs the compiled kernels of a CPU")
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_bytes = 0
        self._bits = bits
        self._is_packed = dtype in backend.active.packed_dtypes
        self._kernel: EncoderKernel = backend.active.encoder(
            config.num_heads,
            config.head_dim,
            config.intermediate_size,
            config.norm_eps,
            norm_first=config.norm_first,
            gated=config.gated,
            activation=config.activation,
        )
        self._thetas = sorted({theta for theta in config.ropes if theta is not None})
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        self._frequencies = [(1.0 / theta**exponents).to(device) for theta in self._thetas]

    @property
    def num_types(self) -> int:
        return self.config.num_types

    def load(self, weights: EncoderWeights, progress: LoadListener | None = None) -> None:
        """Read all weights. Raises `CheckpointError` for what is missing or of the wrong shape."""
        config, names = self.config, self.config.names
        hidden = config.hidden_size
        total = config.num_parameters() * self.dtype.itemsize
        words = self._table(weights, names.words, config.vocab_size, hidden)
        positions = None
        if names.positions is not None:
            rows = config.max_context_length + config.position_offset
            positions = self._table(weights, names.positions, rows, hidden)[config.position_offset :].contiguous()
        types = None if names.types is None else self._table(weights, names.types, config.num_types, hidden)
        self._kernel.set_embedding(words, positions, types, *self._norm(weights, names.embedding_norm))
        if config.relative_buckets:
            self._kernel.set_relative_bias(self._relative_bias(weights))
        if names.final_norm is not None:
            norm, norm_bias = self._norm(weights, names.final_norm)
            assert norm is not None
            self._kernel.set_final_norm(norm, norm_bias)
        heads = config.num_heads * config.head_dim
        for layer in range(config.num_layers):
            has_first = layer > 0 or config.first_norm
            theta = config.ropes[layer] if config.ropes else None
            self._kernel.add_layer(
                *self._norm(weights, names.attention_norm if has_first else None, layer),
                *self._norm(weights, names.mlp_norm, layer),
                self._linear(weights, names.qkv, layer, 3 * heads, hidden, has_bias=config.qkv_bias),
                self._linear(weights, ((names.output,),), layer, hidden, heads, has_bias=config.output_bias),
                self._linear(
                    weights,
                    names.up,
                    layer,
                    (2 if config.gated else 1) * config.intermediate_size,
                    hidden,
                    has_bias=config.mlp_bias,
                ),
                self._linear(
                    weights, ((names.down,),), layer, hidden, config.intermediate_size, has_bias=config.mlp_bias
                ),
                config.windows[layer] if config.windows else 0,
                -1 if theta is None else self._thetas.index(theta),
            )
            if progress is not None:
                progress(f"layer {layer}", min(self.num_bytes, total), total)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        type_ids: torch.Tensor | None,
        query_start_loc: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [T, hidden_size] of a ragged batch, each row whole; arguments as of `Encoder` in the kernels."""
        cosines, sines = [], []
        for frequencies in self._frequencies:
            angles = positions.float().unsqueeze(1) * frequencies
            cosines.append(angles.cos())
            sines.append(angles.sin())
        return self._kernel.forward(input_ids, positions, type_ids, query_start_loc, cosines, sines)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_bytes += tensor.nbytes
        return tensor

    def _table(self, weights: EncoderWeights, stored: Stored, rows: int, columns: int) -> torch.Tensor:
        return self._keep(weights.tensor(stored, ".weight", (rows, columns)).to(self.device, self.dtype).contiguous())

    def _norm(
        self, weights: EncoderWeights, stored: Stored | None, layer: int = 0
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if stored is None:
            return None, None
        shape = (self.config.hidden_size,)
        weight = weights.tensor(stored, ".weight", shape, layer).to(self.device, self.dtype).clone()
        if not self.config.norm_bias:
            return self._keep(weight), None
        bias = weights.tensor(stored, ".bias", shape, layer).to(self.device, self.dtype).clone()
        return self._keep(weight), self._keep(bias)

    def _linear(
        self,
        weights: EncoderWeights,
        ways: tuple[tuple[Stored, ...], ...],
        layer: int,
        outputs: int,
        inputs: int,
        *,
        has_bias: bool,
    ) -> PackedLinear:
        parts = weights.choose(ways, layer)
        size = outputs // len(parts)
        rows = [weights.tensor(part, ".weight", (size, inputs), layer) for part in parts]
        bias = None
        if has_bias:
            values = [weights.tensor(part, ".bias", (size,), layer) for part in parts]
            bias = self._keep(torch.cat([value.to(self.device, self.dtype) for value in values]))
        if not self._is_packed:
            whole = torch.cat([part.to(self.device, self.dtype) for part in rows])
            return self._keep(whole), bias, None, None, None, outputs, 0, False
        packed = self._packed(rows, outputs, inputs)
        self.num_bytes += packed.nbytes
        return (
            packed.values,
            bias,
            packed.scales,
            packed.zeros,
            packed.block_scales,
            outputs,
            packed.group_size,
            packed.bits == 4,
        )

    def _packed(self, parts: list[torch.Tensor], outputs: int, inputs: int) -> PackedWeight:
        if self._bits == 8 and inputs % 4 == 0:
            builder = PackedWeightBuilder(8, outputs, inputs)
            group_size = next((size for size in _INT8_GROUPS if inputs % size == 0), None)
            for part in parts:
                for rows in torch.split(part, max(PANEL, _ELEMENTS_AT_ONCE // inputs // PANEL * PANEL)):
                    builder.append(round_rows(rows, 8, group_size, slice(0, inputs)))
            return builder.finish()
        # float32 weights that bfloat16 holds exactly take half of the memory, and give the same products to the last bit.
        narrow = self.dtype == torch.bfloat16 or all(
            part.dtype == torch.bfloat16 or torch.equal(part.bfloat16().to(part.dtype), part) for part in parts
        )
        packed = empty_packed(outputs, inputs, torch.bfloat16 if narrow else torch.float32)
        whole = torch.cat([part.to(packed.values.dtype) for part in parts])
        pack_into(packed, 0, whole)
        return packed

    def _relative_bias(self, weights: EncoderWeights) -> torch.Tensor:
        """MPNet's table of buckets, by distance."""
        config = self.config
        stored = Stored.of(config.names.relative_bias.removesuffix(".weight"))
        table = weights.tensor(stored, ".weight", (config.relative_buckets, config.num_heads)).float()
        distances = range(-_MAX_DISTANCE, _MAX_DISTANCE + 1)
        buckets = torch.tensor([_bucket(distance, config.relative_buckets) for distance in distances])
        return self._keep(table[buckets].T.contiguous().to(self.device))


def _bucket(distance: int, num_buckets: int) -> int:
    """The bucket of a key so far behind its query (Raffel et al., 2020, T5): small distances have one each, larger ones share
    them by their logarithm."""
    half = num_buckets // 2
    first, far = (half if distance > 0 else 0), abs(distance)
    exact = half // 2
    if far < exact:
        return first + far
    # In float32, as transformers computes it: a distance on the edge of two buckets falls into the same one.
    ratio = torch.log(torch.tensor(far).float() / exact) / math.log(_MAX_DISTANCE / exact)
    return first + min(half - 1, exact + int((ratio * (half - exact)).long()))


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The tensors of a checkpoint by the names of an encoder."""

    directory: Path
    stored: Mapping[str, StoredTensor]
    source: StoredTensors
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, directory: str | Path, prefixes: tuple[str, ...]) -> EncoderWeights:
        """Raises `CheckpointError` where there are no weights, or none that can be read."""
        stored = {_renamed(name): tensor for name, tensor in stored_tensors(weight_files(Path(directory))).items()}
        return cls(Path(directory), stored, StoredTensors(stored), prefixes)

    def choose(self, ways: tuple[tuple[Stored, ...], ...], layer: int) -> tuple[Stored, ...]:
        """The first way to store a linear layer that is there."""
        for parts in ways:
            if all(self._find(part, ".weight", layer) is not None for part in parts):
                return parts
        return ways[0]

    def shape(self, stored: Stored, suffix: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises `CheckpointError` where it is missing, or has none."""
        name = self._find(stored, suffix, 0)
        if name is None or not self.stored[name].shape:
            raise CheckpointError(f"{self.directory} has no tensor {' or '.join(stored.names)}{suffix} of a layer")
        return self.stored[name].shape

    def tensor(self, stored: Stored, suffix: str, shape: tuple[int, ...], layer: int = 0) -> torch.Tensor:
        """One tensor as it is stored. Raises `CheckpointError` where it is missing, of another shape, or no float."""
        name = self._find(stored, suffix, layer)
        if name is None:
            wanted = [name.format(i=layer) + suffix for name in stored.names]
            raise CheckpointError(
                f"{self.directory} does not fit its config.json: a tensor of the model is missing: {' or '.join(wanted)}; "
                f"it has {listed(self.stored)}"
            )
        tensor = self.stored[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {shown_name(name)} in {tensor.file} has shape {shown(list(tensor.shape))}, "
                f"config.json makes it {list(shape)}"
            )
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"tensor {shown_name(name)} in {tensor.file} is of type {tensor.dtype}; supported: {', '.join(FLOAT_TYPES)}"
            )
        return self.source.read(name)

    def _find(self, stored: Stored, suffix: str, layer: int) -> str | None:
        names = [prefix + name.format(i=layer) + suffix for name in stored.names for prefix in self.prefixes]
        return next((name for name in names if name in self.stored), None)


def _renamed(name: str) -> str:
    """Old checkpoints spell the parameters of a LayerNorm as TensorFlow does."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(f"LayerNorm{old}"):
            return name.removesuffix(old) + new
    return name
