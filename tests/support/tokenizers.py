"""Small tokenizers of every kind that language models use, trained on the spot and saved as checkpoints save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "Once upon a time there was a pagoda, and it had five roofs. Isn't it nice?",
    "The quick brown fox jumps over the lazy dog; 1234567890 times!  Two spaces,\n\nand lines.\tTabs.",
    "Ein Wörterbuch für Straßenbahnfahrer. Où est la bibliothèque? ¿Dónde está?",
    "東京の塔は高い。人工知能 🙂🙃 👩‍👩‍👧 Привет, мир! שלום עולם नमस्ते",
    "def encode(text):\n    return [ord(c) for c in text]  # <0x0A> is no byte here",
] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_bpe() -> tuple[Tokenizer, dict]:
    """As GPT-2, Llama 3 and Qwen have it; with special, ordinary and non-ASCII added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("塔 🙂", special=False)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|extra|>"],
        "chat_template": CHATML,
    }
    return tokenizer, config


def byte_fallback_bpe() -> tuple[Tokenizer, dict]:
    """As Llama 2 and Mistral have it: spaces as ▁, unknown characters as bytes, a begin-of-sequence token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *_BYTE_TOKENS],
        limit_alphabet=60,
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer = _byte_tokens_are_ordinary(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def unigram() -> tuple[Tokenizer, dict]:
    """As sentencepiece models have it, decoded with Metaspace alone (T5, ALBERT)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def unigram_byte_fallback() -> tuple[Tokenizer, dict]:
    """As Gemma has it: bytes for the unknown, no space stripped from the beginning."""
    base, _ = unigram()
    description = json.loads(base.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary[3:3] = [[token, -20.0] for token in _BYTE_TOKENS]
    description["model"]["byte_fallback"] = True
    description["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    description["pre_tokenizer"] = None
    description["decoder"] = json.loads(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]).__getstate__()
    )
    return Tokenizer.from_str(json.dumps(description)), {"eos_token": "</s>", "unk_token": "<unk>"}


def word_piece() -> tuple[Tokenizer, dict]:
    """As BERT has it; its decoder puts spaces between tokens and cleans them up."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer, {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}


KINDS: dict[str, Callable[[], tuple[Tokenizer, dict]]] = {
    "byte_level_bpe": byte_level_bpe,
    "byte_fallback_bpe": byte_fallback_bpe,
    "unigram": unigram,
    "unigram_byte_fallback": unigram_byte_fallback,
    "word_piece": word_piece,
}


def save_tokenizer(directory: Path, kind: str, **config_changes: object) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a tokenizer of `kind` to `directory`; a change of None removes."""
    tokenizer, config = KINDS[kind]()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config, **config_changes}
    config = {name: value for name, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def _byte_tokens_are_ordinary(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer takes the byte tokens only as special ones; in real checkpoints they are not."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in _BYTE_TOKENS]
    return Tokenizer.from_str(json.dumps(description))
