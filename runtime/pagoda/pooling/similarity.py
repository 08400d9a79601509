"""The similarity of two vectors."""

from __future__ import annotations

import math

from pagoda.pooling.output import PooledOutput


def cosine_similarity(first: PooledOutput, second: PooledOutput) -> float:
    """The cosine of the angle between two vectors of the same size; 0 where one is all zeros."""
    a, b = first.tolist(), second.tolist()
    length = math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0
