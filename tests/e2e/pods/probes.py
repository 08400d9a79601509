"""Probes and hooks as the kubelet runs them: from the node, each container by itself, with periods and thresholds."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.e2e.pods.objects import Object

KUBELET = "kube-probe/1.33"


@dataclass(frozen=True)
class Answer:
    """What came of one probe or hook."""

    passed: bool
    said: str


class Actions:
    """Runs `httpGet`, `tcpSocket`, `exec` and `sleep` against one container."""

    def __init__(self, address: str, container: Object, execute: Callable[..., Awaitable[tuple[int, str]]]) -> None:
        self._address = address
        self._ports = {port["name"]: port["containerPort"] for port in container.get("ports", []) if "name" in port}
        self._execute = execute

    async def run(self, action: Object, timeout: float) -> Answer:
        """`timeout`: seconds."""
        try:
            if "exec" in action:
                status, output = await self._execute(*action["exec"]["command"], timeout=timeout)
                return Answer(status == 0, f"exit {status} {output.strip()[-300:]}")
            if "httpGet" in action:
                return await asyncio.wait_for(self._get(action["httpGet"]), timeout)
            if "tcpSocket" in action:
                connecting = asyncio.open_connection(self._address, self._port(action["tcpSocket"]["port"]))
                (await asyncio.wait_for(connecting, timeout))[1].close()
                return Answer(True, "open")
            await asyncio.sleep(min(action["sleep"]["seconds"], timeout))
            return Answer(True, "slept")
        except (OSError, TimeoutError) as error:
            return Answer(False, f"{type(error).__name__} {error}")

    async def _get(self, target: Object) -> Answer:
        port, is_tls = self._port(target["port"]), target.get("scheme") == "HTTPS"
        reader, writer = await asyncio.open_connection(self._address, port, ssl=_any_certificate() if is_tls else None)
        try:
            head = f"GET {target['path']} HTTP/1.1\r\nHost: {self._address}:{port}\r\nUser-Agent: {KUBELET}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode())
            answer = await reader.read()
        finally:
            writer.close()
        head, _, body = answer.decode(errors="replace").partition("\r\n\r\n")
        status = int(head.split(" ", 2)[1]) if head.startswith("HTTP/") else 0
        return Answer(200 <= status < 400, f"HTTP {status} {body[:300]}")

    def _port(self, port: Any) -> int:
        return port if isinstance(port, int) else self._ports[port]


class Probe:
    """One probe of one container: counts successes and failures in a row, and tells each turn."""

    def __init__(self, kind: str, spec: Object, actions: Actions, on_failure: Callable[[str], None]) -> None:
        self.kind = kind
        self._spec = spec
        self._actions = actions
        self._on_failure = on_failure
        self._period = spec.get("periodSeconds", 10)
        self._timeout = spec.get("timeoutSeconds", 1)
        self._needed = {True: spec.get("successThreshold", 1), False: spec.get("failureThreshold", 3)}

    async def verdicts(self, current: bool | None) -> AsyncIterator[Answer]:
        """Probe for ever; yields each change of the verdict, with what the deciding probe said.

        `current`: the verdict before the first probe; None takes either as a change.
        """
        await asyncio.sleep(self._spec.get("initialDelaySeconds", 0))
        last, in_a_row = current, 0
        while True:
            began = time.monotonic()
            answer = await self._actions.run(self._spec, self._timeout)
            in_a_row = in_a_row + 1 if answer.passed is last else 1
            last = answer.passed
            if not answer.passed:
                self._on_failure(f"{self.kind}: {answer.said}")
            if last is not current and in_a_row >= self._needed[last]:
                current = last
                yield answer
            await asyncio.sleep(max(0.01, self._period - (time.monotonic() - began)))


def _any_certificate() -> ssl.SSLContext:
    """The kubelet takes any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
