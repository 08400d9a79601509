"""`pagoda why`: why a server, a model, a replica, a rank or a pod is not ready or slow, with what shows it and what helps.

It looks at the server twice, a second apart, and where it is on this machine at its processes; where nothing answers, at
what is left. With --pod it asks Kubernetes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pagoda.cli.parser import CommandParser
from pagoda.config.names import nearest
from pagoda.errors import ConfigError
from pagoda.monitoring.causes import Facts, find_causes, find_silence
from pagoda.monitoring.findings import Finding, Severity
from pagoda.monitoring.local import is_local, local_facts
from pagoda.monitoring.server import Server, SilentError, add_options, look, look_closely

LOG_LINES = 5
MAX_LOG_BYTES = 65536
MAX_LINE_CHARACTERS = 400


def run(arguments: Sequence[str]) -> int:
    """Print what was found; exit status 0 where nothing is wrong, 1 where something is."""
    parser = CommandParser(
        prog="pagoda why", description="Says why a server, a model, a rank or a pod is not ready or slow."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="one of the server's models; default: all")
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="between the two looks; default: 1")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the server's log, whose last errors are shown")
    parser.add_argument("--pod", metavar="POD", help="a pod of the cluster, and no server")
    parser.add_argument("--namespace", "-n", metavar="NAMESPACE", help="of --pod")
    parser.add_argument("--kubeconfig", metavar="FILE", help="of --pod's cluster")
    parser.add_argument("--context", metavar="NAME", help="of the kubeconfig")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.seconds <= 600:
        parser.error("--seconds must be from 0 to 600")
    log = _last_lines(options.log) if options.log is not None else []
    if options.pod is not None:
        subject, state, found = f"pod {options.pod}", "", _of_pod(options)
    else:
        server = Server.of_options(options)
        subject, (state, found) = server.url, _of_server(server, options.model, options.seconds, log)
    is_wrong = any(finding.severity < Severity.NOTE for finding in found)
    if options.json:
        findings = [{**asdict(one), "severity": one.severity.name.lower()} for one in found]
        print(json.dumps({"subject": subject, "state": state, "findings": findings}, indent=2))
        return int(is_wrong)
    print(f"{subject}: {state or 'looked at'}" + ("" if found else ", and nothing is wrong or slow"))
    for finding in found:
        print("\n".join(finding.as_lines()))
    return int(is_wrong)


def _of_server(server: Server, model: str | None, seconds: float, log: list[str]) -> tuple[str, list[Finding]]:
    """The state, and what was found. Raises `ConfigError` for a model that is not there."""
    local = local_facts(server.url) if is_local(server.url) else None
    try:
        begun = time.monotonic()
        then = look(server)
        answer_seconds = time.monotonic() - begun
        time.sleep(seconds)
        now = look_closely(server)
    except SilentError as error:
        return "no answer", find_silence(error, local, log, server.url)
    except ValueError as error:
        found = Finding(code="not-pagoda", severity=Severity.ERROR, subject="server", what=str(error))
        return "another server", [found]
    if model is not None and model not in now.models:
        raise ConfigError(
            f"{model}: no such model{nearest(model, now.models) or '; there are ' + ', '.join(now.models)}"
        )
    causes = find_causes(Facts(now=now, then=then, answer_seconds=answer_seconds, local=local))
    if model is not None:
        others = set(now.models) - {model}
        causes = [one for one in causes if one.subject.rpartition(" ")[2] not in others]
    if log and any(one.severity is Severity.ERROR for one in causes):
        seen = tuple(log)
        causes.append(Finding(code="log", severity=Severity.NOTE, subject="server", what="its log ends so", seen=seen))
    return now.health["state"], causes


def _of_pod(options: argparse.Namespace) -> list[Finding]:
    from pagoda.cli.cluster import Cluster
    from pagoda.cli.pod_state import pod_state

    name = options.pod
    cluster = Cluster(kubeconfig=options.kubeconfig, context=options.context, namespace=options.namespace)
    pod = pod_state(cluster.pod(name))
    if pod.is_ready:
        return []
    seen = [f"event: {event['message']}" for event in cluster.events(name)[-3:] if event.get("type") == "Warning"]
    if pod.container is not None:
        log = cluster.log_tail(name, pod.container, previous=pod.has_restarted, lines=200)
        seen += [f"log: {line}" for line in worst_lines(log.splitlines())]
    advice = "" if not pod.is_running else f"kubectl exec {name} -- pagoda why   asks the server in it"
    found = Finding(
        code="pod",
        severity=Severity.ERROR,
        subject=f"pod {name}",
        what=pod.problem or f"it is not ready: {pod.stage}",
        seen=tuple(seen),
        advice=advice or ("it may pass by itself" if pod.may_pass else ""),
    )
    return [found]


def _last_lines(path: Path) -> list[str]:
    """Raises `ConfigError` for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - MAX_LOG_BYTES))
            return worst_lines(file.read().decode(errors="replace").splitlines())
    except OSError as error:
        raise ConfigError(f"--log {path} cannot be read: {error.strerror}") from None


def worst_lines(lines: Sequence[str]) -> list[str]:
    """The last errors of a log, as text or JSON, without errors its last lines."""
    marked = [line for line in lines if " ERROR " in line or '"level": "error"' in line or "Traceback" in line]
    return [line.strip()[:MAX_LINE_CHARACTERS] for line in (marked or lines)[-LOG_LINES:]]
