"""Log-probabilities of tokens under the model's own distribution, before any parameter of the request changes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pagoda.sampling.output import TokenLogprobs
from pagoda.sampling.selection import best_tokens, block_maxima


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Of M positions: `token_ids` int64 and `logprobs` float32 `[M, 1 + K]`, `ranks` int64 `[M]` of the first.

    First is the token at the position, then the K best, or those that were asked for.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    def to_lists(self, counts: list[int]) -> list[TokenLogprobs]:
        """One `TokenLogprobs` a position, the m-th with its first `counts[m]` of the K others."""
        token_ids, logprobs, ranks = self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist()
        return [
            TokenLogprobs(token_ids[m][: 1 + count], logprobs[m][: 1 + count], ranks[m])
            for m, count in enumerate(counts)
        ]


@dataclass(frozen=True, slots=True)
class RawDistribution:
    """What must be kept of the logits of M rows before they are processed: `logits` `[M, V]`, and the `values` of K tokens."""

    logits: Tensor
    values: Tensor
    ids: Tensor

    @classmethod
    def of(cls, logits: Tensor, count: int, wanted: tuple[Tensor, Tensor] | None = None) -> RawDistribution:
        """Take hold of `logits` float32 `[M, V]`, padded to whole blocks; the caller must not change them afterwards.

        `count`: how many of the best tokens. `wanted`: rows int64 `[W]` that want those of certain tokens instead, and these,
        int64 `[W, K]`.
        """
        rows = torch.arange(logits.shape[0], device=logits.device)
        values, ids = best_tokens(logits, block_maxima(logits), rows, count) if count else _no_tokens(logits)
        if wanted is not None:
            asking, asked = wanted
            missing = asked.shape[1] - count
            ids = pad(ids, (0, max(0, missing))).index_copy_(0, asking, pad(asked, (0, max(0, -missing))))
            values = logits.gather(1, ids)
        return cls(logits, values, ids)

    def of_tokens(self, token_ids: Tensor) -> LogprobTensors:
        """Log-probabilities of `token_ids` int64 `[M]` and of the K others."""
        value = self.logits.gather(1, token_ids.unsqueeze(1))
        # Counted in floats, exact below 2**24, for torch adds up bools several times slower.
        ranks = torch.gt(self.logits, value, out=torch.empty_like(self.logits)).sum(-1).long() + 1
        values = torch.cat([value, self.values], dim=1) - self.logits.logsumexp(-1, keepdim=True)
        return LogprobTensors(torch.cat([token_ids.unsqueeze(1), self.ids], dim=1), values, ranks)


def _no_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :0], torch.empty((logits.shape[0], 0), dtype=torch.int64, device=logits.device)
