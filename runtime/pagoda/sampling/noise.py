"""Random numbers that depend on nothing but a request's seed and a token's position.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): it has
no state to carry along, so a request draws the same numbers alone, in any batch, in any request slot and after preemption
(docs/architecture.md, invariant 9). The key is the seed, the counter is the position and, for tokens that need more than one
number, which of them it is.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from pagoda.sampling.params import SamplingParams

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

# Numbers drawn ahead for each row: numpy's cost is per call, so 32 positions at once cost hardly more than one.
_DRAWN_AHEAD = 32


def philox4x32(counter: tuple[UInt64Array, ...], key: tuple[UInt64Array, UInt64Array]) -> tuple[UInt64Array, ...]:
    """The four 32-bit output words for four counter words and two key words (all below 2**32, broadcast together)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _32) ^ c1 ^ k0,
            product_1 & _LOW_32,
            (product_0 >> _32) ^ c3 ^ k1,
            product_0 & _LOW_32,
        )
        k0 = (k0 + np.uint64(_WEYL_0)) & _LOW_32
        k1 = (k1 + np.uint64(_WEYL_1)) & _LOW_32
    return c0, c1, c2, c3


def uniforms(seeds: UInt64Array, positions: Int64Array, attempt: int = 0) -> Float64Array:
    """One uniform number in [0, 1), with 53 random bits, for each pair of a seed and a position (broadcast together).

    `attempt`: where one number is not enough for a token, the next ones are numbered from 1.
    """
    counter = positions.astype(np.uint64)
    zero = np.zeros_like(counter)
    counters = (counter & _LOW_32, counter >> _32, zero + np.uint64(attempt), zero)
    high, low, _, _ = philox4x32(counters, (seeds & _LOW_32, seeds >> _32))
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    numbers: Float64Array = bits.astype(np.float64) * 2.0**-53
    return numbers


class RequestNoise:
    """The seeds of the requests in the request slots, and the numbers drawn from them.

    A request without a seed gets one of its own when it enters a request slot: from a generator with seed `seed`, or from the
    operating system's entropy when that is None.
    """

    def __init__(self, max_num_seqs: int, seed: int | None) -> None:
        entropy = int.from_bytes(os.urandom(16), "little") if seed is None else seed
        self._seeds_of_unseeded = np.random.default_rng(entropy)
        self._seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self._drawn = np.zeros((max_num_seqs, _DRAWN_AHEAD))
        self._first_drawn_position = np.full(max_num_seqs, -_DRAWN_AHEAD, dtype=np.int64)

    def add(self, req_index: int, params: SamplingParams) -> None:
        """Give the request that enters `req_index` its seed."""
        if params.seed is None:
            self._seeds[req_index] = self._seeds_of_unseeded.integers(0, 2**64, dtype=np.uint64)
        else:
            self._seeds[req_index] = params.seed % 2**64
        self._first_drawn_position[req_index] = -_DRAWN_AHEAD

    def seeds_of(self, req_indices: Int64Array) -> Int64Array:
        """The bits of the request slots' seeds, for kernels that draw on the device."""
        return self._seeds[req_indices].view(np.int64)

    def at(self, req_indices: Int64Array, positions: Int64Array) -> Float64Array:
        """The number of each request slot for the token at its position: float64 `[len(req_indices)]` in [0, 1)."""
        columns = positions - self._first_drawn_position[req_indices]
        if ((columns < 0) | (columns >= _DRAWN_AHEAD)).any():
            # All rows draw again, not only those that ran out: so their numbers end together, and steps that draw are rare.
            # Of several rows of a request slot, which follow each other by position, the first one says from where.
            req_indices_once, first_rows = np.unique(req_indices, return_index=True)
            ahead = positions[first_rows][:, None] + np.arange(_DRAWN_AHEAD)
            self._drawn[req_indices_once] = uniforms(self._seeds[req_indices_once][:, None], ahead)
            self._first_drawn_position[req_indices_once] = positions[first_rows]
            columns = positions - self._first_drawn_position[req_indices]
            if (columns >= _DRAWN_AHEAD).any():  # more rows than are drawn ahead
                return uniforms(self._seeds[req_indices], positions)
        numbers: Float64Array = self._drawn[req_indices, columns]
        return numbers

    def again(self, req_indices: Int64Array, positions: Int64Array, attempt: int) -> Float64Array:
        """Further numbers for tokens that need them: see `uniforms`."""
        return uniforms(self._seeds[req_indices], positions, attempt)
