"""Directories in `/tmp`, where anybody may have made one of our name first: believed only if they are ours. Standard library
only."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from pagoda.errors import ConfigError

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_directory() -> Path:
    """Where nodes, ranks and heads publish their state by default: one directory for each user."""
    return Path(tempfile.gettempdir()) / f"pagoda-node-{os.getuid()}"


def trouble_with_directory(directory: Path) -> str | None:
    """Why what is in `directory` may be another user's; None if it is ours, or is not there."""
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is no directory of ours, but a link or a file: remove it"
    if status.st_uid != os.getuid():
        return f"{directory} belongs to the user {status.st_uid}, not to this one ({os.getuid()}): remove it, or set TMPDIR"
    if status.st_mode & _OTHERS_MAY_WRITE:
        return f"{directory} can be written by other users (mode {stat.S_IMODE(status.st_mode):o}): remove it"
    return None


def make_private(directory: Path) -> Path:
    """Make `directory` for this user alone, in one that is there; it is returned. Raises `ConfigError` if it is not ours."""
    directory.mkdir(mode=0o700, exist_ok=True)
    trouble = trouble_with_directory(directory)
    if trouble is not None:
        raise ConfigError(trouble)
    directory.chmod(0o700)  # an earlier version let others look
    return directory
