"""Versions of a served model: how they are named, what makes another one of it, and when one that was replaced may go.

    version 1 serves ───────────────────────────┐ drains: its requests end with it ──▶ its engine is ended
    version 2 loads, in an engine of its own ───┴▶ serves: requests find it from here on
                          └─ fails: version 1 serves as before, and the cause is told

`RollingUpdate` does that; `Recreate` ends the first before the second is loaded, where both have no room. Requests wait then.
"""

from __future__ import annotations

import asyncio
import re
import time
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from pagoda.config.schema import PagodaConfig
from pagoda.errors import InvalidRequestError, shown
from pagoda.serving.models import ServedModel
from pagoda.serving.text_layer import TextLayer

UNUSED_SECONDS = 1.0
"""A request that found a version just before another one took over may not run yet."""
LOOK_SECONDS = 0.25
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

LOADING = "loading"

Signature = tuple[tuple[str, int, int, int], ...]


class Strategy(StrEnum):
    """How a new version takes the place of one that is loaded, in the words of a Kubernetes Deployment."""

    ROLLING_UPDATE = "RollingUpdate"
    RECREATE = "Recreate"


class Content(NamedTuple):
    """What a version is of: equal contents are one version."""

    config: PagodaConfig
    signature: Signature


class VersionState(NamedTuple):
    """A version beside the one that serves."""

    version: str
    state: str
    cause: str


def check_version(version: str) -> str:
    """`version` as the name of one; raises `InvalidRequestError`."""
    if not _NAME.fullmatch(version):
        raise InvalidRequestError(
            f"version {shown(version)} must be up to 64 letters, digits, '.', '_' and '-', and begin with a letter or digit",
            "parameters",
        )
    return version


def check_strategy(strategy: object) -> Strategy:
    """`strategy` as one; raises `InvalidRequestError`."""
    try:
        return Strategy(strategy)  # type: ignore[arg-type]
    except ValueError:
        raise InvalidRequestError(f"strategy {shown(strategy)} must be {' or '.join(Strategy)}", "parameters") from None


def signature_of(config: PagodaConfig) -> Signature:
    """What changes when the files of a checkpoint do: of each its name, inode, size and time. Empty if it is elsewhere."""
    if config.model is None:
        return ()
    path = Path(config.model).expanduser()
    try:
        files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
        return tuple((file.name, *_identity(file)) for file in files)
    except OSError:
        return ()


def _identity(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


async def until_unused(model: ServedModel, text: TextLayer | None) -> None:
    """Return once no request is left of those that found `model` before another version took over, now."""
    since = time.monotonic()
    while True:
        await model.runner.wait_until_idle()
        last = max(since, model.runner.last_end, 0.0 if text is None else text.last_use)
        if time.monotonic() - last >= UNUSED_SECONDS:
            return
        await asyncio.sleep(LOOK_SECONDS)
