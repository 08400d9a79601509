"""What the parts of the sampler know of a request, of a step's rows, and of the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagoda.sampling.params import SamplingParams
from pagoda.sampling.transfer import to_device
from pagoda_kernels.interface import KernelBackend

Int64Array = npt.NDArray[np.int64]


class SlotRequest(Protocol):
    """What the sampler reads of a request (`pagoda.request.EngineRequest`) in a request slot; its tokens are in the token
    pool."""

    @property
    def params(self) -> SamplingParams:
        """How to sample."""

    @property
    def num_prompt_tokens(self) -> int:
        """Where the output begins in the request slot's tokens."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that are masked until `min_tokens`."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows of logits of one step.

    A request slot has one row, or with k drafts 1 + k of them, which follow each other by position; the tokens before a row's
    position are in the token pool, drafts included. `req_indices` and `positions` int64 `[N]` on the host: the request slot of
    each row, and the position that its sampled token will take, which is the number of tokens before it. `first_rows` and
    `num_rows` int64 `[max_num_seqs]`: of each request slot its first row, and how many it has (0: none in this step).
    `composition` changes whenever a row or a request changes: what depends on these alone may be kept until then.
    """

    req_indices: Int64Array
    positions: Int64Array
    first_rows: Int64Array
    num_rows: Int64Array
    composition: int

    def of(self, req_index: int) -> range:
        """The rows of a request slot."""
        first = int(self.first_rows[req_index])
        return range(first, first + int(self.num_rows[req_index]))


@dataclass(frozen=True, slots=True)
class SamplingContext:
    """What does not change: sizes, the `token_pool` int64 `[max_num_seqs, max_model_len + 1]`, and its device's kernels."""

    vocab_size: int
    padded_vocab_size: int
    token_pool: Tensor
    kernels: KernelBackend

    @property
    def device(self) -> torch.device:
        """Where logits and token pool are."""
        return self.token_pool.device

    def to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """A tensor on the device with the values of `array`; on a CPU it shares the memory."""
        return to_device(array, self.device)
