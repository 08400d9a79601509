"""Scores a checkpoint on held-out items of every skill, by greedy generation with transformers; prints JSON.

python evaluate.py /tmp/demo/checkpoint --items 100 --output scores.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from lexicon import KEY_WORDS
from recall import FactSheet, ask_one, fact_sheet
from skills import Item, draw, is_held_out
from tools import TOOLS, Tool, tool_item
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SEED = 20_001


@dataclass(frozen=True)
class Question:
    """A conversation to answer, and how to judge the answer."""

    skill: str
    messages: list[dict[str, str]]
    right: Callable[[str], bool]
    tools: tuple[Tool, ...] = ()


def exactly(expected: str) -> Callable[[str], bool]:
    return lambda answer: answer == expected


def from_item(skill: str, item: Item) -> Question:
    """The item's first question; its answer must be met word for word."""
    role, text = item.messages[0]
    return Question(skill, [{"role": role, "content": text}], exactly(item.messages[1][1]))


def plain(skill: str) -> Callable[[Random], Question]:
    return lambda random: from_item(skill, draw(random, skill, held_out=True))


def copy_twenty(random: Random) -> Question:
    """Twenty words of a token each; "copy" also has letters, numbers and invented words of several tokens."""
    while True:
        text = " ".join(random.sample(KEY_WORDS, 20))
        if is_held_out(f"copy|{text}"):
            return Question("copy_20", [{"role": "user", "content": f"Repeat: {text}"}], exactly(text))


def recall_of(num_tokens: int, filler: bool = False) -> Callable[[Random], Question]:
    """Recall from a fact sheet of about `num_tokens` tokens, once as lines and once as sentences."""

    def make(random: Random) -> Question:
        as_sentences = filler or random.random() < 0.4
        per_fact = 48 if filler else 10 if as_sentences else 8
        sheet: FactSheet = fact_sheet(random, num_tokens // per_fact, as_sentences=as_sentences, filler=filler)
        question, answer = ask_one(random, sheet)
        messages = [{"role": "user", "content": f"{sheet.text}\n{question}"}]
        return Question(f"recall_{num_tokens}{'_filler' if filler else ''}", messages, exactly(answer))

    return make


def parses(answer: str) -> bool:
    try:
        return isinstance(json.loads(answer), dict)
    except json.JSONDecodeError:
        return False


def json_valid(random: Random) -> Question:
    question = from_item("json", draw(random, "json", held_out=True))
    return Question("json_valid", question.messages, parses)


def tool_call(random: Random) -> Question:
    tools = random.sample(TOOLS, 3)
    item = tool_item(random, tools)
    while not is_held_out(item.key):
        item = tool_item(random, tools)
    question = from_item("tool_call", item)
    return Question("tool_call", question.messages, question.right, tuple(tools))


QUESTIONS: dict[str, Callable[[Random], Question]] = {
    "copy_20": copy_twenty,
    **{
        skill: plain(skill)
        for skill in ("copy", "reverse", "count", "add", "compare", "sort", "json", "refuse", "stop")
    },
    "json_valid": json_valid,
    "identity": lambda random: from_item("identity", draw(random, "identity", held_out=False)),
    "tool_call": tool_call,
    "recall_300": recall_of(300),
    "recall_1500": recall_of(1500),
    "recall_1500_filler": recall_of(1500, filler=True),
}


class Scorer:
    """Answers questions with a checkpoint and judges them."""

    def __init__(self, checkpoint: Path, device: str, seed: int) -> None:
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
        self.tokenizer.padding_side = "left"
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()

    def prompt(self, question: Question) -> str:
        tools = [tool.specification() for tool in question.tools] or None
        return self.tokenizer.apply_chat_template(
            question.messages, tools=tools, tokenize=False, add_generation_prompt=True
        )

    @torch.inference_mode()
    def answers(self, prompts: list[str], max_new_tokens: int = 200) -> list[str]:
        """Greedy continuations of `prompts`, without the token that ended them; an unfinished one keeps its last token."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(
            self.model.device
        )
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def score(self, name: str, items: int, batch: int, failures: list[dict[str, str]]) -> float:
        """Share of right answers to `items` questions of one kind; wrong ones are added to `failures`."""
        random, right = Random(f"{self.seed}/{name}"), 0
        questions = [QUESTIONS[name](random) for _ in range(items)]
        for start in range(0, items, batch):
            part = questions[start : start + batch]
            prompts = [self.prompt(question) for question in part]
            for question, prompt, answer in zip(part, prompts, self.answers(prompts), strict=True):
                if question.right(answer):
                    right += 1
                else:
                    failures.append({"skill": name, "prompt": prompt[-300:], "answer": answer})
        return right / items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--items", type=int, default=100, help="questions per skill")
    parser.add_argument("--seed", type=int, default=SEED, help="which items are drawn")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--skills", nargs="*", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the scores here")
    parser.add_argument("--failures", type=Path, help="write the wrong answers here")
    arguments = parser.parse_args()
    scorer, failures = Scorer(arguments.checkpoint, arguments.device, arguments.seed), []
    scores = {}
    for name in arguments.skills:
        scores[name] = scorer.score(name, arguments.items, arguments.batch, failures)
        print(f"{name:20s} {scores[name]:.3f}", flush=True)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"items": arguments.items, "seed": arguments.seed, "scores": scores}, indent=1) + "\n"
        )
    if arguments.failures:
        arguments.failures.write_text(json.dumps(failures, indent=1))


if __name__ == "__main__":
    main()
