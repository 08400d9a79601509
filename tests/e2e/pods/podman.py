"""Podman as a command, and what must be there for it."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
from pathlib import Path

TOOLS = ("podman", "runc", "ip", "mount")
# crun and systemd are not everywhere; this works wherever podman does.
os.environ.setdefault("CONTAINERS_CONF", str(Path(__file__).with_name("containers.conf")))


class PodmanError(RuntimeError):
    """A command of podman failed."""


def missing_tools() -> str | None:
    """Why pods cannot run on this machine; None if they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "networks and mounts need root"
    return None


async def run(*words: str, timeout: float | None = None) -> tuple[int, str]:
    """Exit status and output (both streams) of a command; status 124 where `timeout` seconds were not enough."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout)
    except (TimeoutError, asyncio.CancelledError) as error:
        process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        return 124, f"no end within {timeout} s"
    return process.returncode or 0, output.decode(errors="replace")


async def podman(*words: str) -> str:
    """The output of `podman WORDS`; raises PodmanError if it fails."""
    status, output = await run("podman", *words)
    if status:
        raise PodmanError(f"podman {shlex.join(words)[:300]}: {output.strip()[-1000:]}")
    return output.strip()
