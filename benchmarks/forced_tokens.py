"""Structured answers with what their grammars force as drafts, and without, in alternating pairs of one run.

python benchmarks/forced_tokens.py MODEL [--batch-sizes 1,32] [--pairs 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

from pagoda import LLM
from pagoda.sampling.params import SamplingParams
from pagoda.structured.spec import GrammarSpec
from pagoda.text.responses.structural_tags import required_calls
from pagoda.text.responses.tools import ToolSet

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 8},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 150},
        "favourite_color": {"enum": ["red", "green", "blue"]},
        "is_registered": {"type": "boolean"},
    },
    "required": ["first_name", "age_in_years", "favourite_color", "is_registered"],
    "additionalProperties": False,
}
SPECS = {
    "JSON": GrammarSpec.of_json_schema(PERSON),
    "compact JSON": replace(GrammarSpec.of_json_schema(PERSON), whitespace=False),
    "a call": replace(
        GrammarSpec.of_structural_tag(required_calls("hermes", ToolSet({"add_person": PERSON}, parallel=False))),
        whitespace=False,
    ),
}


def run(llm: LLM, batch_size: int, spec: GrammarSpec, seed: int) -> tuple[float, float, list[list[int]]]:
    """Seconds, CPU seconds, and the answers."""
    prompts = [[(17 * index + n + seed) % 400 + 100 for n in range(32)] for index in range(batch_size)]
    started, used = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, SamplingParams(temperature=0.8, seed=seed, max_tokens=96, structured_outputs=spec))
    return (
        time.perf_counter() - started,
        time.process_time() - used,
        [list(output.outputs[0].token_ids) for output in outputs],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch-sizes", default="1,32")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    plain, drafting = (
        LLM(
            arguments.model,
            max_model_len=1024,
            enable_prefix_caching=False,
            threads=arguments.threads,
            kv_cache_memory_bytes="512MiB",
            speculative_config=speculative_config,
        )
        for speculative_config in (None, {"method": "grammar"})
    )
    try:
        for batch_size in map(int, arguments.batch_sizes.split(",")):
            for name, spec in SPECS.items():
                for seed in range(4):
                    run(drafting, batch_size, spec, seed)  # what steps cost must be known first
                run(plain, batch_size, spec, 0)
                ratios: list[tuple[float, float]] = []
                for pair in range(arguments.pairs):
                    order = (plain, drafting) if pair % 2 else (drafting, plain)
                    taken = {llm is drafting: run(llm, batch_size, spec, pair) for llm in order}
                    assert taken[True][2] == taken[False][2], "drafts have changed an answer"
                    ratios.append((taken[False][0] / taken[True][0], taken[False][1] / taken[True][1]))
                print(f"batch {batch_size}, {name}: speed with drafts / without", end="")
                for unit, values in zip(("by time", "by CPU time"), zip(*ratios, strict=True), strict=True):
                    print(f" {unit} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})", end="")
                print(flush=True)
    finally:
        plain.close()
        drafting.close()


if __name__ == "__main__":
    main()
