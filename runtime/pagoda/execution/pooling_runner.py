"""One step of a model that pools: hidden states become vectors and scores, and nothing is sampled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pagoda import faults
from pagoda.execution.input_batch import InputBatch, StepInputs
from pagoda.execution.model_runner import ModelRunner
from pagoda.models.causal_lm import KVCache
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.encoders.encoder import Encoder
from pagoda.models.lora.weights import LoraModel
from pagoda.models.pooler import Pooler, PoolState
from pagoda.parallel.groups import SINGLE_RANK
from pagoda.pooling.output import PooledOutput
from pagoda.pooling.params import PoolingParams
from pagoda.sampling.transfer import DeviceEvent, to_host
from pagoda.scheduling.plan import ExpertLoad, NewRequest, StepPlan, StepResult

_NOWHERE = np.iinfo(np.int64).max


class PendingPooledStep:
    """A step that was queued on the device. `result` waits for it; nothing before that blocks."""

    def __init__(
        self, plan: StepPlan, errors: dict[int, str], device: torch.device, outputs: dict[int, Tensor] | None = None
    ) -> None:
        """`outputs`: of rows of the plan."""
        self._plan = plan
        self._errors = errors
        self._outputs = {row: to_host(output) for row, output in (outputs or {}).items()}
        self._event = DeviceEvent(device)
        self.expert_load: ExpertLoad | None = None

    def result(self) -> StepResult:
        """Wait for the device and return what it made of the plan. To be called once."""
        self._event.wait()
        result = StepResult(
            self._plan.step_id,
            [[] for _ in self._plan.req_indices],
            errors=self._errors,
            expert_load=self.expert_load,
        )
        for row, output in self._outputs.items():
            values = output.numpy()
            if np.isfinite(values).all():
                result.pooled[row] = PooledOutput(values.astype("<f4").tobytes(), values.shape)
            else:
                result.errors.setdefault(row, "the model computed NaN or infinity for this request")
        return result


class PoolingRunner(ModelRunner):
    """Runs plans whose requests pool; a decoder's, which may come in chunks and behind cached prefixes."""

    def __init__(
        self,
        model: DecoderForCausalLM,
        kv_caches: list[KVCache],
        batch: InputBatch,
        pooler: Pooler,
        score_token_ids: list[int],
        adapters: LoraModel | None = None,
    ) -> None:
        """`score_token_ids`: the tokens whose logits are the output, instead of the hidden state."""
        super().__init__(model, kv_caches, batch, seed=None, adapters=adapters)
        self._pooling = _SlotStates(pooler, len(batch.num_tokens))
        self._score_token_ids = torch.tensor(score_token_ids, dtype=torch.int64, device=batch.device)

    @override
    def _prepare(self, new: NewRequest) -> None:
        faults.fire("prepare", new.spec.request_id)
        if self.adapters is not None:
            self.adapters.enter(new.req_index, new.spec.adapter)
        self._pooling.enter(new)

    @override
    def _release(self, req_index: int) -> None:
        self.batch.release(req_index)
        if self.adapters is not None:
            self.adapters.leave(req_index)
        self._pooling.release(req_index)

    @override
    def compute(self, plan: StepPlan, inputs: StepInputs, errors: dict[int, str]) -> PendingPooledStep:  # type: ignore[override]
        hidden = self._forward(inputs)
        if hidden is None:  # the next pipeline stage goes on with it
            return PendingPooledStep(plan, errors, self.batch.device)
        scores_tokens = len(self._score_token_ids) > 0
        outputs = self._scores(inputs, hidden) if scores_tokens else self._pooling.take(inputs, hidden, errors)
        return PendingPooledStep(plan, errors, self.batch.device, outputs)

    def _scores(self, inputs: StepInputs, hidden: Tensor) -> dict[int, Tensor]:
        """The logits of the score tokens at the last token of each row that has come to it, as the request wants them."""
        layout = inputs.layout
        if not layout.sampling_plan_rows:
            return {}
        if layout.sampling_tokens is not None:
            hidden = hidden.index_select(0, layout.sampling_tokens)
        logits = self.model.compute_logits(hidden)
        if logits is None:
            return {}
        rows = logits.index_select(1, self._score_token_ids).unbind()
        return self._pooling.finish(layout.sampling_plan_rows, layout.sampling_req_indices.tolist(), list(rows))


class EncoderRunner(PoolingRunner):
    """The same for an encoder, each of whose rows is a whole prompt."""

    def __init__(self, model: Encoder, batch: InputBatch, pooler: Pooler) -> None:
        # A runner of a decoder has more: none of it is reached from here.
        self.groups = SINGLE_RANK
        self.batch = batch
        self.graphs = None
        self._encoder = model
        self._pooling = _SlotStates(pooler, len(batch.num_tokens))
        self._score_token_ids = torch.empty(0, dtype=torch.int64)

    @override
    def _forward(self, inputs: StepInputs) -> Tensor:
        tensors, layout = inputs.tensors[0], inputs.layout
        types = None
        if self._encoder.num_types > 1:
            starts = self._pooling.second_segments[layout.req_indices]
            if (starts != _NOWHERE).any():
                by_token = torch.from_numpy(starts.repeat(layout.num_scheduled_tokens)).to(self.batch.device)
                types = (tensors.positions >= by_token).long()
        return self._encoder.forward(tensors.input_ids, tensors.positions, types, layout.query_start_loc)


class _SlotStates:
    """What each request slot's request wants, and what is known of its hidden states."""

    def __init__(self, pooler: Pooler, num_slots: int) -> None:
        self._pooler = pooler
        self._params: dict[int, PoolingParams] = {}
        self._states: dict[int, PoolState] = {}
        self.second_segments = np.full(num_slots, _NOWHERE, dtype=np.int64)

    def enter(self, new: NewRequest) -> None:
        params = new.spec.pooling
        self._params[new.req_index] = params
        self._states[new.req_index] = PoolState(self._pooler.config.modes, keeps_tokens=params.reads_all_tokens)
        self.second_segments[new.req_index] = _NOWHERE if params.second_segment is None else params.second_segment

    def release(self, req_index: int) -> None:
        self._params.pop(req_index, None)
        self._states.pop(req_index, None)

    def take(self, inputs: StepInputs, hidden: Tensor, errors: dict[int, str]) -> dict[int, Tensor]:
        """Add the step's hidden states; the outputs of the rows that have come to their last token, by row of the plan."""
        layout = inputs.layout
        begins = layout.first_tokens.tolist()
        counts = layout.num_scheduled_tokens.tolist()
        positions = inputs.num_computed_tokens.tolist()
        req_indices = layout.req_indices.tolist()
        for req_index, begin, count, position in zip(req_indices, begins, counts, positions, strict=True):
            state = self._states.get(req_index)
            if state is not None:
                state.add(hidden[begin : begin + count], position)
        rows: list[int] = []
        slots: list[int] = []
        vectors: list[Tensor] = []
        for row, req_index in zip(layout.sampling_plan_rows, layout.sampling_req_indices.tolist(), strict=True):
            if row in errors or req_index not in self._states:
                continue
            state, params = self._states[req_index], self._params[req_index]
            vectors.append(state.tokens() if params.reads_all_tokens else state.vector())
            rows.append(row)
            slots.append(req_index)
        return self.finish(rows, slots, vectors)

    def finish(self, rows: list[int], req_indices: list[int], vectors: list[Tensor]) -> dict[int, Tensor]:
        known = [index for index, req_index in enumerate(req_indices) if req_index in self._params]
        params = [self._params[req_indices[index]] for index in known]
        outputs = self._pooler.finish([vectors[index] for index in known], params)
        return {rows[index]: output for index, output in zip(known, outputs, strict=True)}
