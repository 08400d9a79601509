"""The element types of tensors in GGUF files: ggml's numbers, names and block sizes (`enum ggml_type` in ggml.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class GgmlType:
    """`block` consecutive values of a row take `nbytes` bytes.

    `stored`: "float" for plain numbers. Else the bits of an integer form without loss in which the kernels can keep a weight:
    `group` values of a row share a scale, and a min where the type has them; `weight = scale * stored + min`. `has_levels`:
    scales and mins are integers of a group times a float16 of the block.
    """

    name: str
    block: int
    nbytes: int
    stored: Literal["float", 4, 8]
    group: int = 0
    has_mins: bool = False
    has_levels: bool = False

    @property
    def block_groups(self) -> int:
        """Groups of a block where scales have two levels; else 0."""
        return self.block // self.group if self.has_levels else 0


F32 = GgmlType("F32", 1, 4, "float")
F16 = GgmlType("F16", 1, 2, "float")
BF16 = GgmlType("BF16", 1, 2, "float")

BY_NUMBER = {
    0: F32,
    1: F16,
    2: GgmlType("Q4_0", 32, 18, 4, 32),
    3: GgmlType("Q4_1", 32, 20, 4, 32, has_mins=True),
    6: GgmlType("Q5_0", 32, 22, 8, 32),
    7: GgmlType("Q5_1", 32, 24, 8, 32, has_mins=True),
    8: GgmlType("Q8_0", 32, 34, 8, 32),
    12: GgmlType("Q4_K", 256, 144, 4, 32, has_mins=True, has_levels=True),
    13: GgmlType("Q5_K", 256, 176, 8, 32, has_mins=True, has_levels=True),
    14: GgmlType("Q6_K", 256, 210, 8, 16, has_levels=True),
    30: BF16,
    39: GgmlType("MXFP4", 32, 17, 8, 32),
}
BY_NAME = {kind.name: kind for kind in BY_NUMBER.values()}

# Types that exist and are not read: named in errors.
_OTHERS = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}


def name_of(number: int) -> str:
    """The name of a type, for an error message, whether it is read or not."""
    kind = BY_NUMBER.get(number)
    return kind.name if kind is not None else _OTHERS.get(number, f"number {number}")
