"""Reads the tokenizer's JSON files of a checkpoint: special tokens, added tokens and chat templates.

The rules of precedence are those of transformers 5: `added_tokens_decoder` in tokenizer_config.json makes the older
special_tokens_map.json and added_tokens.json irrelevant; a chat_template.jinja file wins over templates in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pagoda.errors import CheckpointError

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
DEFAULT_TEMPLATE = "default"


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files beside the vocabulary say.

    `special_tokens`: named ones (`eos_token`, ... and model-specific `*_token` entries). `extra_special_tokens`: those
    without a name. `added_tokens`: by id. `chat_templates`: by name, empty for a tokenizer without one.
    """

    directory: Path
    special_tokens: dict[str, AddedToken]
    extra_special_tokens: list[AddedToken]
    added_tokens: dict[int, AddedToken]
    chat_templates: dict[str, str]
    split_special_tokens: bool

    @property
    def tokenizer_json(self) -> Path:
        """Where the `tokenizers` library's own file is, if the checkpoint has one."""
        return self.directory / "tokenizer.json"


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read what `directory` holds; missing files count as empty. Raises `CheckpointError` for one that is broken."""
    config = _read_json(directory / "tokenizer_config.json")
    added_tokens: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        for token_id, token in config["added_tokens_decoder"].items():
            added_tokens[int(token_id)] = _added_token(token)
    else:
        config = {**config, **_read_json(directory / "special_tokens_map.json")}
    extra, named_extra = _extra_special_tokens(config)
    named = {
        name: _added_token(token, special=True)
        for name, token in {**config, **named_extra}.items()
        if name in SPECIAL_TOKEN_NAMES or name.endswith("_token")
        if isinstance(token, str | Mapping)
    }
    if "added_tokens_decoder" not in config:
        special_contents = {token.content for token in (*named.values(), *extra)}
        for content, token_id in _read_json(directory / "added_tokens.json").items():
            special = content in special_contents
            added_tokens[token_id] = AddedToken(content, normalized=not special, special=special)
    return TokenizerFiles(
        directory=directory,
        special_tokens=named,
        extra_special_tokens=extra,
        added_tokens=added_tokens,
        chat_templates=_chat_templates(directory, config.get("chat_template")),
        split_special_tokens=bool(config.get("split_special_tokens", False)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _added_token(token: object, *, special: bool | None = None) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
        raise CheckpointError(f"a special token must be a string or an object with content, not {token!r}")
    fields = {name: token[name] for name in _ADDED_TOKEN_FIELDS if name in token}
    if special is not None:
        fields["special"] = special
    return AddedToken(**fields)


def _extra_special_tokens(config: Mapping[str, Any]) -> tuple[list[AddedToken], dict[str, Any]]:
    """Unnamed special tokens, and the named ones of the newer form that maps names to tokens."""
    extra = config.get("extra_special_tokens") or []
    named = dict(extra) if isinstance(extra, Mapping) else {}
    unnamed = config.get("additional_special_tokens") or [] if named or not extra else extra
    return [_added_token(token) for token in unnamed], named


def _chat_templates(directory: Path, configured: object) -> dict[str, str]:
    templates: dict[str, str] = {}
    single = directory / "chat_template.jinja"
    if single.is_file():
        templates[DEFAULT_TEMPLATE] = single.read_text(encoding="utf-8")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if templates:
        return templates
    if isinstance(configured, str):
        return {DEFAULT_TEMPLATE: configured}
    if isinstance(configured, list):
        return {entry["name"]: entry["template"] for entry in configured}
    return {}
