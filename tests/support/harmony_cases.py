"""Answers in harmony with what OpenAI's `openai-harmony` reads in them; written into harmony_cases.json, which tests read.

    python tests/support/harmony_cases.py        in an environment with openai-harmony 0.0.8

It fetches its vocabulary, or takes it from TIKTOKEN_ENCODINGS_BASE, a directory with o200k_base.tiktoken, which litellm's
package has under the name fb374d419588a4632f3f557e76b4b70aebbca790.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CASES = Path(__file__).with_suffix(".json")
NUM_CASES = 160
_TEXTS = (
    *("Hi", "塔 🙂", "a < b", "to=functions.f", "<|", "|>", '{"a": 1}', "\n\n", "analysis", "json", " ", "commentary"),
    *("É", "```py\nx=1\n```", "<think>", "\t", "0"),
)
_ARGUMENTS: tuple[Any, ...] = ({"city": "Rome 🙂", "n": 7}, {}, {"s": 'a\n"<|'}, {"l": [1, [2, {"k": None}]]})
_CALLS = (
    "<|channel|>commentary to=NAME <|constrain|>json<|message|>",
    " to=NAME<|channel|>commentary json<|message|>",
    "<|channel|>commentary to=NAME<|message|>",
    " to=NAME<|channel|>analysis<|constrain|>json<|message|>",
    " to=NAME<|channel|>commentary <|constrain|>json<|message|>",
)


def _message(choose: random.Random, *, is_last: bool) -> str:
    kind = choose.choice(("analysis", "analysis", "final", "commentary", "call", "call"))
    if kind == "call":
        name = choose.choice(("functions.f", "functions.get_time"))
        arguments, indent = choose.choice(_ARGUMENTS), choose.choice((None, 2))
        written = json.dumps(arguments, ensure_ascii=False, indent=indent)
        return choose.choice(_CALLS).replace("NAME", name) + written + ("<|call|>" if is_last else "<|end|>")
    text = "".join(choose.choice(_TEXTS) + choose.choice(("", " ", "\n")) for _ in range(choose.randint(0, 6)))
    return f"<|channel|>{kind}<|message|>{text}" + ("<|return|>" if is_last and kind == "final" else "<|end|>")


def main() -> None:
    """Write the cases."""
    import openai_harmony

    encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    choose = random.Random(7)
    cases: list[dict[str, Any]] = []
    while len(cases) < NUM_CASES:
        number = choose.randint(1, 4)
        text = "<|start|>assistant".join(_message(choose, is_last=at == number - 1) for at in range(number))
        tokens = encoding.encode(text, allowed_special="all")
        if choose.random() < 0.25:
            tokens = tokens[: choose.randint(1, len(tokens))]
        try:
            text = encoding.decode_utf8(tokens)
            messages = encoding.parse_messages_from_completion_tokens(
                tokens, openai_harmony.Role.ASSISTANT, strict=False
            )
        except openai_harmony.HarmonyError:  # cut within a character, or a header
            continue
        read = [[each.channel, each.recipient, "".join(part.text for part in each.content)] for each in messages]
        cases.append({"text": text, "messages": read})
    CASES.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
