"""How checkpoints lay out quantized weights, and how to read some rows of them.

    K inputs, N outputs, G groups; F = 32 / bits values in a 32-bit word, the first in its lowest bits

                     values                                 scales    zeros                      order of the inputs
    float            weight         float [N, K]            -         -                          -
    gptq             qweight        int32 [K / F, N]        [G, N]    qzeros int32 [G, N / F]    g_idx int32 [K]
    awq              qweight        int32 [K, N / F]        [G, N]    qzeros int32 [G, N / F]    -
    pack-quantized   weight_packed  int32 [N, ceil(K / F)]  [N, G]    int32 [ceil(N / F), G]     weight_g_idx int32 [K]
    int-quantized    weight         int8 [N, K]             [N, G]    int8 [N, G]                -
    gguf             weight         blocks, read as floats [N, K]: see models/gguf/blocks.py     -
    mxfp4            blocks         uint8 [N, G, 16]        [N, G]    -                          -

In AWQ's int32 words the values are in the order 0 2 4 6 1 3 5 7. The signed values of compressed-tensors are stored with
2^(bits - 1) added where they are packed. GPTQ's first version stores zeros with 1 subtracted. MXFP4 (OCP Microscaling Formats,
2023) has 32 inputs a group, two E2M1 numbers an octet, the first in its low bits, and exponents of 2, biased by 127, as
scales: it is kept in 8 bits, which hold twice each number exactly.
"""

from __future__ import annotations

import torch

from pagoda.errors import CheckpointError
from pagoda.models.gguf.blocks import Blocks
from pagoda.models.loading.checkpoint import FLOAT_TYPES, StoredTensors, TensorSource, TensorSpec
from pagoda.models.quantization.rounding import QuantizedRows, round_rows
from pagoda.models.quantization.schemes import WeightScheme

_AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight values is


def tensor_specs(scheme: WeightScheme, name: str, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors that hold the weight of layer `name`, by name."""
    factor, groups = 32 // scheme.bits, scheme.num_groups(in_features)
    n, k = out_features, in_features
    packed_n, packed_k = -(-n // factor), -(-k // factor)
    specs: dict[str, TensorSpec]
    if scheme.layout in ("float", "gguf"):
        specs = {"weight": TensorSpec((n, k), FLOAT_TYPES)}
    elif scheme.layout == "mxfp4":
        specs = {
            "blocks": TensorSpec((n, groups, 16), ("U8",)),
            "scales": TensorSpec((n, groups), ("U8",)),
        }
    elif scheme.layout == "gptq":
        specs = {
            "qweight": TensorSpec((packed_k, n), ("I32",)),
            "scales": TensorSpec((groups, n), FLOAT_TYPES),
            "qzeros": TensorSpec((groups, packed_n), ("I32",)),
            "g_idx": TensorSpec((k,), ("I32",), optional=True),
        }
    elif scheme.layout == "awq":
        specs = {
            "qweight": TensorSpec((k, packed_n), ("I32",)),
            "scales": TensorSpec((groups, n), FLOAT_TYPES),
            "qzeros": TensorSpec((groups, packed_n), ("I32",)),
        }
    else:
        is_packed = scheme.layout == "pack-quantized"
        values = TensorSpec((n, packed_k), ("I32",)) if is_packed else TensorSpec((n, k), ("I8",))
        zeros = TensorSpec((packed_n, groups), ("I32",)) if is_packed else TensorSpec((n, groups), ("I8",))
        specs = {
            "weight_packed" if is_packed else "weight": values,
            "weight_scale": TensorSpec((n, groups), FLOAT_TYPES),
        }
        if scheme.has_zeros:
            specs["weight_zero_point"] = zeros
        if is_packed:
            specs["weight_shape"] = TensorSpec((2,), ("I64", "I32"), optional=True)
            specs["weight_g_idx"] = TensorSpec((k,), ("I32",), optional=True)
    return {f"{name}.{key}": spec for key, spec in specs.items()}


def check_order(scheme: WeightScheme, name: str, in_features: int, source: TensorSource) -> None:
    """Raise `CheckpointError` if the inputs of a layer are in groups out of order, as act-order leaves them."""
    for key in (f"{name}.g_idx", f"{name}.weight_g_idx"):
        if scheme.layout in ("float", "gguf") or key not in source:
            continue
        expected = torch.arange(in_features) // (scheme.group_size or in_features)
        if not torch.equal(source.read(key, slice(0, in_features)).long(), expected):
            raise CheckpointError(
                f"{key}: the inputs are in groups out of order (act-order: desc_act=true, actorder=group), which is not "
                "supported; supported: groups of inputs in order (desc_act=false, actorder=weight or null)"
            )


def read_rows(
    scheme: WeightScheme, name: str, outputs: slice, inputs: slice, in_features: int, source: TensorSource
) -> QuantizedRows:
    """Outputs and inputs of layer `name`, which has `in_features` inputs; groups begin and end where `inputs` does."""
    if scheme.layout == "float":
        weight = source.read(f"{name}.weight", outputs, slice(0, in_features))
        return round_rows(weight, scheme.bits, scheme.group_size, inputs)
    if scheme.layout == "gguf":
        assert isinstance(source, StoredTensors)
        return _of_blocks(scheme, source.read_blocks(f"{name}.weight", outputs, inputs))
    size = scheme.group_size
    groups = slice(0, 1) if size is None else slice(inputs.start // size, inputs.stop // size)
    if scheme.layout == "gptq":
        return _read_gptq(scheme, name, outputs, inputs, groups, source)
    if scheme.layout == "mxfp4":
        return _read_mxfp4(name, outputs, groups, source)
    if scheme.layout == "awq":
        return _read_awq(scheme, name, outputs, inputs, groups, source)
    return _read_compressed_tensors(scheme, name, outputs, inputs, groups, source)


def _of_blocks(scheme: WeightScheme, blocks: Blocks) -> QuantizedRows:
    """In the scheme of all parts of a layer, which has at least the bits of each, and groups that divide theirs."""
    assert scheme.group_size is not None
    repeats, middle = blocks.group // scheme.group_size, 2 ** (scheme.bits - 1)
    if scheme.block_groups:
        assert blocks.block_scales is not None
        values = blocks.values if scheme.has_mins else blocks.values + (middle - blocks.zero)
        return QuantizedRows(values, blocks.scales, blocks.mins, blocks.group, blocks.block_scales)
    blocks = blocks.in_one_level()
    scales, mins = blocks.scales, blocks.mins
    if scheme.has_mins and mins is None:
        mins = scales * -blocks.zero
    values = blocks.values if scheme.has_mins else blocks.values + (middle - blocks.zero)
    if repeats > 1:
        scales = scales.repeat_interleave(repeats, dim=1)
        mins = None if mins is None else mins.repeat_interleave(repeats, dim=1)
    return QuantizedRows(values, scales, mins, scheme.group_size)


def _read_gptq(
    scheme: WeightScheme, name: str, outputs: slice, inputs: slice, groups: slice, source: TensorSource
) -> QuantizedRows:
    words, first = _words(inputs, scheme.bits)
    values = unpack_words(source.read(f"{name}.qweight", words, outputs).T, scheme.bits)
    values = values[:, first : first + _length(inputs)]
    words, first = _words(outputs, scheme.bits)
    zeros = unpack_words(source.read(f"{name}.qzeros", groups, words), scheme.bits)[
        :, first : first + _length(outputs)
    ].T
    if scheme.zeros_less_one:
        zeros = (zeros + 1) & (2**scheme.bits - 1)
    scales = source.read(f"{name}.scales", groups, outputs).T.float()
    return QuantizedRows(values, scales, zeros, scheme.group_size or _length(inputs))


def _read_awq(
    scheme: WeightScheme, name: str, outputs: slice, inputs: slice, groups: slice, source: TensorSource
) -> QuantizedRows:
    words, first = _words(outputs, scheme.bits)

    def in_order(packed: torch.Tensor) -> torch.Tensor:
        unpacked = unpack_words(packed, scheme.bits).view(len(packed), -1, 8)[:, :, _AWQ_POSITIONS].flatten(1)
        wanted: torch.Tensor = unpacked[:, first : first + _length(outputs)].T
        return wanted

    values = in_order(source.read(f"{name}.qweight", inputs, words))
    zeros = in_order(source.read(f"{name}.qzeros", groups, words))
    scales = source.read(f"{name}.scales", groups, outputs).T.float()
    return QuantizedRows(values, scales, zeros, scheme.group_size or _length(inputs))


# Twice each E2M1 number, by its code.
_E2M1_TWICE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int16)


def _read_mxfp4(name: str, outputs: slice, groups: slice, source: TensorSource) -> QuantizedRows:
    octets = source.read(f"{name}.blocks", outputs, groups)
    codes = torch.stack((octets & 15, octets >> 4), dim=3).flatten(1).long()
    exponents = source.read(f"{name}.scales", outputs, groups).to(torch.int32) - 127
    scales = torch.ldexp(torch.full(exponents.shape, 0.5), exponents)
    return QuantizedRows((_E2M1_TWICE[codes] + 128).to(torch.uint8), scales, None, 32)


def _read_compressed_tensors(
    scheme: WeightScheme, name: str, outputs: slice, inputs: slice, groups: slice, source: TensorSource
) -> QuantizedRows:
    middle = 2 ** (scheme.bits - 1)
    zeros = None
    if scheme.layout == "int-quantized":
        values = (source.read(f"{name}.weight", outputs, inputs).to(torch.int16) + middle).to(torch.uint8)
        if scheme.has_zeros:
            zeros = source.read(f"{name}.weight_zero_point", outputs, groups)
            zeros = (zeros.to(torch.int16) + middle).to(torch.uint8)
    else:
        words, first = _words(inputs, scheme.bits)
        values = unpack_words(source.read(f"{name}.weight_packed", outputs, words), scheme.bits)
        values = values[:, first : first + _length(inputs)]
        if scheme.has_zeros:
            words, first = _words(outputs, scheme.bits)
            zeros = unpack_words(source.read(f"{name}.weight_zero_point", words, groups).T, scheme.bits)
            zeros = zeros[:, first : first + _length(outputs)].T
    scales = source.read(f"{name}.weight_scale", outputs, groups).float()
    return QuantizedRows(values, scales, zeros, scheme.group_size or _length(inputs))


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] to the uint8 values in them, [R, C * 32 / bits]."""
    octets = _in_order(words).view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values [R, C] to int32 [R, ceil(C * bits / 32)], the last word filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % (32 // bits)))
    octets = padded if bits == 8 else padded[:, 0::2] | padded[:, 1::2] << 4
    return _in_order(octets).view(torch.int32)


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, row after row. `contiguous` would leave the stride of a dimension of one element as it is, and views mind it."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _words(part: slice, bits: int) -> tuple[slice, int]:
    """The words that hold a run of values, and which of their values is its first."""
    factor = 32 // bits
    return slice(part.start // factor, -(-part.stop // factor)), part.start % factor


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length
