"""Lets a model answer prompts, and keeps its tokens with its hidden states: what an EAGLE-3 head is trained on.

    python collect.py MODEL --output DATA --tokens 200000 [--threads 1] [--minutes 30] [--prompts FILE] [--quantization int8]

The model's own answers are what it drafts for, so no other text is needed. They are generated in batches by Pagoda's engine,
which has the hidden states anyway. DATA is a directory of files of some hundred answers each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import torch
from prompts import prompts
from safetensors.torch import save_file
from transformers import AutoTokenizer

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.execution.executor import StepHandle
from pagoda.execution.model_runner import PendingStep
from pagoda.models.aux_hidden_states import AuxHiddenStates
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import StepPlan

LONGEST_ANSWER, ANSWERS_A_FILE = 256, 128
TEMPERATURES = (0.0, 0.7, 0.0, 1.0, 0.7)


def default_layers(num_layers: int) -> list[int]:
    """Early, in the middle, and late, as EAGLE-3 takes them."""
    return [min(2, num_layers), num_layers // 2, max(0, num_layers - 3)]


class Recorder:
    """Stands where a draft model would: sees every step, and keeps the hidden states of every token of a request."""

    def __init__(self, states: AuxHiddenStates) -> None:
        self._states = states
        self.of_request: dict[str, list[torch.Tensor]] = {}

    def follow(self, plan: StepPlan, step: PendingStep) -> StepHandle:
        if step.inputs is not None:
            layout = step.inputs.layout
            rows = zip(layout.plan_rows, layout.first_tokens, layout.num_scheduled_tokens, strict=True)
            for plan_row, first, size in rows:
                states = self._states.tensor[first : first + size].clone()
                self.of_request.setdefault(plan.request_ids[plan_row], []).append(states)
        return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000, help="of answers")
    parser.add_argument("--minutes", type=float, default=60.0, help="end sooner than with all tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--prompts", type=Path, help="a JSON list of messages a line; default: questions on many subjects"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="int8 generates faster where the CPU multiplies integers")
    parser.add_argument("--batch", type=int, default=32, help="answers at once")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    core, recorder = recording_core(options)
    started = time.monotonic()
    num_tokens, index = 0, 0
    answers: list[dict[str, torch.Tensor]] = []
    requests = requests_of(tokenizer, chats(options.prompts, options.seed), options.seed)
    for tokens, first, states in answers_to(core, recorder, requests, options.batch):
        num_tokens += len(tokens) - first
        answers.append({"tokens": tokens, "first": torch.tensor(first), "states": states})
        is_over = num_tokens >= options.tokens or time.monotonic() - started > 60 * options.minutes
        if len(answers) == ANSWERS_A_FILE or is_over:
            named = {f"{key}.{number}": value for number, each in enumerate(answers) for key, value in each.items()}
            partial = options.output / f"answers-{index:04}.partial"
            save_file(named, partial)
            partial.rename(partial.with_suffix(".safetensors"))
            print(
                f"{num_tokens} tokens of answers, {num_tokens / (time.monotonic() - started):.0f} a second", flush=True
            )
            answers, index = [], index + 1
        if is_over:
            break
    core.shutdown()


def recording_core(options: argparse.Namespace) -> tuple[EngineCore, Recorder]:
    """An engine whose steps are recorded: hidden states of the three layers, and those behind the last layer."""
    core = start_core(
        PagodaConfig(
            model=options.model,
            device="cpu",
            dtype=options.dtype,
            quantization=options.quantization,
            threads=options.threads,
            max_num_seqs=options.batch,
            max_num_batched_tokens=512,
            max_model_len=LONGEST_ANSWER + 512,
            enable_prefix_caching=False,
        )
    )
    worker: Any = core._executor._worker
    num_layers = worker.model_config.num_layers
    recorder = Recorder(AuxHiddenStates(worker.model, [*default_layers(num_layers), num_layers], 512))
    worker._drafter = recorder
    return core, recorder


def chats(file: Path | None, seed: int) -> Iterator[list[dict[str, str]]]:
    """Chats without end."""
    if file is not None:
        yield from cycle([json.loads(line) for line in file.read_text().splitlines()])
    for turn in count():
        for text in prompts(seed + turn):
            yield [{"role": "user", "content": text}]


def requests_of(tokenizer: Any, chats: Iterator[list[dict[str, str]]], seed: int) -> Iterator[EngineRequest]:
    """Of five answers two are greedy, and the others sampled."""
    for number, messages in enumerate(chats):
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        yield EngineRequest(
            request_id=str(number),
            prompt_token_ids=tokens,
            params=SamplingParams(temperature=TEMPERATURES[number % len(TEMPERATURES)], seed=1_000_000 * seed + number),
            max_tokens=LONGEST_ANSWER,
            eos_token_ids=(tokenizer.eos_token_id,),
        )


def answers_to(
    core: EngineCore, recorder: Recorder, requests: Iterator[EngineRequest], batch: int
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Of each request its tokens int32 `[N]`, how many of them are its prompt, and the states `[N - 1, 4 * hidden_size]`."""
    running: dict[str, tuple[EngineRequest, list[int]]] = {}
    while True:
        for request in islice(requests, batch - len(running)):
            core.add_request(request)
            running[request.request_id] = request, []
        for output in core.step().outputs:
            request, tokens = running[output.request_id]
            tokens += output.new_token_ids
            if output.finish_reason is None:
                continue
            del running[output.request_id]
            states = torch.cat(recorder.of_request.pop(output.request_id))
            known = [*request.prompt_token_ids, *tokens]
            # A token that was in flight when the answer ended has states, too.
            yield torch.tensor(known, dtype=torch.int32), len(request.prompt_token_ids), states[: len(known) - 1]


if __name__ == "__main__":
    main()
