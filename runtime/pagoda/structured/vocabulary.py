"""A checkpoint's tokenizer as grammars see it: the bytes of every token, and which tokens are special."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llguidance

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.checkpoint_files import read_text

_TOKENIZER_FILE = "tokenizer.json"
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """`tokenizer`: llguidance's trie of tokens. `special_tokens`: id by text of those that no text spells out."""

    tokenizer: llguidance.LLTokenizer
    special_tokens: dict[str, int]

    @classmethod
    def from_directory(cls, directory: str | Path, vocab_size: int | None = None) -> GrammarVocabulary:
        """Read tokenizer.json; `vocab_size`: of the model, which may have more ids than the tokenizer.

        `directory` may be a GGUF file. Takes about 8 us a token, one of them with the interpreter lock held. Raises
        `ConfigError` for a tokenizer without tokenizer.json or of a kind whose tokens have no bytes of their own (WordPiece,
        WordLevel: spaces depend on the neighbours).
        """
        path = Path(directory) / _TOKENIZER_FILE
        try:
            text = read_text(Path(directory), _TOKENIZER_FILE, _MAX_BYTES)
        except CheckpointError as error:
            raise ConfigError(f"structured outputs need {_TOKENIZER_FILE}: {error}") from error
        try:
            content = json.loads(text)  # once: the interpreter is held meanwhile
            num_tokens = None if vocab_size is None else max(vocab_size, _num_ids(content))
            tokenizer = llguidance.LLTokenizer(_readable(text, content), n_vocab=num_tokens)
            # llguidance takes tokens such as `<tool_call>` for special, too, where the tokenizer does not.
            specials = {
                token["content"]: token["id"]
                for token in content.get("added_tokens", ())
                if token["special"] or tokenizer.is_special_token(token["id"])
            }
        except (
            BaseException
        ) as error:  # llguidance panics, which is no `Exception`, for tokens of names that it does not expect
            if isinstance(error, ConfigError | KeyboardInterrupt | SystemExit):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"structured outputs cannot use the tokenizer of {path}: {reason}") from error
        return cls(tokenizer, specials)


def _readable(text: str, content: dict[str, Any]) -> str:
    """A tokenizer.json, and what it holds, as llguidance reads it, which asks for tokens of bytes.

    Those of a Unigram model without them have bytes all the same: their pieces' own, a space for U+2581. So it gets the pieces
    as those of SentencePiece's BPE, of which it reads nothing but the pieces.
    """
    model = content["model"]
    if model.get("type") in ("WordPiece", "WordLevel"):
        raise ConfigError(
            f"structured outputs cannot use a {model['type']} tokenizer: whether there is a space before a token depends on "
            "its neighbours, so a token has no text of its own"
        )
    if model.get("type") != "Unigram" or model.get("byte_fallback"):
        return text
    pieces = [piece for piece, _ in model["vocab"]]
    unknown = pieces[model["unk_id"]] if model.get("unk_id") is not None else None
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    substitute = {
        "version": content.get("version", "1.0"),
        "added_tokens": content.get("added_tokens", []),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": {piece: token_id for token_id, piece in enumerate(pieces)},
            "merges": [],
            "unk_token": unknown,
            "byte_fallback": True,
        },
    }
    return json.dumps(substitute, ensure_ascii=False)


def _num_ids(content: dict[str, Any]) -> int:
    """One more than the largest id in a tokenizer.json."""
    vocabulary = content["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max((*ids, *(token["id"] for token in content.get("added_tokens", ()))), default=-1)
