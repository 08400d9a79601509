"""Acceptance length of an EAGLE-3 head in Pagoda's engine, on prompts that it was not trained on.

    python evaluate.py MODEL HEAD [--prompts held-out.jsonl] [--num-prompts 50] [--tokens 128] [--json FILE]

Drafts are made in every step, whether they pay or not. The acceptance length is the number of tokens that a step gives: the
drafts that were right, and the token behind them. All requests run alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from collect import chats
from prompts import prompts
from transformers import AutoTokenizer

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.startup import start_core
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.request import Request
from pagoda.speculation.model_proposer import ModelProposer

NUM_DRAFTS = (1, 2, 3, 5)
TEMPERATURES = (0.0, 0.7)


class Always(ModelProposer):
    """Drafts in every step."""

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> Sequence[int | None]:
        super().wanted(requests, num_outputs)
        self.resting = 0
        return [self._most] * len(requests)

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> list[Sequence[int]]:
        return [self._drafts_of(request)[: max(0, limit)] for request, limit in zip(requests, limits, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("head")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held_out = ([{"role": "user", "content": text}] for text in prompts(0, held_out=True))
    conversations = chats(options.prompts, 0) if options.prompts is not None else held_out
    encoded = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        for messages in islice(conversations, options.num_prompts)
    ]
    rows = [
        measure(options, encoded, num_drafts, temperature, tokenizer.eos_token_id)
        for temperature in TEMPERATURES
        for num_drafts in NUM_DRAFTS
    ]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(
    options: argparse.Namespace, encoded: list[list[int]], num_drafts: int, temperature: float, eos: int
) -> dict[str, Any]:
    """Run all prompts, one after the other."""
    core = start_core(
        PagodaConfig(
            model=options.model,
            device="cpu",
            dtype=options.dtype,
            threads=options.threads,
            max_num_seqs=1,
            max_model_len=1024,
            speculative_config={"method": "eagle3", "model": options.head, "num_speculative_tokens": num_drafts},
        )
    )
    core._scheduler._lookahead._proposer = Always(num_drafts)
    for number, tokens in enumerate(encoded):
        core.add_request(
            EngineRequest(
                request_id=str(number),
                prompt_token_ids=tokens,
                params=SamplingParams(temperature=temperature, seed=number),
                max_tokens=options.tokens,
                eos_token_ids=(eos,),
            )
        )
        while core.has_work:
            core.step()
    stats = core.stats()
    core.shutdown()
    row = {
        "temperature": temperature,
        "num_speculative_tokens": num_drafts,
        "acceptance_length": round(stats.acceptance_length or 0.0, 3),
        "accepted_per_position": [
            round(count / max(1, stats.num_spec_drafts), 3) for count in stats.num_spec_accepted_tokens_per_pos
        ],
        "num_drafts": stats.num_spec_drafts,
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
