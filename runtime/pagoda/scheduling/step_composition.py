"""Which running requests take part in a step, and with how many tokens.

Two rules, both about time, which `StepTimes` turns into tokens:

    prompts and decodes    Prompts make a step with rows that decode at most `1 + PROMPT_SHARE` times as long; where there are
                           more prompts than such rows, a prompt has as much of the time as a row. One of several prompts gets
                           half of what is left at most. Without rows that decode there is no limit.
    several tenants        The tenant that wants least, by its weight, gets all of it, and the others so much that the step is
                           weights / its weight times as long at most: two equal tenants halve the time. What the others have
                           is dealt out max-min fair by weight; within a tenant the rows take turns.

With `target_itl_ms` the first rule is that such a step takes as long as that, and where the rows alone take longer, a
tenth longer than they do. `long_prefill_token_threshold` takes the place of the first rule where it alone is given; beside
a target it bounds the chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat, zip_longest

from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.itl_target import ItlTarget
from pagoda.scheduling.request import Flow, Request
from pagoda.scheduling.step_times import StepTimes
from pagoda.scheduling.tenant_shares import Tenant, TenantShares
from pagoda.scheduling.waiting_queue import WaitingQueue

PROMPT_SHARE = 0.75
LEAST_SHARE = 0.1  # whatever the target: prompts go on


@dataclass(slots=True)
class Allowance:
    """Tokens of a step that are left for those who share it."""

    num_tokens: int


@dataclass(slots=True)
class StepComposition:
    """`candidates` in order, each with at most its entry of `limits` tokens; then requests are admitted within `allowed`.

    `num_tokens`: of the step, at most. `room`: tokens left for prompts. `allowances`: what is left for each flow, where there
    are several. `num_base_tokens`: of the rows that the rest of the step is weighed against; None: it is not.
    """

    candidates: Sequence[Request]
    limits: Iterable[int]
    num_tokens: int
    room: int
    longest_chunk: int
    has_company: bool = False
    num_base_tokens: int | None = None
    allowances: Mapping[Flow, Allowance] | None = None

    def allowed(self, flow: Flow) -> int:
        """The longest chunk of a request of `flow` that is admitted now; 0: none is."""
        # Running prompts have a token each even where there is room for fewer.
        allowed = min(_part(max(0, self.room), self.has_company), self.longest_chunk)
        if self.allowances is None:
            return allowed
        return min(allowed, self.allowances[flow].num_tokens) if flow in self.allowances else 0

    def use(self, flow: Flow, num_tokens: int) -> None:
        """A request of `flow` was admitted with so many tokens."""
        self.room -= num_tokens
        if self.allowances is not None:
            self.allowances[flow].num_tokens -= num_tokens


class StepComposer:
    """Composes one step after another. `prompts`: running requests whose prompt is not computed to its end, in order."""

    def __init__(self, limits: SchedulerLimits, shares: TenantShares) -> None:
        self._target_ms: float | None = None
        self._target: ItlTarget | None = None
        self.configure(limits)
        self._shares = shares
        self.times = StepTimes(limits.max_num_batched_tokens // 16)
        self.prompts: dict[Request, None] = {}

    def configure(self, limits: SchedulerLimits) -> None:
        """Compose steps by other limits from now on."""
        threshold, target = limits.long_prefill_token_threshold, limits.target_itl_ms
        self._is_timed = threshold is None or target is not None
        if target != self._target_ms:
            self._target_ms = target
            self._target = None if target is None else ItlTarget(target / 1000)
        self._longest_chunk = threshold or limits.max_num_batched_tokens

    def note_time(self, num_tokens: int, num_base: int, seconds: float, *, only_decodes: bool) -> None:
        """A step of `num_tokens` took so long, `num_base` of which the rest was weighed against."""
        is_pure = num_base == num_tokens or only_decodes
        self.times.note(num_tokens, num_base, seconds, is_pure=is_pure)
        if self._target is not None and not is_pure:
            self._target.observe(seconds)

    def note_rows(self, requests: Sequence[Request], samples: Sequence[bool]) -> None:
        """These rows were planned; those that sample are done with their prompt."""
        if self.prompts:
            for request, is_done in zip(requests, samples, strict=True):
                if is_done:
                    self.prompts.pop(request, None)

    def compose(
        self, candidates: Sequence[Request], waiting: WaitingQueue, num_free_slots: int, budget: int
    ) -> StepComposition:
        """`candidates`: the running requests that could take part. `budget`: tokens of the step."""
        num_entering = min(len(waiting), num_free_slots)
        if self._shares.is_shared:
            groups = self._groups(candidates, waiting if num_entering else None, budget)
            if len(groups) > 1 and any(group.rows for group in groups):
                return self._compose_shared(groups, num_entering, budget)
        num_prompts = len(self.prompts) + num_entering
        if not num_prompts:
            return StepComposition(candidates, repeat(budget), budget, 0, budget)
        num_decodes = max(0, len(candidates) - len(self.prompts))
        room = self._room(num_decodes, num_prompts, budget)
        has_company = self._is_timed and num_prompts > 1
        limits: dict[Request, int] = {}
        for request in self.prompts:
            limits[request] = min(_part(room, has_company), self._longest_chunk)
            room -= min(limits[request], request.next_tokens())
        return StepComposition(
            candidates,
            [limits.get(request, budget) for request in candidates] if limits else repeat(budget),
            budget,
            room,
            self._longest_chunk,
            has_company=has_company,
            num_base_tokens=num_decodes or None,
        )

    def _room(self, num_decodes: int, num_prompts: int, budget: int, *, may_measure: bool = True) -> int:
        """Tokens of prompts in a step with so many rows that decode, each of which needs one of `budget`."""
        if num_decodes == 0:
            return budget
        room = budget
        if self._is_timed:
            if self._target is not None:
                share, seconds = LEAST_SHARE, self._target.aim
            else:
                share, seconds = max(PROMPT_SHARE, num_prompts / num_decodes), None
            room = self.times.extra_tokens(num_decodes, share, most_seconds=seconds, may_measure=may_measure)
        return min(room, max(1, budget - num_decodes))

    # ---- several tenants -------------------------------------------------------------------------------------------

    def _groups(self, candidates: Sequence[Request], waiting: WaitingQueue | None, budget: int) -> list[_Group]:
        """Those who share the step and have something to compute. `waiting`: None where no request can be admitted."""
        eligible = set(candidates)
        groups = []
        for flows in self._shares.parties():
            flows.sort(key=lambda flow: flow.num_served_tokens)
            rows = _in_turn([[row for row in flow.rows if row in eligible and row.next_tokens()] for flow in flows])
            entering = [] if waiting is None else [flow.flow for flow in flows if waiting.num_of(flow.flow)]
            num_entering_tokens = waiting.peek(entering[0]).num_tokens if waiting is not None and entering else 0
            if rows or entering:
                groups.append(_Group(flows, rows, self.prompts, num_entering_tokens, budget))
        return groups

    def _compose_shared(self, groups: list[_Group], num_entering: int, budget: int) -> StepComposition:
        groups.sort(key=lambda group: (not group.rows, group.num_wanted / group.weight))
        least, *others = groups  # one with rows: whether a request can be admitted is not known yet
        weight, weights = least.weight, sum(group.weight for group in groups)
        base = min(least.num_wanted, max(1, int(budget * weight / weights)))
        extra = self.times.extra_tokens(base, (weights - weight) / weight)
        allowances = [(least, base)]
        if extra:
            allowances += zip(others, _fill(others, min(extra, budget - base)), strict=True)
        num_decodes = sum(min(len(group.decodes), allowance) for group, allowance in allowances)
        num_prompts = len(self.prompts) + num_entering
        room = self._room(num_decodes, num_prompts, budget, may_measure=False)
        candidates: list[Request] = []
        limits: list[int] = []
        left: dict[Flow, Allowance] = {}
        for group, allowance in sorted(allowances, key=lambda pair: pair[0].num_served_tokens):
            rows = group.rows_within(allowance, room, self._longest_chunk)
            used = sum(count for _, count in rows)
            left |= dict.fromkeys(group.flows, Allowance(allowance - used))
            room -= sum(count for row, count in rows if row in self.prompts)
            candidates += [row for row, _ in rows]
            limits += [count for _, count in rows]
        return StepComposition(
            candidates,
            limits,
            min(budget, base + extra),
            room,
            self._longest_chunk,
            has_company=self._is_timed and num_prompts > 1,
            num_base_tokens=base,
            allowances=left,
        )


class _Group:
    """The rows of these flows that could run, those that were planned least recently first; `num_wanted` tokens in all."""

    def __init__(
        self,
        flows: Sequence[Tenant],
        rows: list[Request],
        prompts: dict[Request, None],
        num_entering_tokens: int,
        budget: int,
    ) -> None:
        self.flows = [flow.flow for flow in flows]
        self.weight = sum(flow.weight for flow in flows)
        self.num_served_tokens = sum(flow.num_served_tokens for flow in flows) / len(flows)
        self.rows = rows
        self._prompts = [row for row in rows if row in prompts]
        self.decodes = [row for row in rows if row not in prompts] if self._prompts else rows
        num_prompt_tokens = num_entering_tokens + sum(row.next_tokens() for row in self._prompts)
        self.num_wanted = min(budget, len(self.decodes) + num_prompt_tokens)

    def rows_within(self, allowance: int, room: int, longest_chunk: int) -> list[tuple[Request, int]]:
        """Rows and their tokens, at most `allowance` in all, of which those of prompts are at most `room`."""
        if allowance > len(self.decodes) or not self._prompts:
            rows = [(row, 1) for row in self.decodes[:allowance]]
            left = min(allowance - len(rows), room)
            for number, row in enumerate(self._prompts, start=1):
                count = min(row.next_tokens(), _part(left, number < len(self._prompts)), longest_chunk)
                if count > 0:
                    rows.append((row, count))
                    left -= count
            return rows
        rows = []
        chunks = dict.fromkeys(self._prompts, max(1, min(room, allowance // 2, longest_chunk)))
        for row in self.rows:
            if allowance <= 0:
                break
            count = min(row.next_tokens(), chunks.get(row, 1))
            rows.append((row, count))
            allowance -= count
        return rows


def _fill(groups: Sequence[_Group], capacity: int) -> list[int]:
    """Tokens of each group, max-min fair by weight, one at least; the groups come by rising demand for their weight."""
    weights = sum(group.weight for group in groups)
    allowances = []
    for group in groups:
        part = round(capacity * group.weight / weights)
        allowances.append(min(group.num_wanted, max(1, part)))
        capacity -= allowances[-1]
        weights -= group.weight
    return allowances


def _in_turn(rows: Sequence[list[Request]]) -> list[Request]:
    """The rows of flows, one of each after the other, beginning with that of the flow that was served least."""
    if len(rows) == 1:
        return rows[0]
    return [row for turn in zip_longest(*rows) for row in turn if row is not None]


def _part(room: int, has_company: bool) -> int:
    return (room + 1) // 2 if has_company else room
