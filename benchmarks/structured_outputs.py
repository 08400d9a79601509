"""Tokens a second with and without a JSON schema, in alternating pairs of one run, and what masks and compiling take.

python benchmarks/structured_outputs.py MODEL [--batch-sizes 1,32] [--pairs 5] [--tokens 96]
"""

from __future__ import annotations

import argparse
import statistics
import time

from pagoda import LLM
from pagoda.sampling.params import SamplingParams
from pagoda.structured.spec import GrammarSpec

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string"}}},
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 50}  # longer than any of the answers


def seconds_of(llm: LLM, batch_size: int, num_tokens: int, spec: GrammarSpec | None, seed: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, for `batch_size` answers of `num_tokens` tokens each."""
    prompts = [[(17 * index + n + seed) % 400 + 100 for n in range(32)] for index in range(batch_size)]
    params = SamplingParams(temperature=0.8, seed=seed, max_tokens=num_tokens, ignore_eos=True, structured_outputs=spec)
    started, used = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params)
    taken = time.perf_counter() - started, time.process_time() - used
    assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch-sizes", default="1,32")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    llm = LLM(arguments.model, max_model_len=1024, enable_prefix_caching=False, threads=arguments.threads)
    spec = GrammarSpec.of_json_schema(SCHEMA)
    try:
        for batch_size in map(int, arguments.batch_sizes.split(",")):
            for constrained in (None, spec):
                seconds_of(llm, batch_size, 8, constrained, 0)
            ratios: list[tuple[float, float]] = []
            speeds: list[float] = []
            for pair in range(arguments.pairs):
                order = (None, spec) if pair % 2 else (spec, None)
                taken = {
                    constrained is not None: seconds_of(llm, batch_size, arguments.tokens, constrained, pair)
                    for constrained in order
                }
                ratios.append((taken[False][0] / taken[True][0], taken[False][1] / taken[True][1]))
                speeds.append(batch_size * arguments.tokens / taken[True][0])
            speed = statistics.median(speeds)
            print(f"batch {batch_size}: guided {speed:.1f} tokens/s; guided / unguided", end="", flush=True)
            for name, values in zip(("by time", "by CPU time"), zip(*ratios, strict=True), strict=True):
                print(f" {name} {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})", end="")
            print(flush=True)
    finally:
        llm.close()


if __name__ == "__main__":
    main()
