"""What the blocks of quantized GGUF tensors hold: integers, and a scale and a min for each group of them.

    weight[k] = scales[k // group] * (values[k] - zero)          or, where there are mins,
    weight[k] = scales[k // group] * values[k] + mins[k // group]

in float32, with the roundings of ggml's own dequantization: the results are the same to the last bit. Scales and mins of
K-quants are products, exact in float32, of a group's integer and a float16 of the block. Byte layouts are those of
ggml-common.h (block_q4_0 and so on); d and m are float16.

    Q4_0   d, 16 bytes: value i in the low half of byte i, value i + 16 in the high half; zero 8
    Q4_1   d, m, 16 bytes as Q4_0
    Q5_0   d, 32 fifth bits, 16 bytes as Q4_0; zero 16
    Q5_1   d, m, 32 fifth bits, 16 bytes as Q4_0
    Q8_0   d, 32 signed bytes
    Q4_K   d, dmin, 8 scales and 8 mins of 6 bits, 128 bytes: of each 32, low halves are one group, high halves the next
    Q5_K   as Q4_K, with 32 bytes of fifth bits in front of the 128: bit g of byte i is that of value i of group g
    Q6_K   128 bytes of low halves, 64 of upper pairs of bits, 16 signed scales, d; zero 32
    MXFP4  an exponent, 16 bytes as Q4_0, of numbers E2M1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pagoda.models.gguf.ggml_types import GgmlType


@dataclass(frozen=True, slots=True)
class Blocks:
    """R rows of K values: `values` uint8 [R, K]; `scales` and `mins` float32 [R, K / group]. `zero` where `mins` is None.

    With `block_scales`, float16 [R, blocks, 1, or 2 where there are mins], `scales` and `mins` are int8.
    """

    values: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None
    zero: int
    group: int
    block_scales: torch.Tensor | None = None

    def in_one_level(self) -> Blocks:
        """The same without `block_scales`."""
        if self.block_scales is None:
            return self
        scales, mins = (
            None if numbers is None else _times_blocks(numbers, self.block_scales[..., level])
            for level, numbers in enumerate((self.scales, self.mins))
        )
        assert scales is not None
        return replace(self, scales=scales, mins=mins, block_scales=None)

    def floats(self) -> torch.Tensor:
        """The weights, float32 [R, K]."""
        wide = self.values.view(len(self.values), -1, self.group).float()
        plain = self.in_one_level()
        if plain.mins is None:
            return wide.sub_(self.zero).mul_(plain.scales.unsqueeze(2)).flatten(1)
        return wide.mul_(plain.scales.unsqueeze(2)).add_(plain.mins.unsqueeze(2)).flatten(1)


def _times_blocks(numbers: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """int8 [R, groups] times float16 [R, blocks], float32."""
    return (numbers.reshape(*blocks.shape, -1).float() * blocks.float().unsqueeze(2)).flatten(1)


def unpack_blocks(kind: GgmlType, data: torch.Tensor) -> Blocks:
    """The blocks of R rows, uint8 [R, bytes of a row], of a type that is not float."""
    blocks = data.reshape(-1, kind.nbytes)
    values, scales, mins, zero, *block_scales = _UNPACK[kind.name](blocks)
    rows = len(data)
    return Blocks(
        values.reshape(rows, -1),
        scales.reshape(rows, -1),
        None if mins is None else mins.reshape(rows, -1),
        zero,
        kind.group,
        torch.stack(block_scales, dim=1).reshape(rows, -1, len(block_scales)) if block_scales else None,
    )


# Values, scales, mins, zero; of types of two levels also the float16 scale of each block, and that of its mins.
_Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, *tuple[torch.Tensor, ...]]

# Twice the numbers of E2M1 (OCP Microscaling Formats), which then are integers, above the middle.
_E2M1 = torch.tensor([128 + n for n in (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)], dtype=torch.uint8)


def _float16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """A float16 of each block, [N]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).squeeze(1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The same, [N, 1] float32."""
    return _float16(blocks, at).float().unsqueeze(1)


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """All low halves, then all high halves."""
    return torch.cat((data & 15, data >> 4), dim=1)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """uint8 [N, B] to its bits, [N, 8 * B], the lowest of each byte first."""
    return (data.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)).flatten(1) & 1


def _q4_0(blocks: torch.Tensor) -> _Unpacked:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None, 8


def _q4_1(blocks: torch.Tensor) -> _Unpacked:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2), 0


def _q5_0(blocks: torch.Tensor) -> _Unpacked:
    return _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4, _half(blocks, 0), None, 16


def _q5_1(blocks: torch.Tensor) -> _Unpacked:
    return _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4, _half(blocks, 0), _half(blocks, 2), 0


def _q8_0(blocks: torch.Tensor) -> _Unpacked:
    return blocks[:, 2:] ^ 128, _half(blocks, 0), None, 128


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and mins of the eight groups of a Q4_K or Q5_K block, int8 [N, 8] each."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6) << 4), dim=1)
    mins = torch.cat((middle & 63, (high >> 4) | (middle >> 6) << 4), dim=1)
    return scales.view(torch.int8), mins.view(torch.int8)


def _k_nibbles(data: torch.Tensor) -> torch.Tensor:
    """128 bytes of each block, [N, 256]: of each 32 bytes, first the low halves and then the high ones."""
    quarters = data.reshape(-1, 4, 32)
    return torch.stack((quarters & 15, quarters >> 4), dim=2).flatten(1)


def _q4_k(blocks: torch.Tensor) -> _Unpacked:
    return _k_nibbles(blocks[:, 16:]), *_k_scales(blocks), 0, _float16(blocks, 0), -_float16(blocks, 2)


def _q5_k(blocks: torch.Tensor) -> _Unpacked:
    fifth = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).unsqueeze(1)) & 1
    values = _k_nibbles(blocks[:, 48:]) | fifth.flatten(1) << 4
    return values, *_k_scales(blocks), 0, _float16(blocks, 0), -_float16(blocks, 2)


def _q6_k(blocks: torch.Tensor) -> _Unpacked:
    low = blocks[:, :128].reshape(-1, 2, 64)
    low = torch.cat((low & 15, low >> 4), dim=2)  # [N, 2, 128]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1) & 3
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return (low | high.flatten(2) << 4).flatten(1), scales, None, 32, _float16(blocks, 208)


def _mxfp4(blocks: torch.Tensor) -> _Unpacked:
    # Half of 2^(e - 127), for the doubled numbers; the two lowest are below float32's normal ones.
    exponents = blocks[:, :1].to(torch.int32)
    bits = torch.where(exponents < 2, 0x00200000 << exponents, (exponents - 1) << 23)
    return _E2M1[_nibbles(blocks[:, 1:]).int()], bits.view(torch.float32), None, 128


_UNPACK: dict[str, Callable[[torch.Tensor], _Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}
