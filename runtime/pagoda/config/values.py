"""Plain forms of values: what people write in a shell, a file or a Helm value, before its type is checked.

`auto` and `none` become None, `2GiB` becomes a number of bytes, `a,b` or `["a","b"]` a tuple, `{"k": 1}` a mapping.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pagoda.config.schema import option_types, options
from pagoda.config.sizes import SIZE_PATTERN as SIZE_PATTERN
from pagoda.config.sizes import format_bytes as format_bytes
from pagoda.config.sizes import parse_bytes as parse_bytes


def is_optional(key: str) -> bool:
    """Whether None is a value of the setting `key`."""
    return NoneType in get_args(option_types()[key])


def is_boolean(key: str) -> bool:
    """Whether the setting `key` is true or false."""
    return option_types()[key] is bool


def is_list(key: str) -> bool:
    """Whether the setting `key` is a list of strings."""
    return get_origin(option_types()[key]) is tuple


def plain_value(key: str, value: Any) -> Any:
    """`value` of the setting `key` with the words and notations above taken away; its type is not checked.

    Raises:
        ValueError: a size or JSON text that cannot be read.
    """
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        return _plain_text(key, value)
    if is_list(key) and isinstance(value, list):
        return tuple(json.dumps(item) if key == "lora_modules" and isinstance(item, dict) else item for item in value)
    return value


def _plain_text(key: str, text: str) -> Any:
    info = options()[key]
    if is_optional(key) and text.lower() in (("auto", "none", "null") if info.auto else ("none", "null")):
        return None
    if info.unit == "bytes":
        return parse_bytes(text)
    if key == "lora_modules" and text.lstrip().startswith("{"):
        return (text,)
    if is_list(key):
        items = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
        return plain_value(key, [item.strip() if isinstance(item, str) else item for item in items])
    if any(get_origin(member) is Mapping for member in get_args(option_types()[key])):
        return json.loads(text)
    return text
