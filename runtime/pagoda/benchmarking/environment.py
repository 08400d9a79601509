"""The environment of a measurement: machine, versions, commit."""

from __future__ import annotations

import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pagoda.platform.hardware import cpu_report, memory_report, versions


def environment() -> dict[str, Any]:
    """The machine, the versions of what matters, the commit of this checkout if it is one, and the time (UTC)."""
    cpu, memory = cpu_report(), memory_report()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": asdict(cpu),
        "memory_bytes": memory.total,
        "versions": {name: version for name, version in versions().items() if version is not None},
        "commit": source_commit(),
    }


def source_commit() -> str | None:
    """The commit of the checkout that contains this package, `-dirty` if files differ from it; None outside of one."""
    folder = Path(__file__).resolve().parent
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return None
    return commit.strip() + ("-dirty" if changes.strip() else "")
