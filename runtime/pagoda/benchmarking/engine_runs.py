"""The engine without a server, in this process: latency of a batch step by step, and throughput."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from pagoda.benchmarking.workloads import Conversation
from pagoda.engine.core.loop import EngineCore
from pagoda.errors import InvalidRequestError, RequestFailedError
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams

if TYPE_CHECKING:
    from pagoda.llm import LLM


@dataclass(slots=True)
class BatchTimes:
    """One batch, in seconds. `prefill`: until every sequence had its first token; `steps`: each decode step after that."""

    total: float = 0.0
    prefill: float = 0.0
    steps: list[float] = field(default_factory=list)


def check_lengths(core: EngineCore, batch_size: int, input_tokens: int, output_tokens: int) -> None:
    """Raise `InvalidRequestError` for a batch that the engine cannot run as one."""
    ready = core.ready
    if input_tokens + output_tokens > ready.max_model_len:
        raise InvalidRequestError(
            f"--input-len {input_tokens} and --output-len {output_tokens} are more than the model's {ready.max_model_len} "
            "tokens"
        )
    if batch_size > ready.max_num_seqs:
        raise InvalidRequestError(f"--batch-size {batch_size}: the engine runs {ready.max_num_seqs} sequences at once")
    blocks = batch_size * core.most_blocks(input_tokens + output_tokens)
    if blocks >= ready.num_blocks:
        raise InvalidRequestError(
            f"--batch-size {batch_size} of {input_tokens + output_tokens} tokens needs {blocks} KV blocks, and there are "
            f"{ready.num_blocks - 1}: give more with --kv-cache-memory-bytes"
        )


def time_batch(
    core: EngineCore, batch_size: int, input_tokens: int, output_tokens: int, rng: random.Random
) -> BatchTimes:
    """Run one batch of random prompts, greedily and to its full length, and time it.

    Raises:
        RequestFailedError: a sequence failed.
    """
    requests = [
        EngineRequest(
            request_id=f"{rng.getrandbits(48):x}-{number}",
            prompt_token_ids=rng.choices(range(core.ready.vocab_size), k=input_tokens),
            params=SamplingParams(temperature=0, ignore_eos=True, max_tokens=output_tokens),
            max_tokens=output_tokens,
            arrival_time=time.monotonic(),
        )
        for number in range(batch_size)
    ]
    began = time.perf_counter()
    for request in requests:
        core.add_request(request)
    without_first = {request.request_id for request in requests}
    times = BatchTimes()
    moments: list[float] = []
    while core.has_work:
        outputs = core.step().outputs
        now = time.perf_counter()
        for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise RequestFailedError(f"a sequence failed: {output.error}")
            if output.new_token_ids:
                without_first.discard(output.request_id)
        if outputs and not without_first:
            moments.append(now)
    times.prefill = moments[0] - began
    times.total = moments[-1] - began
    times.steps = [later - earlier for earlier, later in pairwise(moments)]
    return times


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputResult:
    """What got through: `seconds` for all requests, and their tokens; `acceptance_length`: see `EngineStats`.

    `later_prompt_tokens`, `later_cached_tokens`: of all turns but the first of each conversation.
    """

    seconds: float
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    later_prompt_tokens: int = 0
    later_cached_tokens: int = 0
    acceptance_length: float | None = None


def run_throughput(llm: LLM, conversations: Sequence[Conversation], *, progress: bool) -> ThroughputResult:
    """Complete all conversations as fast as the engine can: every first turn at once, then every second, and so on.

    Raises:
        RequestFailedError: a sequence failed.
    """
    histories: list[list[int]] = [[] for _ in conversations]
    num_requests = prompt_tokens = cached_tokens = output_tokens = later_prompt_tokens = later_cached_tokens = 0
    seconds = 0.0
    for turn in range(max(len(conversation.turns) for conversation in conversations)):
        asked = [number for number, conversation in enumerate(conversations) if turn < len(conversation.turns)]
        for number in asked:
            content = conversations[number].turns[turn].content
            histories[number] += llm.tokenizer.encode(content) if isinstance(content, str) else content
        sampling = [
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=conversations[number].turns[turn].output_tokens)
            for number in asked
        ]
        began = time.perf_counter()
        outputs = llm.generate([histories[number] for number in asked], sampling, progress=progress)
        seconds += time.perf_counter() - began
        for number, output in zip(asked, outputs, strict=True):
            completion = output.outputs[0]
            if completion.finish_reason is FinishReason.ERROR:
                raise RequestFailedError(f"a sequence failed: {completion.error}")
            histories[number] += completion.token_ids
            prompt_tokens += len(output.prompt_token_ids)
            cached_tokens += output.num_cached_tokens
            if turn > 0:
                later_prompt_tokens += len(output.prompt_token_ids)
                later_cached_tokens += output.num_cached_tokens
            output_tokens += len(completion.token_ids)
        num_requests += len(asked)
    return ThroughputResult(
        seconds=seconds,
        requests=num_requests,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        later_prompt_tokens=later_prompt_tokens,
        later_cached_tokens=later_cached_tokens,
        acceptance_length=llm.stats.acceptance_length,
    )
