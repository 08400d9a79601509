"""Which sampled tokens the ranks of a pipeline do not have yet.

The last stage samples, the first one needs the token: the driver sends it with the next plan. Meanwhile the request slot may
have been given to another request, and then the token must not be written into it:

    plan 7  R1 samples at req_index 3      plan 8  3 is released, R2 enters it      result 7 comes      plan 9  no update of 3
"""

from __future__ import annotations

from collections import Counter

from pagoda.scheduling.plan import SampledTokensUpdate, StepPlan, StepResult


class SampledTokensTracker:
    """Runs in the driver, which calls `update_for` for every plan and `record` for its result, both in the order of plans."""

    def __init__(self) -> None:
        self._num_releases: Counter[int] = Counter()
        # By step: of each row that samples its index, request slot, the position of its first sampled token, and the releases
        # of the request slot up to then.
        self._in_flight: dict[int, list[tuple[int, int, int, int]]] = {}
        self._next = SampledTokensUpdate()

    def update_for(self, plan: StepPlan) -> SampledTokensUpdate:
        """What goes with `plan`, which is about to be submitted."""
        update, self._next = self._next, SampledTokensUpdate()
        self._num_releases.update(plan.released_req_indices)
        drafts = plan.draft_token_ids
        rows = zip(plan.req_indices, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.samples, strict=True)
        self._in_flight[plan.step_id] = [
            (row, req_index, computed + scheduled - len(drafts.get(row, ())), self._num_releases[req_index])
            for row, (req_index, computed, scheduled, samples) in enumerate(rows)
            if samples
        ]
        return update

    def record(self, result: StepResult) -> None:
        """Take the tokens of a result; those of request slots that were released meanwhile are dropped."""
        for row, req_index, position, num_releases in self._in_flight.pop(result.step_id):
            token_ids = result.sampled_token_ids[row]
            if self._num_releases[req_index] == num_releases:
                self._next.req_indices.extend([req_index] * len(token_ids))
                self._next.positions.extend(range(position, position + len(token_ids)))
                self._next.token_ids.extend(token_ids)

    def forget(self, step_id: int) -> None:
        """The step failed: it has no tokens."""
        self._in_flight.pop(step_id, None)
