"""How far a model's answers in each dtype are from those in float32: Pagoda's, and transformers' beside them.

    python benchmarks/agreement.py MODEL [--tokens 12] [--levels] [--quantization int8 int4] [--json FILE]

transformers in float32 continues each of 60 chat prompts greedily. All others then predict the same tokens in the same places,
so that a first difference changes nothing after it. For each, over all these tokens: how often its first choice is that of
transformers in float32, and the mean absolute difference of the tokens' log-probabilities.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pagoda.cli.models_quantize import load_on_cpu
from pagoda.models.config import ModelConfig
from pagoda.models.quantization.quality import ScoredText, Scores, score
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.platform.hardware import cpu_report
from pagoda.text.operations import TextOperations
from pagoda_kernels.cpu.operators import active_level, available_levels, use_level

PROMPTS = """\
What is the capital of France?
Explain in one sentence why the sky is blue.
Write a haiku about the sea in winter.
List three uses of a paper clip.
How do I boil an egg so that the yolk stays soft?
Translate "good morning" into Spanish, German and Italian.
What is the difference between weather and climate?
Give me a short recipe for pancakes.
Who wrote Romeo and Juliet, and when?
Summarize the story of Cinderella in two sentences.
What is 17 times 23?
Name five animals that live in the desert.
Write a Python function that reverses a string.
Why do leaves change their colour in autumn?
What should I pack for a weekend in the mountains?
Tell me a joke about computers.
How does a bicycle stay upright?
Write the first line of a detective story.
What are the primary colours?
Describe the taste of a lemon to someone who has never had one.
What is photosynthesis?
Suggest a name for a small bakery and say why.
How many days are there in a leap year?
Explain what a database index is.
Write a polite email asking for a day off.
What is the tallest mountain on Earth?
Give three tips for learning a new language.
What does the word "serendipity" mean?
Compare cats and dogs as pets.
Write a SQL query that counts the rows of a table named orders.
Who was Marie Curie?
How do vaccines work?
What is the boiling point of water at sea level?
Write a limerick about a frog.
What are the benefits of regular exercise?
Explain gravity to a six-year-old.
Which planet is known as the red planet?
Give me a synonym and an antonym of "happy".
What happened on 20 July 1969?
How do I remove a coffee stain from a shirt?
Write a short dialogue between a teacher and a student.
What is machine learning?
Name the four seasons in order.
Is a tomato a fruit or a vegetable?
What is the square root of 144?
Describe a sunset over a city.
How do I tie a tie?
What causes earthquakes?
Write a slogan for a company that sells umbrellas.
What is the largest ocean?
Explain the rules of chess briefly.
Correct this sentence: "She don't likes apples."
What is the currency of Japan?
Give an example of a metaphor.
How long does it take light to travel from the Sun to the Earth?
Write a to-do list for a busy Monday.
What is the purpose of a constitution?
Recommend a book for a rainy afternoon.
How can I save energy at home?
What do you call a group of lions?
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="directory of a checkpoint in floats")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer, or to its end if that comes first")
    parser.add_argument("--levels", action="store_true", help="bfloat16 on every instruction set, not on the best only")
    parser.add_argument("--quantization", nargs="*", default=["int8", "int4"], choices=("int8", "int4"))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    own = parser.parse_args()
    prompts = list(tokenized(own.model))
    texts, expected = reference(own.model, prompts, own.tokens)
    rows = []
    for name, scores in measured(own, texts):
        rows.append({"name": name, **compared(scores, expected)})
    sets = ", ".join(cpu_report().instruction_sets)
    num_tokens = len(expected.choices)
    print(f"{own.model.name}, {num_tokens} tokens of {len(texts)} answers, on {sets}\n")
    print(f"| {'':<36} | {'same first choice':>17} | {'mean Δ logprob':>14} |\n|{'-' * 38}|{'-' * 18}:|{'-' * 15}:|")
    for row in rows:
        print(f"| {row['name']:<36} | {row['agreement']:>17.2%} | {row['logprob_error']:>14.5f} |")
    if own.json:
        found = {"model": own.model.name, "instruction_sets": sets, "tokens": num_tokens, "rows": rows}
        own.json.write_text(json.dumps(found, indent=1) + "\n")


def tokenized(directory: Path) -> Iterator[list[int]]:
    """Each prompt as the one message of a chat."""
    operations = TextOperations(str(directory))
    for line in PROMPTS.splitlines():
        text = operations.chat_template.render([{"role": "user", "content": line}])
        yield operations.tokenizer.encode(text, add_special_tokens=False)


def reference(directory: Path, prompts: list[list[int]], num_tokens: int) -> tuple[list[ScoredText], Scores]:
    """What is to be predicted: each prompt with its greedy answer in float32, and how that answer was predicted."""
    model = transformers_model(directory, torch.float32)
    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            answer = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=num_tokens,
                do_sample=False,
                attention_mask=torch.ones(1, len(prompt)),
            )[0]
            texts.append(ScoredText(tuple(answer.tolist()), len(prompt)))
    return texts, transformers_scores(model, texts)


def measured(own: argparse.Namespace, texts: list[ScoredText]) -> Iterator[tuple[str, Scores]]:
    """Every other way to compute the model, one after the other in memory."""
    yield "transformers bfloat16", transformers_scores(transformers_model(own.model, torch.bfloat16), texts)
    yield "Pagoda float32", pagoda_scores(own.model, torch.float32, None, texts)
    best = active_level()
    for level in available_levels() if own.levels else [best]:
        use_level(level)
        yield f"Pagoda bfloat16 ({active_level()})", pagoda_scores(own.model, torch.bfloat16, None, texts)
    use_level(best)
    for kind in own.quantization:
        yield f"Pagoda bfloat16, {kind}", pagoda_scores(own.model, torch.bfloat16, kind, texts)


def transformers_model(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def transformers_scores(model: Any, texts: list[ScoredText]) -> Scores:
    """The same as `score` does with Pagoda's model: one pass a text."""
    logprobs, choices = [], []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([text.token_ids])
            logits = model(ids, use_cache=False).logits[0, text.first - 1 : -1].float()
            logprobs.append(logits.log_softmax(1).gather(1, ids[0, text.first :].unsqueeze(1)).squeeze(1))
            choices.append(logits.argmax(1))
    return Scores(torch.cat(logprobs), torch.cat(choices))


def pagoda_scores(directory: Path, dtype: torch.dtype, kind: str | None, texts: list[ScoredText]) -> Scores:
    config = ModelConfig.from_directory(directory)
    quantization = choose_quantization(kind, None, config.quantization, config.linear_input_sizes)
    return score(load_on_cpu(directory, dtype, quantization), texts, lambda: None)


def compared(scores: Scores, expected: Scores) -> dict[str, float]:
    return {"agreement": scores.agreement(expected), "logprob_error": scores.logprob_error(expected)}


if __name__ == "__main__":
    main()
