"""A plan with the requests of its rows, from planning until its result is applied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pagoda.scheduling.plan import NewRequest, StepPlan
from pagoda.scheduling.request import Request


@dataclass(slots=True)
class PlannedStep:
    """`requests[i]` is the request of row i of `plan`. Writing a row moves the counters of its request forward.

    Results of the rows of `discarded` requests are dropped: these requests are recomputed in a later plan. `planned_at`: in
    seconds of the scheduler's clock; `num_base_tokens`: see `StepComposition`.
    """

    plan: StepPlan
    planned_at: float = 0.0
    num_base_tokens: int | None = None
    requests: list[Request] = field(default_factory=list)
    discarded: set[Request] = field(default_factory=set)

    def enter(self, request: Request) -> None:
        """Add a request that entered a request slot, with all its tokens and blocks."""
        self.plan.new_requests.append(
            NewRequest(
                req_index=request.req_index,
                spec=request.spec,
                output_token_ids=request.token_ids[request.num_prompt_tokens :],
                block_ids=[lease.take_unsent() for lease in request.leases],
                num_computed_tokens=request.num_computed_tokens,
            )
        )

    def add_rows(self, requests: Sequence[Request], num_tokens: Sequence[int]) -> None:
        """Let each request compute so many tokens more, and sample if these are all that it has."""
        plan = self.plan
        self.requests += requests
        plan.request_ids += [request.spec.request_id for request in requests]
        plan.req_indices += [request.req_index for request in requests]
        plan.num_computed_tokens += [request.num_computed_tokens for request in requests]
        plan.num_scheduled_tokens += num_tokens
        for request, scheduled in zip(requests, num_tokens, strict=True):
            request.num_computed_tokens += scheduled
            samples = request.num_computed_tokens == len(request.token_ids) + request.num_in_flight
            request.num_in_flight += samples
            plan.samples.append(samples)

    def extend_row(self, row: int, num_steps: int) -> None:
        """Let a row that samples one token run `num_steps` more steps, each on the token of the one before."""
        request = self.requests[row]
        self.plan.num_steps.append(1 + num_steps)
        request.num_computed_tokens += num_steps
        request.num_in_flight += num_steps

    def add_drafts(self, row: int, draft_token_ids: list[int]) -> None:
        """Let a row that samples one token verify drafts too; `Scheduler.apply` takes back what is refused."""
        request = self.requests[row]
        num_drafts = len(draft_token_ids)
        self.plan.draft_token_ids[row] = draft_token_ids
        self.plan.num_scheduled_tokens[row] += num_drafts
        request.num_computed_tokens += num_drafts
        request.num_in_flight += num_drafts

    def rows(self) -> Iterable[tuple[int, Request]]:
        """The rows whose results count, by their place in the plan."""
        rows = enumerate(self.requests)
        if not self.discarded:
            return rows
        return ((row, request) for row, request in rows if request not in self.discarded)

    @property
    def only_decodes(self) -> bool:
        """Whether every row computes one token and samples the next."""
        plan = self.plan
        return not plan.new_requests and plan.total_tokens == len(self.requests) and all(plan.samples)
