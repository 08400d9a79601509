"""Output tokens a second with speculative decoding against without, in turn on one machine.

    python benchmarks/speculation.py MODEL [--config '{"method": "ngram"}'] [--rows edit-1 chat-1 chat-32] [--rounds 5]

Each round runs the same greedy requests on both engines, which are in one process and take turns; prompts differ from round
to round, and the outputs of both must be equal. The ratio is taken within the round, of wall time and of the CPU time of all
threads, which a neighbour disturbs less; medians count.

    edit-B   a text of 600 tokens, the same text with five changes, and its beginning once more, which the model goes on with,
             for as many tokens as asked for; time is from the first token of all requests to the end
    chat-B   B clients, each of which asks one question after the other and waits for the end of the answer; all time counts
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agreement import PROMPTS
from transformers import AutoTokenizer

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.platform.hardware import cpu_report
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

TEXT_TOKENS = 600
CHANGES = 5
SUBJECT = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"


@dataclass(frozen=True)
class Run:
    """Of one engine in one round."""

    outputs: dict[str, list[int]]  # by request: which is asked first follows from when others are done
    num_tokens: int
    wall_seconds: float
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--config", type=json.loads, default={"method": "ngram"}, help="speculative_config")
    parser.add_argument("--rows", nargs="+", default=["edit-1", "chat-1", "chat-32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=500, help="output tokens of a request; of an answer at most")
    parser.add_argument("--questions", type=int, default=4, help="of each client in a round of chat")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    print(f"{cpu_report().name}; {options.config}; {options.threads} threads")
    for row in options.rows:
        kind, batch = row.rsplit("-", 1)
        measure(row, kind, int(batch), tokenizer, options)


def measure(row: str, kind: str, batch: int, tokenizer: Any, options: argparse.Namespace) -> None:
    """Print a row: the ratios of all rounds and their medians."""
    settings = {
        "model": options.model,
        "device": "cpu",
        "dtype": options.dtype,
        "threads": options.threads,
        "max_num_seqs": batch,
        "max_num_batched_tokens": 1024,
        "max_model_len": 2048,
        "num_gpu_blocks_override": 128 * batch + 1,
    }
    plain = start_core(PagodaConfig(**settings))
    speculating = start_core(PagodaConfig(**settings, speculative_config=options.config))
    wall, cpu, lengths = [], [], []
    for number in range(-1, options.rounds):
        if kind == "edit":
            clients = [[prompt] for prompt in edits(tokenizer, batch, number)]
        else:
            clients = chats(tokenizer, batch, number, options.questions)
        eos = None if kind == "edit" else tokenizer.eos_token_id
        order = [plain, speculating] if number % 2 else [speculating, plain]
        before = stats_of(speculating)
        runs = {id(core): run(core, clients, options.tokens, eos) for core in order}
        without, with_drafts = runs[id(plain)], runs[id(speculating)]
        assert with_drafts.outputs == without.outputs, "speculative decoding has changed an output"
        if number < 0:
            continue
        wall.append(without.wall_seconds / with_drafts.wall_seconds)
        cpu.append(without.cpu_seconds / with_drafts.cpu_seconds)
        drafts, tokens, accepted = (now - was for now, was in zip(stats_of(speculating), before, strict=True))
        lengths.append(f"{accepted}/{tokens} in {drafts}")
        print(
            f"  {row} round {number}: {without.num_tokens / without.wall_seconds:.1f} tok/s without, wall {wall[-1]:.2f} x, "
            f"CPU {cpu[-1]:.2f} x, drafts accepted {lengths[-1]}",
            flush=True,
        )
    print(f"| {row} | {statistics.median(wall):.2f} | {statistics.median(cpu):.2f} |", flush=True)
    for core in (plain, speculating):
        core.shutdown()


def stats_of(core: EngineCore) -> tuple[int, int, int]:
    stats = core._scheduler.speculation
    return stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens


def run(core: EngineCore, clients: list[list[list[int]]], num_tokens: int, eos: int | None) -> Run:
    """Let the core answer the prompts of each client, one after the other. Without `eos` answers have `num_tokens` tokens, and
    time begins with the first token of all."""
    outputs: dict[str, list[int]] = {}
    waiting = [list(prompts) for prompts in clients]

    def ask(client: int) -> None:
        if not waiting[client]:
            return
        request_id = f"{client}/{len(waiting[client])}"
        outputs[request_id] = []
        core.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=waiting[client].pop(0),
                params=SamplingParams(temperature=0.0, ignore_eos=eos is None),
                max_tokens=num_tokens,
                eos_token_ids=() if eos is None else (eos,),
            )
        )

    for client in range(len(clients)):
        ask(client)
    counted = 0
    started = None if eos is None else (time.perf_counter(), time.process_time())
    while core.has_work:
        for output in core.step().outputs:
            outputs[output.request_id] += output.new_token_ids
            if output.finish_reason is not None:
                ask(int(output.request_id.partition("/")[0]))
        if started is None and all(outputs.values()):
            counted = sum(map(len, outputs.values()))
            started = time.perf_counter(), time.process_time()
    assert started is not None
    return Run(
        outputs,
        sum(map(len, outputs.values())) - counted,
        time.perf_counter() - started[0],
        time.process_time() - started[1],
    )


def edits(tokenizer: Any, batch: int, number: int) -> list[list[int]]:
    tokens = tokenizer.encode(SUBJECT.read_text())
    prompts = []
    for index in range(batch):
        rng = random.Random(1000 * number + index)
        first = rng.randrange(len(tokens) - TEXT_TOKENS)
        original = tokens[first : first + TEXT_TOKENS]
        changed = list(original)
        for change in range(CHANGES):
            place = (change + 1) * TEXT_TOKENS // (CHANGES + 1)
            changed[place : place + 2] = [rng.choice(tokens) for _ in range(rng.randint(1, 3))]
        prompts.append([*original, *tokenizer.encode("\n\n"), *changed, *tokenizer.encode("\n\n"), *changed[:32]])
    return prompts


def chats(tokenizer: Any, batch: int, number: int, num_questions: int) -> list[list[list[int]]]:
    """Of each client the questions."""
    questions = PROMPTS.splitlines()
    first = (number + 1) * batch * num_questions
    encoded = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": questions[(first + index) % len(questions)]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for index in range(batch * num_questions)
    ]
    return [encoded[client::batch] for client in range(batch)]


if __name__ == "__main__":
    main()
