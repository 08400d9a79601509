"""One step on one rank: apply the plan, run the model, sample, and start the copy of the result to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pagoda import faults
from pagoda.execution.cuda_graphs import Capture, DecodeGraphs, GraphSize, graph_sizes
from pagoda.execution.input_batch import InputBatch, StepInputs
from pagoda.execution.token_masks import AllowedByMasks
from pagoda.models.causal_lm import CausalLM, KVCache
from pagoda.models.lora.weights import LoraModel
from pagoda.sampling.logits_processors import StepProcessor
from pagoda.sampling.logprobs import LogprobTensors, RawDistribution
from pagoda.sampling.output import TokenLogprobs
from pagoda.sampling.params import SamplingParams
from pagoda.sampling.rows import SlotRequest
from pagoda.sampling.sampler import Sampler, SamplerOutput, row_error
from pagoda.sampling.selection import pad_to_blocks
from pagoda.sampling.transfer import DeviceEvent, to_host
from pagoda.scheduling.plan import NO_SAMPLED_TOKENS, ExpertLoad, NewRequest, SampledTokensUpdate, StepPlan, StepResult
from pagoda_kernels import backend

# Logits computed at once for prompt logprobs: 32 MiB of float32, for any length of the prompt.
_MAX_PROMPT_LOGITS = 1 << 23

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class _PromptLogprobs:
    """Of a row of the plan: log-probabilities of its next prompt tokens, in chunks, with `count` best tokens each."""

    plan_row: int
    count: int
    chunks: list[LogprobTensors]


class PendingStep:
    """A step that was queued on the device. `result` waits for it; nothing before that blocks.

    `inputs`: what the model ran on; None where no row could run, and where another pipeline stage samples.
    """

    def __init__(
        self,
        plan: StepPlan,
        errors: dict[int, str],
        device: torch.device,
        inputs: StepInputs | None = None,
        sampled: SamplerOutput | None = None,
        prompt_logprobs: list[_PromptLogprobs] | None = None,
    ) -> None:
        self.inputs = inputs
        self._step_id = plan.step_id
        self._num_rows = len(plan.req_indices)
        self._errors = errors
        self._sampling_plan_rows = inputs.layout.sampling_plan_rows if inputs is not None else []
        self._draft_token_ids = plan.draft_token_ids
        self._sampled = _sampled_to_host(sampled) if sampled is not None else None
        self._prompt_logprobs = [
            _PromptLogprobs(row.plan_row, row.count, [_logprobs_to_host(chunk) for chunk in row.chunks])
            for row in prompt_logprobs or []
        ]
        self._event = DeviceEvent(device)
        self.expert_load: ExpertLoad | None = None

    def result(self) -> StepResult:
        """Wait for the device and return what it made of the plan. To be called once."""
        self._event.wait()
        result = StepResult(
            self._step_id, [[] for _ in range(self._num_rows)], errors=self._errors, expert_load=self.expert_load
        )
        if self._sampled is not None:
            self._take_sampled(self._sampled, result)
        for row in self._prompt_logprobs:
            self._take_prompt_logprobs(row, result)
        return result

    def _take_sampled(self, sampled: SamplerOutput, result: StepResult) -> None:
        token_ids = sampled.token_ids.tolist()
        errors = _output_errors(sampled)
        verified = self._verified(token_ids, errors)
        plan_rows, sampled_token_ids = self._sampling_plan_rows, result.sampled_token_ids
        for index in verified:
            sampled_token_ids[plan_rows[index]].append(token_ids[index])
        if errors:
            for index in errors.keys() & set(verified):
                result.errors.setdefault(plan_rows[index], errors[index])
        for plan_row in result.errors:
            result.sampled_token_ids[plan_row] = []
        if sampled.logprobs is not None:
            entries = dict(
                zip(sampled.logprob_rows.tolist(), sampled.logprobs.to_lists(sampled.logprob_counts), strict=True)
            )
            for index in verified:
                plan_row = plan_rows[index]
                if index in entries and plan_row not in result.errors:
                    result.logprobs.setdefault(plan_row, []).append(entries[index])

    def _verified(self, token_ids: list[int], errors: dict[int, str]) -> Sequence[int]:
        """The outputs that count: of each row the first, and each whose draft before it is what was sampled there.

        An output that could not be sampled is left to the next step, which meets it first, as without drafts.
        """
        if not self._draft_token_ids:
            return range(len(token_ids))
        verified: list[int] = []
        index = 0
        while index < len(token_ids):
            drafts = self._draft_token_ids.get(self._sampling_plan_rows[index], [])
            verified.append(index)
            for place, draft in enumerate(drafts, start=index):
                if token_ids[place] != draft or place + 1 in errors:
                    break
                verified.append(place + 1)
            index += 1 + len(drafts)
        return verified

    @staticmethod
    def _take_prompt_logprobs(row: _PromptLogprobs, result: StepResult) -> None:
        entries: list[TokenLogprobs] = []
        for chunk in row.chunks:
            entries.extend(chunk.to_lists([row.count] * len(chunk.ranks)))
            if bool(chunk.logprobs.isnan().any()):
                result.errors[row.plan_row] = "the model computed NaN logits for this request"
                result.sampled_token_ids[row.plan_row] = []
        if row.plan_row not in result.errors:
            result.prompt_logprobs[row.plan_row] = entries


class PendingMultiStep:
    """All steps of a multi-step plan; `later` holds, for each step after the first, its rows in the plan and the step."""

    def __init__(self, first: PendingStep, later: list[tuple[list[int], PendingStep]]) -> None:
        self._first = first
        self._later = later

    def result(self) -> StepResult:
        """Wait for all steps; a row has the tokens of every step it was in, or the first error it met."""
        result = self._first.result()
        for rows, pending in self._later:
            step = pending.result()
            for index, row in enumerate(rows):
                if row in result.errors:
                    continue
                result.sampled_token_ids[row] += step.sampled_token_ids[index]
                if index in step.logprobs:
                    result.logprobs[row] += step.logprobs[index]
                if index in step.errors:
                    result.errors[row] = step.errors[index]
        return result


class ModelRunner:
    """Runs plans. `kv_caches`: one `(k, v)` for each layer of this rank, see `DecoderForCausalLM.forward`.

    Every rank receives every plan and keeps the same request slots. What a rank exchanges with others follows from the plan.
    `adapters`: of the model, where it is served with any.
    """

    adapters: LoraModel | None = None

    def __init__(
        self,
        model: CausalLM,
        kv_caches: list[KVCache],
        batch: InputBatch,
        *,
        seed: int | None,
        sampler: Sampler | None = None,
        adapters: LoraModel | None = None,
    ) -> None:
        """`sampler`: that of the model which this one drafts for, on the same request slots; None: one of its own."""
        self.model = model
        self.groups = model.groups
        # With several stages the sampled tokens come with a later plan, by way of the driver, to all ranks alike.
        self._shares_samples = self.groups.layout.pipeline_parallel_size == 1
        self.kv_caches = kv_caches
        self.batch = batch
        self.adapters = adapters
        self.sampler = sampler or Sampler(
            vocab_size=batch.vocab_size, token_pool=batch.token_pool, kernels=backend.active, seed=seed
        )
        self._drafts = sampler is not None
        # Request slots whose requests want prompt logprobs: how many best tokens, and the length of the prompt.
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture, sizes: Sequence[GraphSize] | None = None) -> None:
        """Let steps of `sizes` run as graphs from now on; None: those that only decode. To be called once, before the first
        request."""
        batch = self.batch
        self.graphs = DecodeGraphs(
            self.model,
            self.kv_caches,
            sizes=sizes or graph_sizes(len(batch.num_tokens)),
            max_model_len=batch.max_model_len,
            max_blocks=batch.max_blocks,
            num_groups=batch.num_groups,
            block_size=batch.block_size,
            capture=capture,
            adapters=self.adapters,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan, update: SampledTokensUpdate = NO_SAMPLED_TOKENS) -> PendingStep:
        """Run a plan. Returns when the device has been given the work, which on a CPU is when it is done.

        `update`: tokens that earlier steps sampled on another rank. Only the sampling rank's result has samples.

        A fault of one request is in `StepResult.errors`. Anything that is raised here concerns the whole step; the request
        slots stay consistent, and the next plan, which releases those of the failed step, can be run.
        """
        self.batch.apply_update(update)
        for req_index in plan.released_req_indices:
            self._release(req_index)
        for new in plan.new_requests:
            self.batch.enter(new, self._prepare)
        self.batch.append_blocks(plan)
        inputs = self.batch.build(plan, self.graphs)
        errors = {
            row: self.batch.request_errors[req_index]
            for row, req_index in enumerate(plan.req_indices)
            if req_index in self.batch.request_errors
        }
        faults.fire("step", str(self.groups.coordinates.rank))
        if inputs is None:
            return PendingStep(plan, errors, self.batch.device)
        if faults.is_installed("sample") and self.groups.coordinates.is_sampling_rank:
            _fire_sample_faults(plan, errors)
        return self.compute(plan, inputs, errors)

    def compute(self, plan: StepPlan, inputs: StepInputs, errors: dict[int, str]) -> PendingStep:
        """Run the model on the inputs of a plan, and sample; `errors`: of its rows, what is wrong with them already."""
        hidden = self._forward(inputs)
        if hidden is None:  # the next pipeline stage goes on with it
            return PendingStep(plan, errors, self.batch.device)
        prompt_logprobs = self._compute_prompt_logprobs(inputs, hidden) if self._prompt_logprobs else []
        step_processors = [] if plan.token_masks is None else [AllowedByMasks(plan, self.sampler.context)]
        sampled = self._sample(inputs, hidden, step_processors) if inputs.sampled_positions.size else None
        return PendingStep(plan, errors, self.batch.device, inputs, sampled, prompt_logprobs)

    def _forward(self, inputs: StepInputs) -> Tensor | None:
        """Hidden states `[T, hidden_size]` of the step, by a graph where one fits it; None before the last stage."""
        has_adapters = self.adapters is not None and self.adapters.begin_step(
            inputs.layout.req_indices, inputs.layout.num_scheduled_tokens
        )
        size = self.graphs.size_for(inputs.layout) if self.graphs is not None else None
        if self.graphs is not None and size is not None:
            return self.graphs.run(size, has_adapters)[: inputs.layout.num_tokens]
        tensors = inputs.tensors[0]
        return self.model.forward(tensors.input_ids, tensors.positions, self.kv_caches, inputs.metadata())

    def _release(self, req_index: int) -> None:
        self.batch.release(req_index)
        if self.adapters is not None:
            self.adapters.leave(req_index)
        self.sampler.remove(req_index)
        self._prompt_logprobs.pop(req_index, None)

    def _prepare(self, new: NewRequest) -> None:
        """Give the sampler a request that enters. One that it refuses is sampled greedily, and the token is dropped."""
        spec = new.spec
        if spec.sampling.prompt_logprobs is not None:
            count = min(spec.sampling.prompt_logprobs, self.batch.vocab_size)
            self._prompt_logprobs[new.req_index] = (count, spec.num_prompt_tokens)
        try:
            faults.fire("prepare", spec.request_id)
            if self.adapters is not None:
                self.adapters.enter(new.req_index, spec.adapter)
            self.sampler.add(new.req_index, cast(SlotRequest, spec))
        except Exception:  # re-raised: the row still takes part, since every rank plans its collectives with it
            self.sampler.add(new.req_index, cast(SlotRequest, replace(spec, params=_GREEDY, eos_token_ids=())))
            raise

    def _sample(
        self, inputs: StepInputs, hidden: Tensor, step_processors: Sequence[StepProcessor]
    ) -> SamplerOutput | None:
        """Sample the outputs of the rows that have come to their last token, and put what was sampled into the pool.

        The sampling rank samples and broadcasts to its tensor group; returns None on the others.
        """
        if inputs.layout.sampling_tokens is not None:
            hidden = hidden.index_select(0, inputs.layout.sampling_tokens)
        logits = self.model.compute_logits(hidden)
        if logits is None:
            sampled = None
            token_ids = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        else:
            sampled = self.sampler.sample(
                logits,
                inputs.layout.sampling_req_indices,
                inputs.sampled_positions,
                step_processors,
                gives_logprobs=not self._drafts,
            )
            token_ids = sampled.token_ids
        if self._shares_samples:
            token_ids = self.groups.tp_group.broadcast(token_ids)
        self.batch.write_sampled(inputs, token_ids)
        return sampled

    def _compute_prompt_logprobs(self, inputs: StepInputs, hidden: Tensor) -> list[_PromptLogprobs]:
        """Log-probabilities of the prompt tokens that this step's tokens predict, for rows that ask."""
        found: list[_PromptLogprobs] = []
        layout = inputs.layout
        for row, req_index in enumerate(layout.req_indices.tolist()):
            if req_index not in self._prompt_logprobs:
                continue
            count, num_prompt_tokens = self._prompt_logprobs[req_index]
            computed = int(inputs.num_computed_tokens[row])
            first, last = computed + 1, min(computed + int(layout.num_scheduled_tokens[row]) + 1, num_prompt_tokens)
            if first >= last:
                continue
            targets = self.batch.token_pool[req_index, first:last]
            begin = int(layout.first_tokens[row])
            chunks = self._logprobs_in_chunks(hidden[begin : begin + len(targets)], targets, count)
            found.append(_PromptLogprobs(int(layout.plan_rows[row]), count, chunks))
        return found

    def _logprobs_in_chunks(self, hidden: Tensor, targets: Tensor, count: int) -> list[LogprobTensors]:
        """On the sampling rank; the others only do their part of the logits."""
        size = max(1, _MAX_PROMPT_LOGITS // self.batch.vocab_size)
        chunks = []
        for states, ids in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
            logits = self.model.compute_logits(states)
            if logits is not None:
                chunks.append(RawDistribution.of(pad_to_blocks(logits), count).of_tokens(ids))
        return chunks


def _fire_sample_faults(plan: StepPlan, errors: dict[int, str]) -> None:
    """Pass the point `sample` for every row that samples; a fault there ends the row alone."""
    for row, request_id in enumerate(plan.request_ids):
        if plan.samples[row]:
            try:
                faults.fire("sample", request_id)
            except Exception as error:  # an injected fault may be of any type
                errors.setdefault(row, f"the request could not be sampled: {error}")


def _output_errors(sampled: SamplerOutput) -> dict[int, str]:
    """The outputs that could not be sampled, and why."""
    if np.isfinite(sampled.best_logits.numpy()).all():
        return {}
    errors = ((index, row_error(best_logit)) for index, best_logit in enumerate(sampled.best_logits.tolist()))
    return {index: error for index, error in errors if error is not None}


def _sampled_to_host(sampled: SamplerOutput) -> SamplerOutput:
    logprobs = sampled.logprobs
    return SamplerOutput(
        token_ids=to_host(sampled.token_ids),
        best_logits=to_host(sampled.best_logits),
        logprobs=_logprobs_to_host(logprobs) if logprobs is not None else None,
        logprob_rows=sampled.logprob_rows,
        logprob_counts=sampled.logprob_counts,
    )


def _logprobs_to_host(logprobs: LogprobTensors) -> LogprobTensors:
    return LogprobTensors(to_host(logprobs.token_ids), to_host(logprobs.logprobs), to_host(logprobs.ranks))
