"""Chat prompts that a model writes itself (Magpie: Xu et al., 2024), for `collect.py --prompts`: JSON lists of messages.

    python self_prompts.py MODEL --count 4000 > prompts.jsonl

Given its chat template up to where a user's message begins, an instruction-tuned model goes on with such a message. So
prompts are of the kinds that it was tuned for, of which no list of tasks and subjects has all.
"""

from __future__ import annotations

import argparse
import json

from transformers import AutoTokenizer

from pagoda.llm import LLM
from pagoda.sampling.params import SamplingParams

BATCH, LONGEST_PROMPT = 64, 96
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="int8 generates faster where the CPU multiplies integers")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    begin = tokenizer.encode(template.split(MARK)[0], add_special_tokens=False)
    written: set[str] = set()
    with LLM(
        options.model,
        device="cpu",
        dtype=options.dtype,
        quantization=options.quantization,
        threads=options.threads,
        max_num_seqs=BATCH,
        max_model_len=LONGEST_PROMPT + 128,
    ) as llm:
        turn = 0
        while len(written) < options.count:
            seeds = range(options.seed + turn * BATCH, options.seed + (turn + 1) * BATCH)
            params = [SamplingParams(temperature=0.8, seed=seed, max_tokens=LONGEST_PROMPT) for seed in seeds]
            for output in llm.generate([begin] * BATCH, params):
                answer = output.outputs[0]
                text = answer.text.strip()
                # One that did not come to its end is none.
                if answer.finish_reason != "stop" or not text or text in written or len(written) == options.count:
                    continue
                written.add(text)
                print(json.dumps([{"role": "user", "content": text}]), flush=True)
            turn += 1


if __name__ == "__main__":
    main()
