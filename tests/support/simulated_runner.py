"""A model runner without a model: it executes plans on a simulated KV cache and checks every read.

The KV of a position is represented by the group of layers and the whole token prefix that led to it. So a block that is shared
wrongly, also between groups, evicted while in use, or read before it was written shows up as a wrong prefix. The "model" is a
pure function of the prefix, so the tokens of a request must not depend on how it was scheduled.

A group of recurrent state has of each block what the last row to compute in it left there. All rows of a step read their state
before any writes, and again when all have written: no row may depend on another of its step, nor be disturbed by one.

A row in one of `failed_slots` does not run: it has an error, and where its KV should be is `INVALID`. What reads that computes
nonsense, as a model would: `INVALID` KV and a token that is not the request's.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from pagoda.scheduling.kv_groups import FullGroup, GroupRule, StateGroup
from pagoda.scheduling.plan import NewRequest, SampledTokensUpdate, StepPlan, StepResult

INVALID = (-1,)


def simulated_token(prefix: tuple[int, ...], vocab_size: int = 50) -> int:
    """The token that follows `prefix`."""
    return int.from_bytes(blake2b(repr(prefix).encode(), digest_size=4).digest(), "big") % vocab_size


class SimulatedRunner:
    def __init__(self, block_size: int, groups: Sequence[GroupRule] = (FullGroup(),)) -> None:
        self.block_size = block_size
        self.groups = groups
        self.kv: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        self.token_pool: dict[int, list[int]] = {}
        self.block_tables: dict[int, list[list[int]]] = {}
        self.failed_slots: set[int] = set()
        self.num_tokens_run = 0

    def enter_only(self, plan: StepPlan) -> None:
        """What is left of a plan whose step failed before it computed anything."""
        for req_index in plan.released_req_indices:
            del self.token_pool[req_index], self.block_tables[req_index]
            self.failed_slots.discard(req_index)
        for new in plan.new_requests:
            self._enter(new)

    def execute(self, plan: StepPlan, failed_row: int | None = None) -> StepResult:
        """Run a plan. The row `failed_row` does not run, nor does its request in later plans."""
        self.enter_only(plan)
        if failed_row is not None:
            self.failed_slots.add(plan.req_indices[failed_row])
        rows = list(zip(plan.req_indices, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True))
        assert len(set(plan.req_indices)) == len(plan.req_indices)
        for new in plan.new_blocks:
            assert new.req_index in plan.req_indices
            assert new.block_ids
            table = self.block_tables[new.req_index][new.group]
            assert new.offset == len(table)
            table.extend(new.block_ids)
        for row, drafts in plan.draft_token_ids.items():
            self.token_pool[plan.req_indices[row]] += drafts
        has_state = [self._read_state(req_index, computed) for req_index, computed, _ in rows]
        for req_index, computed, scheduled in rows:
            self._write(req_index, computed, scheduled)  # all rows write before any reads, as in a layer
        self._check_read_states(rows, has_state)
        sampled: list[list[int]] = []
        errors: dict[int, str] = {}
        for row, ((req_index, computed, scheduled), samples) in enumerate(zip(rows, plan.samples, strict=True)):
            drafts = plan.draft_token_ids.get(row, [])
            if req_index in self.failed_slots:
                errors[row] = "the row did not run"
                sampled.append([])
                continue
            is_valid = self._read(req_index, computed, scheduled, has_state[row])
            tokens = self.token_pool[req_index]
            assert samples or not drafts
            if samples:
                assert len(tokens) == computed + scheduled
                del tokens[len(tokens) - len(drafts) :]
            sampled.append(self._sample(tokens, drafts, is_valid) if samples else [])
            tokens += sampled[-1]
        self.num_tokens_run += sum(plan.num_scheduled_tokens)
        for index in range(1, max(plan.num_steps, default=1)):
            rows, step = plan.nth_step(index)
            for row, tokens in zip(rows, self.execute(step).sampled_token_ids, strict=True):
                sampled[row] += tokens
        return StepResult(plan.step_id, sampled, errors=errors)

    @staticmethod
    def _sample(tokens: list[int], drafts: list[int], is_valid: bool) -> list[int]:
        """The tokens behind `tokens`, as far as the drafts are right."""
        if not is_valid:
            return [simulated_token(INVALID, 1000) + 1000]
        sampled: list[int] = []
        for draft in [*drafts, None]:
            sampled.append(simulated_token(tuple(tokens + sampled)))
            if sampled[-1] != draft:
                break
        return sampled

    def _enter(self, new: NewRequest) -> None:
        assert new.req_index not in self.token_pool, "a request slot was given away while it was held"
        self.token_pool[new.req_index] = list(new.token_ids)
        assert len(new.block_ids) == len(self.groups)
        self.block_tables[new.req_index] = [list(blocks) for blocks in new.block_ids]

    def _write(self, req_index: int, computed: int, scheduled: int) -> None:
        assert scheduled >= 1
        if req_index in self.failed_slots:
            self.invalidate(req_index, computed, scheduled)
            return
        tokens = self.token_pool[req_index]
        assert computed + scheduled <= len(tokens), "tokens were planned that nobody knows"
        for group in range(len(self.groups)):
            for position in range(computed, computed + scheduled):
                self.kv[self.place(req_index, group, position)] = group, tuple(tokens[: position + 1])

    def _read_state(self, req_index: int, computed: int) -> bool:
        """Whether the states that a row goes on from are right, before any row of the step has written."""
        is_valid = True
        for group, rule in enumerate(self.groups):
            if isinstance(rule, StateGroup) and computed > 0 and req_index not in self.failed_slots:
                held = self.kv.get(self.place(req_index, group, computed - 1))
                if held == (group, INVALID):
                    is_valid = False
                else:
                    assert held == (group, tuple(self.token_pool[req_index][:computed])), (
                        f"request slot {req_index} goes on from position {computed} in group {group} with the state of {held}"
                    )
        return is_valid

    def _check_read_states(self, rows: Sequence[tuple[int, int, int]], has_state: Sequence[bool]) -> None:
        """Assert that a state which a row went on from in another block is still there: no row wrote over it."""
        for (req_index, computed, _), was_valid in zip(rows, has_state, strict=True):
            if was_valid and computed % self.block_size == 0:
                assert self._read_state(req_index, computed)

    def _read(self, req_index: int, computed: int, scheduled: int, has_state: bool) -> bool:
        """Whether what the row computes is right: not if it read KV that a failed row should have written."""
        tokens = self.token_pool[req_index]
        is_valid = has_state
        for group, rule in enumerate(self.groups):
            if isinstance(rule, StateGroup):
                continue
            window = rule.window
            first = 0 if window is None else max(0, computed - window + 1)
            for position in range(first, computed + scheduled):
                held = self.kv.get(self.place(req_index, group, position))
                if held == (group, INVALID):
                    is_valid = False
                else:
                    assert held == (group, tuple(tokens[: position + 1])), (
                        f"position {position} of request slot {req_index} in group {group} holds the KV of {held}"
                    )
        if not is_valid:
            self.invalidate(req_index, computed, scheduled)
        return is_valid

    def invalidate(self, req_index: int, computed: int, scheduled: int) -> None:
        """What these positions hold is the KV of nothing."""
        for group in range(len(self.groups)):
            for position in range(computed, computed + scheduled):
                self.kv[self.place(req_index, group, position)] = group, INVALID

    def place(self, req_index: int, group: int, position: int) -> tuple[int, int]:
        block_id = self.block_tables[req_index][group][position // self.block_size]
        assert block_id != 0, "the null block is written or read"
        is_state = isinstance(self.groups[group], StateGroup)
        return block_id, 0 if is_state else position % self.block_size


class SimulatedFirstStage:
    """The token pool of a pipeline's first stage: it gets sampled tokens with a later plan only."""

    def __init__(self) -> None:
        self.token_pool: dict[int, dict[int, int]] = {}

    def inputs(self, plan: StepPlan, update: SampledTokensUpdate) -> list[list[int | None]]:
        """The tokens of each row of `plan` as this stage knows them; None for one that it does not."""
        for req_index, position, token_id in zip(update.req_indices, update.positions, update.token_ids, strict=True):
            self.token_pool[req_index][position] = token_id
        for req_index in plan.released_req_indices:
            del self.token_pool[req_index]
        for new in plan.new_requests:
            self.token_pool[new.req_index] = dict(enumerate(new.token_ids))
        for row, drafts in plan.draft_token_ids.items():
            end = plan.num_computed_tokens[row] + plan.num_scheduled_tokens[row]
            self.token_pool[plan.req_indices[row]].update(enumerate(drafts, start=end - len(drafts)))
        rows = zip(plan.req_indices, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)
        return [
            [self.token_pool[req_index].get(position) for position in range(computed, computed + scheduled)]
            for req_index, computed, scheduled in rows
        ]
