"""tokenizer.json and tokenizer_config.json, as the metadata of a GGUF file describes the vocabulary."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pagoda.errors import CheckpointError, shown
from pagoda.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from pagoda.models.gguf.reader import GgufArray, GgufFile

logger = logging.getLogger(__name__)

MAX_TOKENS = 1 << 19
MAX_MERGES = 1 << 20
MAX_TEMPLATES = 64
_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens (llama_token_type)
_SPACE = "▁"  # of sentencepiece
_TEMPLATE = "tokenizer.chat_template"
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_json(file: GgufFile) -> bytes:
    """What tokenizer.json would hold. Raises `CheckpointError` for a kind of tokenizer that is not supported."""
    model = file.value(f"{_PREFIX}model", str)
    build = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}.get(model)
    if build is None:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model is {shown(model)}; supported: gpt2, llama")
    tokens = tokens_of(file)
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(file, tokens),
        **build(file, tokens),
        "post_processor": _post_processor(file, tokens, adds_bos=model == "llama"),
    }
    return json.dumps(values, ensure_ascii=False).encode()


def tokenizer_config_json(file: GgufFile) -> dict[str, Any]:
    """What tokenizer_config.json would hold: special tokens by name, and chat templates."""
    tokens = tokens_of(file)
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in _SPECIAL_TOKENS.items():
        if (token_id := _token_id(file, key, tokens)) is not None:
            values[name] = tokens[token_id]
    templates = {
        key.removeprefix(f"{_TEMPLATE}.") if key != _TEMPLATE else "default": file.value(key, str)
        for key in file.metadata
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    if len(templates) > MAX_TEMPLATES:
        raise CheckpointError(f"{file.path} has {len(templates)} chat templates; at most {MAX_TEMPLATES} are allowed")
    if list(templates) == ["default"]:
        values["chat_template"] = templates["default"]
    elif templates:
        values["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return values


def _byte_level_bpe(file: GgufFile, tokens: Sequence[str]) -> dict[str, Any]:
    name = file.optional(f"{_PREFIX}pre", str)
    if name is None:
        logger.warning("%s does not name how text is cut (tokenizer.ggml.pre): taken as GPT-2 does it", file.path)
    pre_tokenizer = PRE_TOKENIZERS.get(name or "default")
    if pre_tokenizer is None:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre is {shown(name)}, which is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    return {
        "normalizer": {"type": "NFC"} if pre_tokenizer.normalizes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizer.steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignores_merges,
            "vocab": _vocabulary(file, tokens),
            "merges": _merges(file, set(tokens)),
        },
    }


def _sentencepiece_bpe(file: GgufFile, tokens: Sequence[str]) -> dict[str, Any]:
    vocabulary = _vocabulary(file, tokens)
    if f"{_PREFIX}merges" in file.metadata:
        merges = _merges(file, vocabulary)
    else:
        merges = _merges_of_scores(vocabulary, _scores(file, len(tokens)))
    unknown = _token_id(file, "unknown_token_id", tokens)
    adds_space = file.value(f"{_PREFIX}add_space_prefix", bool, True)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "first" if adds_space else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>" if unknown is None and "<unk>" in vocabulary else _text_of(tokens, unknown),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _vocabulary(file: GgufFile, tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        # The first of two that are alike: ids of others are never made of text, but text is made of them.
        logger.warning("%s has %d tokens that occur twice", file.path, len(tokens) - len(vocabulary))
        vocabulary = {token: index for index, token in reversed(list(enumerate(tokens)))}
    return vocabulary


def _merges(file: GgufFile, vocabulary: Iterable[str]) -> list[list[str]]:
    known = vocabulary if isinstance(vocabulary, set | dict) else set(vocabulary)
    merges = []
    for merge in _strings(file, "merges", MAX_MERGES):
        # A token may begin with a space, which is not the one between the two.
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or left not in known or right not in known or left + right not in known:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.merges has {shown(merge)}, which is not two tokens that make a third"
            )
        merges.append([left, right])
    return merges


def _merges_of_scores(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """The pairs of tokens that make a token, those of the best score first, as transformers orders them."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        pairs = [
            (token[:at], token[at:])
            for at in range(1, len(token))
            if token[:at] in vocabulary and token[at:] in vocabulary
        ]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += ((scores[index], len(left), len(right), left, right) for left, right in pairs)
    found.sort(key=lambda each: each[:3], reverse=True)
    return [[left, right] for *_, left, right in found]


def _scores(file: GgufFile, count: int) -> list[float]:
    array = file.value(f"{_PREFIX}scores", GgufArray)
    scores = array.numbers() if array.count == count else []
    if len(scores) != count or not all(type(score) in (int, float) for score in scores):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.scores must have a number for each of its {count} tokens")
    return [float(score) for score in scores]


def _added_tokens(file: GgufFile, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """What is matched in text before it is cut: control tokens, which are special, and those that users have defined."""
    kinds: Sequence[int] = ()
    if f"{_PREFIX}token_type" in file.metadata:
        array = file.value(f"{_PREFIX}token_type", GgufArray)
        if array.count != len(tokens):
            raise CheckpointError(
                f"{file.path}: it has {len(tokens)} tokens and {array.count} kinds of them (token_type)"
            )
        kinds = array.numbers()
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED) and tokens[index]
    ]


def _post_processor(file: GgufFile, tokens: Sequence[str], *, adds_bos: bool) -> dict[str, Any] | None:
    """What puts tokens before and behind a text; of sentencepiece's vocabularies the first is usual (`adds_bos`)."""
    begin = _token_id(file, "bos_token_id", tokens) if file.value(f"{_PREFIX}add_bos_token", bool, adds_bos) else None
    end = _token_id(file, "eos_token_id", tokens) if file.value(f"{_PREFIX}add_eos_token", bool, False) else None
    if begin is None and end is None:
        return (
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
            if not adds_bos
            else None
        )

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before = [] if begin is None else [{"SpecialToken": {"id": tokens[begin], "type_id": type_id}}]
        behind = [] if end is None else [{"SpecialToken": {"id": tokens[end], "type_id": type_id}}]
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *behind]

    special = {tokens[token]: token for token in (begin, end) if token is not None}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in special.items()},
    }


@lru_cache(maxsize=1)
def tokens_of(file: GgufFile) -> list[str]:
    """The texts of all tokens, those of the last file kept: they are asked for several times."""
    return _strings(file, "tokens", MAX_TOKENS)


def _strings(file: GgufFile, key: str, most: int) -> list[str]:
    array = file.value(f"{_PREFIX}{key}", GgufArray)
    if array.count > most:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.{key} has {array.count} entries; at most {most} are allowed"
        )
    return array.strings()


def _token_id(file: GgufFile, key: str, tokens: Sequence[str]) -> int | None:
    token_id = file.optional(f"{_PREFIX}{key}", int)
    if token_id is None or token_id == 0xFFFFFFFF:  # llama.cpp's "none"
        return None
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key} is {token_id}; it must be below {len(tokens)}")
    return token_id


def _text_of(tokens: Sequence[str], token_id: int | None) -> str | None:
    return None if token_id is None else tokens[token_id]
