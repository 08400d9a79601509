"""Plain forms of values: what people write in a shell, a file or a Helm value, before its type is checked.

`auto` and `none` become None, `2GiB` becomes a number of bytes, `a,b` or `["a","b"]` a tuple, `{"k": 1}` a mapping.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pagoda.config.schema import option_types, options

SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([kKmMgGtT]i?)?[bB]?\s*$"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE)
_UNIT_NAMES = ("KiB", "MiB", "GiB", "TiB")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `512MiB`, `2Gi`, `1.5GB` or `4096`; `i` means powers of 1024, as Kubernetes has it.

    Raises:
        ValueError: the text is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write 4096, 512MiB, 2Gi or 1.5GB")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    base = 1024.0 if binary else 1000.0
    return round(float(number) * base**power)


def format_bytes(count: int) -> str:
    """`count` bytes for people: `1.50 GiB`."""
    size, name = float(count), "B"
    for next_name in _UNIT_NAMES:
        if size < 1024:
            break
        size, name = size / 1024, next_name
    return f"{count} B" if name == "B" else f"{size:.2f} {name}"


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
        return tuple(value)
    return value


def _plain_text(key: str, text: str) -> Any:
    info = options()[key]
    if is_optional(key) and text.lower() in (("auto", "none", "null") if info.auto else ("none", "null")):
        return None
    if info.unit == "bytes":
        return parse_bytes(text)
    if is_list(key):
        items = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
        return tuple(item.strip() if isinstance(item, str) else item for item in items)
    if any(get_origin(member) is Mapping for member in get_args(option_types()[key])):
        return json.loads(text)
    return text
