"""The masks of a plan's constrained rows, applied to logits before a token is chosen."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pagoda.sampling.rows import SampledRows, SamplingContext
from pagoda.scheduling.plan import StepPlan


class AllowedByMasks:
    """A `StepProcessor`: every token whose bit is not set is forbidden. The masks are waited for when it is applied."""

    def __init__(self, plan: StepPlan, context: SamplingContext) -> None:
        self._plan = plan
        self._context = context

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        """Change logits float32 `[N, padded vocabulary]` in place."""
        plan, masks = self._plan, self._plan.token_masks
        assert masks is not None
        num_masks = [1 + len(plan.draft_token_ids.get(row, ())) for row in masks.rows]
        words = np.frombuffer(masks.settled().words, dtype=np.int32).reshape(sum(num_masks), -1)
        if not words.flags.writeable:  # of bytes that came from another process
            words = words.copy()
        masked: list[int] = []
        used: list[int] = []
        first = 0
        for plan_row, count in zip(masks.rows, num_masks, strict=True):
            own = rows.of(plan.req_indices[plan_row])
            if len(own) == count:  # not of a row that has failed
                masked += own
                used += range(first, first + count)
            first += count
        if len(used) < len(words):
            words = words[used]
        if masked:
            to_device = self._context.to_device
            self._context.kernels.apply_token_bitmask(logits, to_device(np.array(masked)), to_device(words))
