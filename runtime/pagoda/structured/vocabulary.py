"""A checkpoint's tokenizer as grammars see it: the bytes of every token, and which tokens are special."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import llguidance

from pagoda.errors import ConfigError

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

        Takes about 20 us a token, half of it with the interpreter lock held. Raises `ConfigError` for a tokenizer without
        tokenizer.json or of a kind whose tokens have no bytes of their own (neither byte-level nor with byte fallback).
        """
        path = Path(directory) / _TOKENIZER_FILE
        try:
            size = path.stat().st_size
            if size > _MAX_BYTES:
                raise ConfigError(f"{path} has {size} bytes; at most {_MAX_BYTES} are allowed")
            text = path.read_text(encoding="utf-8")
            num_tokens = None if vocab_size is None else max(vocab_size, _num_ids(text))
            tokenizer = llguidance.LLTokenizer(text, n_vocab=num_tokens)
            # llguidance takes tokens such as `<tool_call>` for special, too, where the tokenizer does not.
            specials = {
                token["content"]: token["id"]
                for token in json.loads(text).get("added_tokens", ())
                if token["special"] or tokenizer.is_special_token(token["id"])
            }
        except OSError as error:
            raise ConfigError(
                f"structured outputs need {path}, which cannot be read: {error.strerror or error}"
            ) from error
        except (
            BaseException
        ) as error:  # llguidance panics, which is no `Exception`, for tokens of names that it does not expect
            if isinstance(error, ConfigError | KeyboardInterrupt | SystemExit):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"structured outputs cannot use the tokenizer of {path}: {reason}") from error
        return cls(tokenizer, specials)


def _num_ids(text: str) -> int:
    """One more than the largest id in a tokenizer.json."""
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max((*ids, *(token["id"] for token in content.get("added_tokens", ()))), default=-1)
