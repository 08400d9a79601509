"""What a request that pools gets."""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PooledOutput:
    """Float32 numbers, little-endian, in row-major order: a vector or scores `[n]`, or one a token, `[tokens, n]`."""

    data: bytes
    shape: tuple[int, ...]

    @classmethod
    def of(cls, values: list[float]) -> PooledOutput:
        """A vector of these numbers."""
        return cls(array("f", values).tobytes(), (len(values),))

    def tolist(self) -> list[float]:
        """The numbers, flat."""
        return array("f", self.data).tolist()

    def rows(self) -> list[list[float]]:
        """The numbers of each token."""
        size, values = self.shape[-1], self.tolist()
        return [values[start : start + size] for start in range(0, len(values), size)]
