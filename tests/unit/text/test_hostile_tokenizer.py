"""Tokenizer files that anyone may have made: each fault is one sentence, and the process that loads them goes on."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pagoda.errors import CheckpointError, InvalidRequestError, RequestFailedError
from pagoda.text import tokenizer, tokenizer_loading
from pagoda.text.operations import TextOperations
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.tokenizer_bounds import MAX_TOKEN_CHARACTERS
from pagoda.text.tokenizer_files import MAX_ADDED_TOKENS, MAX_TEMPLATE_BYTES
from pagoda.text.tokenizer_loading import MAX_TOKENIZER_BYTES
from tests.support.tokenizers import KINDS, save_tokenizer

DESCRIPTION: dict[str, Any] = json.loads(KINDS["byte_level_bpe"]()[0].to_str())
TEMPLATE = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
TEXT_PIECE = {"Sequence": {"id": "A", "type_id": 0}}


def refused(directory: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Tokenizer.from_directory(directory)
    message = str(caught.value)
    assert len(message) < 1000
    assert "\n" not in message
    assert str(directory) in message


def replace_step(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


BAD_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "a normalizer of megabytes": (
        {"normalizer": replace_step({"String": "o"}, "x" * 1_000_000)},
        "the normalizer may make a text 1e[+]06 times as long .Replace.; at most 64",
    ),
    "a normalizer that doubles and doubles": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace_step({"String": "ß"}, "ßß")] * 40}},
        "the normalizer may make a text 1.1e[+]12 times as long",
    ),
    "a normalizer that inserts": ({"normalizer": replace_step({"Regex": "x*"}, "y" * 100)}, "101 times as long"),
    "a normalizer that inserts between": (
        {"normalizer": replace_step({"Regex": "(?=.)"}, "y" * 100)},
        "101 times as long",
    ),
    "a normalizer that prepends": ({"normalizer": {"type": "Prepend", "prepend": "x" * 1000}}, "1001 times as long"),
    "steps without number": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}},
        "the normalizer has 1000 steps; at most 128",
    ),
    "a map of characters that panics": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "Cannot parse precompiled_charsmap",
    ),
    "a map of characters that ends the process": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////////////////////////////w=="}},
        "it ends the process that loads it .SIGABRT.",
    ),
    "a decoder of megabytes": ({"decoder": replace_step({"String": ""}, "x" * 1000)}, "the decoder may make a text"),
    "a decoder that panics": (
        {"decoder": {"type": "Strip", "content": "a", "start": 1 << 63, "stop": 1 << 63}},
        "the tokenizers library cannot use it: index out of bounds",
    ),
    "a decoder that panics for one token": (
        {"decoder": replace_step({"Regex": "(x+x+)+y"}, "")},
        "the tokenizers library cannot use it: .*retry-limit",
    ),
    "a text many times": (
        {"post_processor": {**TEMPLATE, "single": [TEXT_PIECE] * 100}},
        "post_processor repeats the text",
    ),
    "special tokens without number": (
        {
            "post_processor": {
                **TEMPLATE,
                "single": [TEXT_PIECE, {"SpecialToken": {"id": "s", "type_id": 0}}],
                "special_tokens": {"s": {"id": "s", "ids": [1] * 10_000, "tokens": ["s"] * 10_000}},
            }
        },
        "the post_processor adds 10000 tokens to each text; at most 256",
    ),
    "a special token that is not there": (
        {"post_processor": {**TEMPLATE, "single": [{"SpecialToken": {"id": "s", "type_id": 0}}]}},
        "the tokenizers library cannot use it: no entry found",
    ),
    "chunks of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
    "an expression that is none": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}},
        "Oniguruma error",
    ),
    "padding to a terabyte": (
        {
            "padding": {
                **{"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
            }
        },
        "",
    ),
    "a negative id": (
        {
            "added_tokens": [
                {
                    **{"id": -1, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False},
                    **{"normalized": False, "special": True},
                }
            ]
        },
        "the tokenizers library cannot use it: .*expected u32",
    ),
}


@pytest.mark.parametrize(("parts", "match"), BAD_PARTS.values(), ids=BAD_PARTS.keys())
@pytest.mark.timeout(120)
def test_a_tokenizer_json_that_the_library_does_not_bear_is_refused(
    tmp_path: Path, parts: dict[str, Any], match: str
) -> None:
    """One without a match is harmless as we use it, and is loaded."""
    description = copy.deepcopy(DESCRIPTION) | parts
    if "Regex" in parts.get("decoder", {}).get("pattern", {}):
        description["model"]["vocab"]["x" * 40] = max(description["model"]["vocab"].values()) + 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    if match:
        refused(tmp_path, match)
    else:
        assert Tokenizer.from_directory(tmp_path).encode("a pagoda")


@pytest.mark.parametrize(
    ("vocabulary", "match"),
    [
        ({"<big>": (1 << 32) - 1}, "a token with id 4294967295; ids must be below"),
        ({"y" * (MAX_TOKEN_CHARACTERS + 1): 1000}, f"at most {MAX_TOKEN_CHARACTERS} are"),
    ],
)
def test_a_vocabulary_beyond_the_bounds_is_refused(tmp_path: Path, vocabulary: dict[str, int], match: str) -> None:
    description = copy.deepcopy(DESCRIPTION)
    description["model"]["vocab"] |= vocabulary
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.from_directory(tmp_path)


def test_a_tokenizer_json_that_takes_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tmp_path, "byte_level_bpe", pad_token=None)
    monkeypatch.setattr(tokenizer_loading, "_passed", set())
    monkeypatch.setattr(tokenizer, "_loaded", {})
    monkeypatch.setattr(tokenizer_loading, "_MAX_SECONDS", 0.01)
    refused(tmp_path, "tokenizer.json: the tokenizers library was not done with it after 0.01 s")


def test_a_tokenizer_json_beyond_its_bound_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    refused(tmp_path, f"1099511627776 bytes; at most {MAX_TOKENIZER_BYTES} are allowed")


def test_a_panic_while_a_text_is_tokenized_is_the_requests_alone(tmp_path: Path) -> None:
    description = copy.deepcopy(DESCRIPTION)
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    description["pre_tokenizer"]["pretokenizers"].insert(0, split)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    operations = TextOperations(str(tmp_path))
    with pytest.raises(RequestFailedError, match="retry-limit"):
        operations.call("encode", {"text": "x" * 60, "add_special_tokens": True})
    assert operations.call("encode", {"text": "y", "add_special_tokens": True})


TOKEN = {"content": "<new>", "special": True}
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a negative id": ({"added_tokens_decoder": {"-5": TOKEN}}, "id '-5'; it must be an integer of at least 0"),
    "an id that is no number": ({"added_tokens_decoder": {"x": TOKEN}}, "an added token has the id 'x'"),
    "an id with many digits": ({"added_tokens_decoder": {"1" * 5000: TOKEN}}, "an added token has the id '1111"),
    "an id beyond all vocabularies": (
        {"added_tokens_decoder": {str(1 << 40): TOKEN}},
        "the id 1099511627776; it must be",
    ),
    "an id beyond this vocabulary": (
        {"added_tokens_decoder": {"100000": TOKEN}},
        "id 100000, beyond the vocabulary of",
    ),
    "no content": ({"added_tokens_decoder": {"455": {}}}, "a token must be a string, or an object with content"),
    "empty content": ({"added_tokens_decoder": {"455": {"content": ""}}}, "of 1 to 8192 characters"),
    "long content": ({"added_tokens_decoder": {"455": {"content": "x" * 10**6}}}, "of 1 to 8192 characters"),
    "content of a wrong type": ({"added_tokens_decoder": {"455": {"content": 5}}}, "a token must be"),
    "a flag of a wrong type": (
        {"added_tokens_decoder": {"455": {**TOKEN, "lstrip": "x"}}},
        "lstrip must be true or false",
    ),
    "one token twice": ({"added_tokens_decoder": {"455": TOKEN, "456": TOKEN}}, "'<new>' has the ids 455 and 456"),
    "no object": ({"added_tokens_decoder": [TOKEN]}, "added_tokens_decoder must be an object"),
    "more tokens than allowed": (
        {"additional_special_tokens": [f"<{number}>" for number in range(MAX_ADDED_TOKENS + 1)]},
        f"lists of up to {MAX_ADDED_TOKENS} tokens",
    ),
    "special tokens that are no list": ({"additional_special_tokens": {"a": 1}}, "must be lists"),
    "a special token of numbers": ({"additional_special_tokens": [5]}, "a token must be"),
    "half a pair": ({"eos_token": "\ud800"}, "not valid Unicode"),
    "a flag that is none": ({"split_special_tokens": "yes"}, "split_special_tokens must be true or false"),
    "templates without a name": ({"chat_template": [{"template": "x"}]}, "chat_template: name is missing"),
    "templates of a wrong type": ({"chat_template": [{"name": "x", "template": 5}]}, "template must be a string"),
    "templates without number": (
        {"chat_template": [{"name": "x", "template": "y"}] * 1000},
        "a list of up to 64 objects",
    ),
    "templates that are none": ({"chat_template": [5]}, "a list of up to 64 objects"),
}


@pytest.mark.parametrize(("changes", "match"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_tokenizer_config_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    save_tokenizer(tmp_path, "byte_level_bpe", **changes)
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ({"<x>": -1}, "added_tokens.json: an added token has the id -1"),
        ({"<x>": True}, "has the id True"),
        ({"<x>": 1.5}, "has the id 1.5"),
        ({"": 455}, "added_tokens.json: a token must be"),
        ({"<x>": 5_000_000}, "id 5000000, beyond the vocabulary"),
    ],
)
def test_added_tokens_of_the_older_file_are_checked_alike(tmp_path: Path, tokens: dict[str, Any], match: str) -> None:
    save_tokenizer(tmp_path, "byte_level_bpe")
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    refused(tmp_path, match)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"]
)
@pytest.mark.timeout(60)
def test_tokenizer_files_are_regular_and_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    directory = save_tokenizer(tmp_path / "checkpoint", "byte_level_bpe")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(tmp_path / "secret")
    refused(directory, f"{name} is a link to .*outside of the checkpoint")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    refused(directory, f"{name} is a pipe: it must be a regular file")


def test_template_files_are_bounded_and_inside(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path / "checkpoint", "byte_level_bpe")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.jinja").write_text("what the checkpoint must not get at")
    (directory / "additional_chat_templates").symlink_to(elsewhere)
    refused(directory, "other.jinja is a link to .*outside of the checkpoint")
    (directory / "additional_chat_templates").unlink()
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    refused(directory, "chat_template.jinja is not UTF-8")
    (directory / "chat_template.jinja").write_text("x" * (MAX_TEMPLATE_BYTES + 1))
    refused(directory, f"at most {MAX_TEMPLATE_BYTES} are allowed")


@pytest.mark.timeout(120)
def test_files_that_transformers_would_read_are_checked_before_it_does(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (directory / "merges.txt").symlink_to(tmp_path / "secret")
    refused(directory, "merges.txt is a link to .*outside of the checkpoint")
    (directory / "merges.txt").unlink()
    os.mkfifo(directory / "merges.txt")
    refused(directory, "merges.txt is a pipe")
    (directory / "merges.txt").unlink()
    (directory / "vocab.json").write_text('{"a":' * 100_000)
    refused(directory, "vocab.json is nested too deeply")


def test_an_unpaired_surrogate_is_still_the_clients_mistake(tmp_path: Path) -> None:
    operations = TextOperations(str(save_tokenizer(tmp_path, "byte_level_bpe")))
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        operations.call("encode", {"text": "\ud83d", "add_special_tokens": True})
