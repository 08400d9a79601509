"""Drives an executor with plans made by hand: which request runs how many tokens in which step is up to the test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.execution.executor import StepHandle
from pagoda.execution.in_process import InProcessExecutor
from pagoda.models.config import ModelConfig
from pagoda.request import EngineRequest
from pagoda.sampling.output import TokenLogprobs
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import NewBlocks, NewRequest, StepPlan, StepResult


@dataclass
class Sequence:
    name: str
    prompt: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None
    req_index: int | None = None
    is_new: bool = True
    blocks: list[int] = field(default_factory=list)
    num_sent_blocks: int = 0
    num_computed: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


def make_executor(directory: Path, num_blocks: int = 200, **settings: Any) -> InProcessExecutor:
    """An executor that is ready to run, small, on one thread."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": 256,
        "block_size": 8,
        "kv_cache_memory_bytes": 1 << 24,
    }
    config = PagodaConfig(model=str(directory), **{**defaults, **settings})
    executor = InProcessExecutor(config, ModelConfig.from_directory(directory))
    executor.load()
    executor.initialize_kv_cache(num_blocks)
    return executor


class PlanDriver:
    def __init__(self, executor: InProcessExecutor, num_blocks: int = 200, block_size: int = 8, max_num_seqs: int = 8):
        self.executor = executor
        self.block_size = block_size
        self.free_blocks = list(range(1, num_blocks))
        self.free_req_indices = list(range(max_num_seqs))
        self.released: list[int] = []
        self.step_id = 0

    def add(self, name: str, prompt: list[int], sampling: SamplingParams, eos: tuple[int, ...] = ()) -> Sequence:
        return Sequence(name, list(prompt), sampling, eos)

    def release(self, sequence: Sequence) -> None:
        """Take request slot and blocks away: the request ended, or is preempted and may be scheduled again."""
        assert sequence.req_index is not None
        self.free_req_indices.append(sequence.req_index)
        self.released.append(sequence.req_index)
        self.free_blocks.extend(sequence.blocks)
        sequence.req_index, sequence.is_new, sequence.blocks = None, True, []
        sequence.num_computed = sequence.num_sent_blocks = 0

    def plan(self, scheduled: dict[str, int], sequences: list[Sequence], in_flight: int = 0) -> StepPlan:
        """The plan that runs `scheduled[name]` tokens of each; `in_flight` tokens of each are known to the device only."""
        plan = StepPlan(self.step_id, released_req_indices=self.released)
        self.released = []
        self.step_id += 1
        for sequence in sequences:
            count = scheduled.get(sequence.name, 0)
            if not count:
                continue
            if sequence.is_new:
                sequence.req_index = self.free_req_indices.pop()
            end = sequence.num_computed + count
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self.free_blocks.pop(0))
            new_blocks = sequence.blocks[sequence.num_sent_blocks :]
            if sequence.is_new:
                plan.new_requests.append(self._new_request(sequence))
                sequence.is_new, new_blocks, sequence.num_sent_blocks = False, [], len(sequence.blocks)
            plan.request_ids.append(sequence.name)
            plan.req_indices.append(sequence.req_index)
            plan.num_computed_tokens.append(sequence.num_computed)
            plan.num_scheduled_tokens.append(count)
            if new_blocks:
                plan.new_blocks.append(NewBlocks(sequence.req_index, 0, sequence.num_sent_blocks, list(new_blocks)))
            plan.samples.append(end == len(sequence.tokens) + in_flight)
            sequence.num_computed = end
            sequence.num_sent_blocks = len(sequence.blocks)
        return plan

    def step(self, scheduled: dict[str, int], sequences: list[Sequence]) -> StepResult:
        """Plan, run and take the result."""
        plan = self.plan(scheduled, sequences)
        return self.take(plan, self.executor.submit(plan), sequences)

    def take(self, plan: StepPlan, handle: StepHandle, sequences: list[Sequence]) -> StepResult:
        """Put what a step brought into the sequences."""
        result = handle.result()
        by_name = {sequence.name: sequence for sequence in sequences}
        assert len(result.sampled_token_ids) == len(plan.req_indices)
        for row, name in enumerate(plan.request_ids):
            sequence = by_name[name]
            if row in result.errors:
                sequence.error = result.errors[row]
                assert result.sampled_token_ids[row] == []
                continue
            assert len(result.sampled_token_ids[row]) == plan.samples[row]
            sequence.output += result.sampled_token_ids[row]
            sequence.logprobs += result.logprobs.get(row, [])
            sequence.prompt_logprobs += result.prompt_logprobs.get(row, [])
        return result

    def run_to(self, num_output: int, sequences: list[Sequence], chunk: int = 10_000) -> None:
        """Run all sequences, at most `chunk` tokens each a step, until every one has so many output tokens."""
        while any(len(s.output) < num_output and s.error is None for s in sequences):
            scheduled = {
                s.name: min(chunk, len(s.tokens) - s.num_computed)
                for s in sequences
                if len(s.output) < num_output and s.error is None
            }
            self.step(scheduled, sequences)

    @staticmethod
    def _new_request(sequence: Sequence) -> NewRequest:
        return NewRequest(
            req_index=sequence.req_index,
            spec=EngineRequest(
                request_id=sequence.name,
                params=sequence.sampling,
                prompt_token_ids=sequence.prompt,
                max_tokens=1,
                eos_token_ids=sequence.eos_token_ids,
            ),
            output_token_ids=list(sequence.output),
            block_ids=[list(sequence.blocks)],
            num_computed_tokens=sequence.num_computed,
        )
