"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re

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


def exact_bytes(count: int) -> str:
    """`format_bytes`, with the number of bytes where two digits do not tell it."""
    text = format_bytes(count)
    return text if parse_bytes(text) == count else f"{text} ({count} bytes)"
