"""The tokenizer of a made-up checkpoint: byte-level BPE, trained on the spot on a page of text.

Byte level means that every text can be encoded and every sequence of ids decodes to something, code points split over
tokens included; the few accented, CJK and emoji words see to it that such splits are common.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
BEGIN_OF_TEXT = "<|beginoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, BEGIN_OF_TEXT, TURN_START, TURN_END)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# How Qwen cuts text into words. Transformers gives every qwen2 checkpoint this cut, whatever its tokenizer.json says.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = """
Once upon a time there was a small pagoda on a hill above the river. Every morning the old keeper swept the stone steps,
opened the wooden doors and rang the bell, and the sound went down into the valley where people were already at work.
One day a young traveller came up the path. She carried a lantern, a map and a little box that nobody was allowed to open.
"What is in the box?" asked the keeper. "A question," said the traveller, "and I am looking for someone who can answer it."
They sat down under the roof, drank tea and watched the rain. The keeper thought for a long time before he spoke again.
"There are seven floors in this tower," he said. "On each floor somebody has left an answer, but never the question."
So they climbed the stairs together, floor after floor, and read what was written on the walls in many different languages:
the weather of a thousand years, the names of ships, recipes for bread and soup, numbers, letters, a song without an end.
The first thing you should know about a computer is that it does exactly what it is told, which is not what you want.
Large language models predict the next token; a server has to keep many such predictions going at the same time.
If the queue is full, wait. If the memory is full, give some of it back. If a request was cancelled, stop working on it.
def add(left, right): return left + right    for index in range(10): print(index, add(index, 1))    # 0 1 2 3 4 5 6 7 8 9
{"name": "pagoda", "version": "0.1.0", "ready": true, "items": [1, 2, 3.14, null], "path": "/v2/models/demo/generate"}
Système, français, où est la gare? Grüße aus München, schöne Straße. ¿Dónde está el niño? São João. Привет, мир! Καλημέρα.
日本語のテキスト、中文文本，한국어 문장。 塔の上から川が見える。 🙂 🚀 🏯 ⛩️ 👩🏽
naïve café, 20 °C, 5 €, 3 × 4 = 12, a ≤ b, … “quoted” — done.
In the evening the traveller opened the box at last. It was empty, and both of them laughed until the stars came out.
"""


def write_tokenizer(
    directory: Path, *, vocab_size: int, qwen_words: bool, add_bos: bool, chat_template: bool, max_length: int
) -> None:
    """Write tokenizer.json and tokenizer_config.json for a vocabulary of at most `vocab_size` ids.

    `qwen_words`: cut text as Qwen does (composed code points, single digits), else as GPT-2. `add_bos`: every encoded text
    begins with `BEGIN_OF_TEXT`. `chat_template`: with ChatML turns, or with no template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen_words:
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN_OF_TEXT} $A",
            pair=f"{BEGIN_OF_TEXT} $A $B",
            special_tokens=[(BEGIN_OF_TEXT, SPECIAL_TOKENS.index(BEGIN_OF_TEXT))],
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT if add_bos else None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        settings["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
