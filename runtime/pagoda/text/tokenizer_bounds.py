"""How much longer a tokenizer may make a text, and a token: bounds on what its steps are set to, found before any text comes.

A step of tokenizer.json can replace each character by a megabyte, and steps of that kind multiply. So the factors of all steps
that are free to choose one are multiplied here, from the descriptions that the `tokenizers` library gives of its parts.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as TokenizersTokenizer

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.family import MAX_VOCAB_SIZE

# The longest tokens of models are runs of some hundred spaces; normalizers of models make a character up to 33 (U+FDFA).
MAX_TOKEN_CHARACTERS = 8192
MAX_EXPANSION = 64
MAX_STEPS = 128
MAX_ADDED_BY_POST_PROCESSOR = 256
_MAX_DESCRIPTION_BYTES = 8 << 20
_ZERO_WIDTH = re.compile(r"\(\?|[$^]|\\[bBAzZGK]")  # look-around, edges, and \K, which gives back what was matched


def check_vocabulary(vocabulary: Mapping[str, int]) -> None:
    """Raise `CheckpointError` for a vocabulary (ids by token) beyond the bounds above."""
    longest = max(vocabulary, key=len, default="")
    if len(longest) > MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"the tokenizer has the token {shown(longest)} of {len(longest)} characters; at most {MAX_TOKEN_CHARACTERS} are "
            "allowed"
        )
    largest = max(vocabulary.values(), default=0)
    if largest >= MAX_VOCAB_SIZE:
        raise CheckpointError(f"the tokenizer has a token with id {largest}; ids must be below {MAX_VOCAB_SIZE}")


def check_steps(backend: TokenizersTokenizer) -> None:
    """Raise `CheckpointError` for a tokenizer whose steps are beyond the bounds above."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        _check_expansion(_steps(backend, name), name)
    _check_post_processor(_steps(backend, "post_processor"))


def matches_in_decoder(backend: TokenizersTokenizer) -> bool:
    """Whether decoding a token matches a regular expression, which may fail for that token alone."""
    return any("Regex" in step.get("pattern", ()) for step in _steps(backend, "decoder"))


def _steps(backend: TokenizersTokenizer, name: str) -> list[Mapping[str, Any]]:
    """The steps of a part of the tokenizer, as tokenizer.json describes them."""
    part = getattr(backend, name)
    if part is None:
        return []
    description: bytes = part.__getstate__()
    if len(description) > _MAX_DESCRIPTION_BYTES:
        raise CheckpointError(
            f"the {name} is described in {len(description)} bytes; at most {_MAX_DESCRIPTION_BYTES} are allowed"
        )
    steps = list(_flattened(json.loads(description)))
    if len(steps) > MAX_STEPS:
        raise CheckpointError(f"the {name} has {len(steps)} steps; at most {MAX_STEPS} are allowed")
    return steps


def _flattened(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        for inner in step.get(name, ()):
            yield from _flattened(inner)


def _check_expansion(steps: list[Mapping[str, Any]], name: str) -> None:
    expansion = 1.0
    for step in steps:
        expansion *= max(1.0, _expansion(step))
    if expansion > MAX_EXPANSION:
        kinds = ", ".join(dict.fromkeys(step["type"] for step in steps if _expansion(step) > 1))
        raise CheckpointError(
            f"the {name} may make a text {expansion:.4g} times as long ({kinds}); at most {MAX_EXPANSION} times are allowed"
        )


def _expansion(step: Mapping[str, Any]) -> float:
    """How many characters a step can make of one; steps that are not free to choose count as one."""
    kind = step["type"]
    if kind == "Replace":
        return _expansion_of_replacement(step["pattern"], step["content"])
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])
    if kind == "Precompiled":
        return _longest_replacement(step["precompiled_charsmap"])
    if kind == "WordPiece":
        return 1.0 + len(step["prefix"])
    return 2.0 if kind == "ByteLevel" else 1.0  # bytes that are no ASCII take two in UTF-8


def _expansion_of_replacement(pattern: Mapping[str, str], content: str) -> float:
    if "String" in pattern:
        return len(content) / len(pattern["String"]) if pattern["String"] else 1.0 + len(content)
    expression = pattern["Regex"]
    # A match of some characters becomes the content; an empty one, such as at a word's edge, has it put between characters.
    takes_none = _ZERO_WIDTH.search(expression) is not None or _inserts(expression)
    return 1.0 + len(content) if takes_none else float(len(content))


def _inserts(expression: str) -> bool:
    """Whether an expression matches nothing at all beside a character that no model has."""
    return len(normalizers.Replace(Regex(expression), "x").normalize_str("\U000f0000")) > 1


def _longest_replacement(charsmap: str | list[int]) -> float:
    """The blob of sentencepiece: the size of a trie in four bytes, the trie, then replacements with zeros between them."""
    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else bytes(charsmap)
    replacements = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return float(max(len(text.decode("utf-8", "replace")) for text in replacements))


def _check_post_processor(steps: list[Mapping[str, Any]]) -> None:
    num_added = 0
    for step in steps:
        if step["type"] != "TemplateProcessing":
            continue
        if sum("Sequence" in piece for piece in step["single"]) > 1:
            raise CheckpointError("the post_processor repeats the text; it may be in a template once")
        names = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
        num_added += sum(len(step["special_tokens"].get(name, {}).get("ids", ())) for name in names)
    if num_added > MAX_ADDED_BY_POST_PROCESSOR:
        raise CheckpointError(
            f"the post_processor adds {num_added} tokens to each text; at most {MAX_ADDED_BY_POST_PROCESSOR} are allowed"
        )
