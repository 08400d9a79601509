"""Reads the tokenizer's JSON files of a checkpoint: special tokens, added tokens and chat templates.

The rules of precedence are those of transformers 5: `added_tokens_decoder` in tokenizer_config.json makes the older
special_tokens_map.json and added_tokens.json irrelevant; a chat_template.jinja file wins over templates in the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import has_file, names_ending_with, read_json_object, read_text, shown
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import MAX_VOCAB_SIZE
from pagoda.text.tokenizer_bounds import MAX_TOKEN_CHARACTERS

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TEMPLATE = "default"
MAX_ADDED_TOKENS = 1 << 18
MAX_TEMPLATES = 64
MAX_TEMPLATE_BYTES = 1 << 20
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of the files beside the vocabulary.

    `special_tokens`: named ones (`eos_token`, ... and model-specific `*_token` entries). `extra_special_tokens`: those
    without a name. `added_tokens`: by id. `chat_templates`: by name, empty for a tokenizer without one.
    `response_template`: as it is, unchecked. `tokenizer_class`: that of transformers, without `Fast`. `add_prefix_space`: None
    where it is not given.
    """

    directory: Path
    special_tokens: dict[str, AddedToken]
    extra_special_tokens: list[AddedToken]
    added_tokens: dict[int, AddedToken]
    chat_templates: dict[str, str]
    split_special_tokens: bool
    response_template: Any = None
    tokenizer_class: str = ""
    add_prefix_space: bool | None = None
    legacy: bool = False


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read what `directory` holds; missing files count as empty. Raises `CheckpointError` for one that is broken."""
    config = _read(directory, "tokenizer_config.json")
    added_tokens: dict[int, AddedToken] = {}
    has_decoder = "added_tokens_decoder" in config.values
    if has_decoder:
        for token_id, token in config.mapping("added_tokens_decoder").items():
            added_tokens[_token_id(token_id, config.where)] = _added_token(token, config.where)
    else:
        named = _read(directory, "special_tokens_map.json")
        config = ConfigReader({**config.values, **named.values}, config.where)
    extra, named_extra = _extra_special_tokens(config)
    special_tokens = {
        name: _added_token(token, config.where, special=True, may_be_empty=True)
        for name, token in {**config.values, **named_extra}.items()
        if name in SPECIAL_TOKEN_NAMES or name.endswith("_token")
        if isinstance(token, str | Mapping)
    }
    if not has_decoder:
        special_contents = {token.content for token in (*special_tokens.values(), *extra)}
        older = _read(directory, "added_tokens.json")
        for content, token_id in older.values.items():
            token = {"content": content, "special": content in special_contents}
            added_tokens[_token_id(token_id, older.where)] = _added_token(
                token | {"normalized": not token["special"]}, older.where
            )
    _check_added_tokens(added_tokens, directory)
    return TokenizerFiles(
        directory=directory,
        special_tokens=special_tokens,
        extra_special_tokens=extra,
        added_tokens=added_tokens,
        chat_templates=_chat_templates(directory, config),
        split_special_tokens=config.flag("split_special_tokens", False),
        response_template=config.values.get("response_template"),
        tokenizer_class=_tokenizer_class(directory, config),
        add_prefix_space=config.optional_flag("add_prefix_space"),
        legacy=config.optional_flag("legacy") or False,
    )


def _tokenizer_class(directory: Path, config: ConfigReader) -> str:
    """The class that transformers loads: for Qwen2 it goes by config.json, whatever tokenizer_config.json says."""
    model_type = _read(directory, "config.json").values.get("model_type")
    name = config.values.get("tokenizer_class")
    if model_type == "qwen2" or (model_type == "qwen3" and name is None):
        return "Qwen2Tokenizer"
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _read(directory: Path, name: str) -> ConfigReader:
    values = read_json_object(directory, name) if has_file(directory, name) else {}
    return ConfigReader(values, str(directory / name))


def _token_id(value: object, where: str) -> int:
    """The id of an added token: a number, or one in a string, as keys of JSON objects are."""
    if isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdecimal():
        value = int(value)
    if type(value) is not int or not 0 <= value < MAX_VOCAB_SIZE:
        raise CheckpointError(
            f"{where}: an added token has the id {shown(value)}; it must be an integer of at least 0 and below "
            f"{MAX_VOCAB_SIZE}"
        )
    return value


def _added_token(token: object, where: str, *, special: bool | None = None, may_be_empty: bool = False) -> AddedToken:
    if isinstance(token, str):
        token, special = {"content": token}, True
    reader = ConfigReader(token if isinstance(token, Mapping) else {}, f"{where}: token {shown(token)}")
    content = reader.values.get("content")
    least = 0 if may_be_empty else 1
    if not isinstance(content, str) or not least <= len(content) <= MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"{where}: a token must be a string, or an object with content, of {least} to {MAX_TOKEN_CHARACTERS} characters, "
            f"found {shown(token)}"
        )
    fields = {name: reader.flag(name, False) for name in _ADDED_TOKEN_FLAGS if reader.values.get(name) is not None}
    if special is not None:
        fields["special"] = special
    return AddedToken(content, **fields)


def _check_added_tokens(added_tokens: Mapping[int, AddedToken], directory: Path) -> None:
    if len(added_tokens) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"{directory} has {len(added_tokens)} added tokens beside tokenizer.json; at most {MAX_ADDED_TOKENS} are allowed"
        )
    ids: dict[str, int] = {}
    for token_id, token in added_tokens.items():
        if ids.setdefault(token.content, token_id) != token_id:
            raise CheckpointError(
                f"{directory}: the added token {shown(token.content)} has the ids {ids[token.content]} and {token_id}; "
                "it may have one"
            )


def _extra_special_tokens(config: ConfigReader) -> tuple[list[AddedToken], dict[str, Any]]:
    """Unnamed special tokens, and the named ones of the newer form that maps names to tokens."""
    extra = config.values.get("extra_special_tokens") or []
    named = dict(extra) if isinstance(extra, Mapping) else {}
    unnamed = config.values.get("additional_special_tokens") or [] if named or not extra else extra
    if not isinstance(unnamed, list) or len(unnamed) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"{config.where}: extra_special_tokens and additional_special_tokens must be lists of up to "
            f"{MAX_ADDED_TOKENS} tokens, found {shown(unnamed)}"
        )
    return [_added_token(token, config.where) for token in unnamed], named


def _chat_templates(directory: Path, config: ConfigReader) -> dict[str, str]:
    templates: dict[str, str] = {}
    if has_file(directory, "chat_template.jinja"):
        templates[DEFAULT_TEMPLATE] = _read_template(directory, "chat_template.jinja")
    if has_file(directory, "additional_chat_templates"):
        for name in names_ending_with(directory / "additional_chat_templates", (".jinja",)):
            templates[name.removesuffix(".jinja")] = _read_template(directory, f"additional_chat_templates/{name}")
    if templates:
        return templates
    configured = config.values.get("chat_template")
    if isinstance(configured, str):
        return {DEFAULT_TEMPLATE: configured}
    if not isinstance(configured, list):
        return {}
    if len(configured) > MAX_TEMPLATES or not all(isinstance(entry, Mapping) for entry in configured):
        raise config.error("chat_template", f"a template, or a list of up to {MAX_TEMPLATES} objects")
    entries = [ConfigReader(entry, f"{config.where}: chat_template") for entry in configured]
    return {entry.string("name"): entry.string("template") for entry in entries}


def _read_template(directory: Path, name: str) -> str:
    return read_text(directory, name, MAX_TEMPLATE_BYTES)
