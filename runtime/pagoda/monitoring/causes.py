"""Why a server, a model, a replica or a rank is not ready or slow: one rule a cause, each from facts that it shows.

Facts ─▶ every rule ─▶ Findings, the worst first. What keeps requests out precedes what slows them down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pagoda.config.values import format_bytes
from pagoda.monitoring.figures import ModelFigures, figures
from pagoda.monitoring.findings import Finding, Severity
from pagoda.monitoring.local import LocalFacts
from pagoda.monitoring.samples import differences
from pagoda.monitoring.server import SilentError, Snapshot

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

STALL_SECONDS = 2.0
HEARTBEAT_SECONDS = 3.0
SLOW_ANSWER_SECONDS = 1.0
RESTARTS_SECONDS = 600.0
MANY_RESTARTS = 3
FULL = 0.95
NEARLY_FULL = 0.9
LOW_ACCEPTANCE = 0.2
FEW_HITS = 0.3
MANY_QUERIES = 1000.0
SERVING = ("ready", "degraded")

STAGES = {
    "config": "reads its settings and the checkpoint's configuration",
    "hardware": "looks at the machine",
    "launch": "starts the processes of its ranks",
    "rendezvous": "waits until all ranks have connected and fit together: a rank that cannot be placed, or a network between "
    "machines that lets nothing through, keeps it here",
    "communication": "tries collectives between the ranks: a wrong network interface keeps it here",
    "weights": "reads the weights: as fast as the disk or the network is, the first time",
    "kv": "divides memory into KV blocks",
    "warm-up": "runs first steps",
    "tokenizer": "starts the tokenizers",
    "restart": "waits before it starts the engine again",
    "wake-up": "takes weights and KV cache again after a sleep",
}
"""What the engine does in each stage of a start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Two looks at a server, how long the first answer took, and what the machine says where it is this one."""

    now: Snapshot
    then: Snapshot | None = None
    answer_seconds: float = 0.0
    local: LocalFacts | None = None


Rule = Callable[[Facts], Iterator[Finding]]


def find_causes(facts: Facts) -> list[Finding]:
    """What is wrong, the worst first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: finding.severity)


def find_silence(error: SilentError, local: LocalFacts | None, log: Sequence[str] = (), url: str = "") -> list[Finding]:
    """Why nothing answered at `url`. `local`: where the server is to be on this machine; `log`: the last lines of it."""
    advice = {
        "refused": "start it, or give its address: --base-url",
        "name": "check the name; in a cluster: the Service, and its namespace",
        "tls": "ask with the scheme that the server speaks, http:// or https://, and by a name of its certificate",
        "timeout": "a firewall or NetworkPolicy drops the packets, or the process is stopped or busy",
        "reset": "is it the port of gRPC? Else look at the server's log: it, or a proxy before it, has closed the connection",
        "http": "the server there speaks no HTTP, or TLS",
    }[error.what]
    found: list[Finding] = []
    if local is not None:
        found += _local_silence(error, local, urlsplit(url).port)
    seen = tuple(f"log: {line}" for line in log)
    found.append(
        Finding(
            code=f"no-answer-{error.what}", severity=ERROR, subject="server", what=str(error), seen=seen, advice=advice
        )
    )
    return found


def _local_silence(error: SilentError, local: LocalFacts, port: int | None) -> Iterator[Finding]:
    yield from _stopped(local)
    if error.what == "refused":
        servers = [process for process in local.processes if process.role == "server"]
        if servers:
            others = [one for one in servers if port not in one.ports]  # else it has begun to listen, or is ending
            if others:
                yield Finding(
                    code="other-port",
                    severity=ERROR,
                    subject="server",
                    what="a server runs on this machine, but listens elsewhere",
                    seen=tuple(
                        f"pid {one.pid} listens on {', '.join(map(str, one.ports)) or 'no port yet'}" for one in others
                    ),
                    advice="give its port: --base-url",
                )
        else:
            yield Finding(
                code="no-process",
                severity=ERROR,
                subject="server",
                what="no `pagoda serve` runs on this machine, as far as this user can see",
                advice="start it; if it was started, the end of its log says why it ended (--log FILE)",
            )
    if local.oom_kills:
        yield Finding(
            code="oom-killed",
            severity=ERROR,
            subject="server",
            what="the kernel has killed processes of this container for want of memory",
            seen=(f"{local.oom_kills} OOM kills; limit {_bytes(local.memory_limit)}",),
            advice="raise the memory limit, or lower kv_cache_memory_bytes",
        )


def _stopped(local: LocalFacts) -> Iterator[Finding]:
    for one in local.processes:
        if one.status in ("stopped", "tracing-stop", "zombie"):
            yield Finding(
                code="process-stopped",
                severity=ERROR,
                subject=one.role,
                what=f"its process is {one.status}",
                seen=(f"pid {one.pid}: {one.status}",),
                advice=f"kill -CONT {one.pid}, or end what holds it (a debugger, a frozen container)"
                if one.status != "zombie"
                else "its parent has not taken note of its end yet",
            )


# ---- what keeps requests out


def _processes(facts: Facts) -> Iterator[Finding]:
    if facts.local is not None:
        yield from _stopped(facts.local)


def _key(facts: Facts) -> Iterator[Finding]:
    refused = {path: why for path, why in facts.now.refusals.items() if path != "/ui/events" or "route" not in why}
    if "/metrics" in refused:
        yield Finding(
            code="key-refused",
            severity=ERROR,
            subject="server",
            what="the key does not show more than whether it is ready: only that was looked at",
            seen=tuple(f"{path}: {why}" for path, why in refused.items()),
            advice="give a key with the scope read: --api-key, or PAGODA_ADMIN_KEY",
        )


def _states(facts: Facts) -> Iterator[Finding]:
    for name, health in facts.now.models.items():
        state, cause = health["state"], health.get("cause")
        subject = f"model {name}"
        since = time.time() - health["since"] if "since" in health else None
        seen = [f"{state} for {since:.0f} s" if since is not None else f"state {state}"]
        if cause:
            seen.append(f"cause: {cause}")
        if state == "starting":
            yield _starting(subject, health, seen, is_restart=bool(health.get("started")) and bool(cause))
        elif state == "dead":
            required = health.get("required", True)
            yield Finding(
                code="dead",
                severity=ERROR if required else WARNING,
                subject=subject,
                what=f"it is dead: {cause or 'no cause is known'}",
                seen=tuple(seen[:1]),
                advice=_for_cause(cause or "") or "the server's log says more; load it again, or restart the server",
            )
        elif state == "draining":
            left = int(health.get("running", 0))
            yield Finding(
                code="draining",
                severity=ERROR,
                subject=subject,
                what=f"it takes no requests any more: {cause or 'it is draining'}",
                seen=(*seen[:1], f"{left} requests have until the end of grace_period_seconds"),
                advice="send requests to another replica; a new pod takes over, or the model is loaded again",
            )
        elif state == "unloaded":
            yield Finding(
                code="unloaded",
                severity=ERROR if health.get("required") else NOTE,
                subject=subject,
                what="it is not loaded",
                seen=tuple(seen),
                advice="load it: POST /v2/repository/models/NAME/load, or set load_on_demand",
            )
        elif state == "sleeping":
            wakes = facts.now.setting("wake_on_request") is not False
            yield Finding(
                code="sleeping",
                severity=NOTE if wakes else ERROR,
                subject=subject,
                what="it sleeps" + (" and wakes with the next request, which waits for it" if wakes else ""),
                seen=tuple(seen),
                advice="" if wakes else "POST /wake_up, or set wake_on_request",
            )
        elif state == "degraded":
            yield Finding(
                code="degraded",
                severity=WARNING,
                subject=subject,
                what=f"it serves with reduced capacity: {cause or health.get('detail') or 'no cause is known'}",
                seen=tuple(seen[:1]),
                advice=_for_cause(cause or "")
                or "see the replicas below, and lower max_num_batched_tokens after an OOM",
            )


def _starting(subject: str, health: dict[str, Any], seen: list[str], *, is_restart: bool) -> Finding:
    stage, detail, cause = health.get("stage", ""), health.get("detail", ""), health.get("cause")
    does = STAGES.get(stage.rpartition(": ")[2], "")
    what = (
        f"it is starting, at the stage {stage}" + (f" ({detail})" if detail else "") + (f": it {does}" if does else "")
    )
    if is_restart:
        what = f"its engine failed and starts again: {cause}; {what}"
    return Finding(
        code="restarting" if is_restart else "starting",
        severity=ERROR,
        subject=subject,
        what=what,
        seen=tuple(seen[:1]),
        advice=_for_cause(cause or "") or "wait; `pagoda top` shows the stage",
    )


CAUSES = (
    (
        ("sigkill", "out of memory", "oom", "memory"),
        "the kernel kills what is beyond the memory limit: raise it, or lower kv_cache_memory_bytes",
    ),
    (
        ("heartbeat", "no progress", "stuck"),
        "the log has the stacks of the core that hung; for steps that are slow raise engine_stall_timeout_seconds",
    ),
    (("no space left", "disk"), "free space where the checkpoint and the caches are"),
    (
        ("checkpoint", "config.json", "safetensors", "tokenizer", "no such file"),
        "check --model: `pagoda models inspect DIR`",
    ),
    (("rank", "collective", "ray"), "`pagoda doctor --cluster` on each machine checks the network and the cluster"),
    (("fit", "blocks", "max_model_len"), "lower max_model_len or max_num_seqs, or give more kv_cache_memory_bytes"),
)
"""Words of a cause, and what helps; the first that fits."""


def _for_cause(cause: str) -> str:
    low = cause.lower()
    return next((advice for words, advice in CAUSES if any(word in low for word in words)), "")


def _restarts(facts: Facts) -> Iterator[Finding]:
    for model in (facts.now.server or {}).get("models", []):
        now = time.time()
        failures = [
            change
            for change in model["history"]
            if change["state"] in ("starting", "dead") and now - change["time"] < RESTARTS_SECONDS
        ]
        failures = [change for change in failures if not change["cause"].startswith(("waking", "loading", "shut down"))]
        if len(failures) >= MANY_RESTARTS:
            last = failures[-1]["cause"]
            yield Finding(
                code="restarts",
                severity=ERROR if model["health"]["state"] not in SERVING else WARNING,
                subject=f"model {model['name']}",
                what="its engine fails again and again",
                seen=tuple(f"{now - change['time']:.0f} s ago: {change['cause']}" for change in failures[-5:]),
                advice=_for_cause(last) or "the log has the trace of each failure",
            )


def _stalled(facts: Facts) -> Iterator[Finding]:
    for name, health in facts.now.models.items():
        age = health.get("seconds_since_progress")
        if age is not None and age > STALL_SECONDS and health["state"] in SERVING:
            limit = facts.now.setting("engine_stall_timeout_seconds")
            yield Finding(
                code="stalled",
                severity=ERROR,
                subject=f"model {name}",
                what="its engine core makes no progress",
                seen=(
                    f"last heartbeat {age:.1f} s ago, at step {health.get('step')}; {health.get('running')} requests run",
                ),
                advice="the watchdog ends and restarts it"
                + (f" after {limit:g} s and more for long steps" if isinstance(limit, int | float) else "")
                + "; is the process stopped, or the machine starved of CPU or memory?",
            )


def _parts(facts: Facts) -> Iterator[Finding]:
    for name, health in facts.now.models.items():
        ranks = health.get("ranks") or []
        for rank in ranks:
            late = rank["seconds_since_heartbeat"] > HEARTBEAT_SECONDS
            if rank["up"] and not late:
                continue
            hosts = {one["host"] for one in ranks}
            yield Finding(
                code="rank-down" if not rank["up"] else "rank-silent",
                severity=ERROR,
                subject=f"rank {rank['rank']} of {name}",
                what="it is down, and with it the engine" if not rank["up"] else "it says nothing: stopped, or cut off",
                seen=(
                    f"host {rank['host']}, pid {rank['pid']}, step {rank['step']}, "
                    f"last heartbeat {rank['seconds_since_heartbeat']:.1f} s ago",
                ),
                advice="look at that machine's network interface, memory and the log of `pagoda join`"
                if len(hosts) > 1
                else f"is process {rank['pid']} stopped or killed?",
            )
        for replica in health.get("replicas") or []:
            if replica["state"] not in SERVING:
                yield Finding(
                    code="replica-down",
                    severity=WARNING,
                    subject=f"replica {replica['replica']} of {name}",
                    what=f"it is {replica['state']}: {replica.get('cause') or replica['stage']}",
                    seen=(f"for {time.time() - replica['since']:.0f} s",),
                    advice=_for_cause(replica.get("cause") or "") or "the others serve meanwhile",
                )


# ---- what slows requests down


def _slow_answer(facts: Facts) -> Iterator[Finding]:
    if facts.answer_seconds > SLOW_ANSWER_SECONDS:
        yield Finding(
            code="slow-answer",
            severity=WARNING,
            subject="server",
            what="the API process itself is slow: /health asks nothing of the engine",
            seen=(f"it answered after {facts.answer_seconds:.1f} s",),
            advice="give the server a core more than `threads`, or look for what else runs on the machine",
        )


def _limit(facts: Facts, model: str, name: str) -> Any:
    """A limit that the engine has, else the setting."""
    for one in (facts.now.server or {}).get("models", []):
        if one["name"] == model and (one.get("limits") or {}).get(name) is not None:
            return one["limits"][name]
    return facts.now.setting(name)


def _models(facts: Facts) -> Iterator[tuple[ModelFigures, dict[str, Any]]]:
    found = figures(facts.now, facts.then)
    for one in found.models:
        if one.state in SERVING:
            yield one, facts.now.models[one.name]


def _queue(facts: Facts) -> Iterator[Finding]:
    places = facts.now.setting("max_num_waiting")
    refused = figures(facts.now, facts.then).error_rates.get("queue_full", 0.0)
    for one, _ in _models(facts):
        slots = _limit(facts, one.name, "max_num_seqs")
        seen = [f"{one.running:.0f} running, {one.waiting:.0f} waiting; max_num_seqs {slots}, max_num_waiting {places}"]
        if refused:
            seen.append(f"{refused:.2f} requests a second are answered 429")
        if (isinstance(places, int) and places and one.waiting >= places) or (refused and one.waiting):
            yield Finding(
                code="queue-full",
                severity=ERROR,
                subject=f"model {one.name}",
                what="its queue is full: further requests are refused with 429",
                seen=tuple(seen),
                advice="more replicas; or a longer queue (max_num_waiting), where clients wait rather than ask again",
            )
        elif one.waiting and isinstance(slots, int) and one.running >= slots and one.kv_usage < NEARLY_FULL:
            yield Finding(
                code="slots-full",
                severity=WARNING,
                subject=f"model {one.name}",
                what="requests wait for a slot, and KV blocks are left",
                seen=(*seen, f"KV cache {one.kv_usage:.0%} full"),
                advice="raise max_num_seqs, or add replicas",
            )
        elif one.waiting > one.running and one.kv_usage < NEARLY_FULL:
            yield Finding(
                code="queue-grows",
                severity=WARNING,
                subject=f"model {one.name}",
                what="more requests wait than run",
                seen=tuple(seen),
                advice="more replicas; for long prompts a larger max_num_batched_tokens",
            )


def _kv_cache(facts: Facts) -> Iterator[Finding]:
    for one, _ in _models(facts):
        equation = _limit(facts, one.name, "kv_equation")
        seen = [f"KV cache {one.kv_usage:.0%} full, {one.running:.0f} running, {one.waiting:.0f} waiting"]
        seen += [str(equation)] if equation else []
        if one.preemptions:
            yield Finding(
                code="preempting",
                severity=WARNING,
                subject=f"model {one.name}",
                what="requests lose their KV blocks and are computed again",
                seen=(f"{one.preemptions:.2f} preemptions a second", *seen),
                advice="fewer sequences at once (max_num_seqs), or more kv_cache_memory_bytes, or kv_cache_dtype fp8 on a GPU",
            )
        elif one.kv_usage >= FULL and one.waiting:
            yield Finding(
                code="kv-full",
                severity=WARNING,
                subject=f"model {one.name}",
                what="requests wait for KV blocks",
                seen=tuple(seen),
                advice="more kv_cache_memory_bytes, shorter max_tokens, or more replicas",
            )


def _quota(facts: Facts) -> Iterator[Finding]:
    rates = figures(facts.now, facts.then).error_rates
    for kind, code, what, advice in (
        (
            "rate_limit_exceeded",
            "quota",
            "keys have used up what they have a minute",
            "raise the limits in api_keys_file",
        ),
        ("unauthenticated", "keys", "requests have no key, or an unknown one", "clients need a key of this server"),
        ("permission_denied", "scopes", "keys lack the scope for what they ask", "add the scope in api_keys_file"),
        ("internal", "internal", "requests fail by an error of the server", "the log has the trace"),
        (
            "engine_dead",
            "engine-failed",
            "requests were lost with an engine that failed",
            "see the cause of its restart",
        ),
    ):
        if rates.get(kind):
            yield Finding(
                code=code,
                severity=WARNING,
                subject="server",
                what=what,
                seen=(f"{rates[kind]:.2f} answers a second of kind {kind}",),
                advice=advice,
            )


def _deadlines(facts: Facts) -> Iterator[Finding]:
    if facts.then is None or facts.then.samples is None or facts.now.samples is None:
        return
    late = differences(facts.now.samples, facts.then.samples, "request_aborts_total", "cause").get("deadline", 0.0)
    if late > 0:
        yield Finding(
            code="deadlines",
            severity=WARNING,
            subject="server",
            what="requests run out of time before they end",
            seen=(f"{late:.0f} in the last {facts.now.time - facts.then.time:.0f} s",),
            advice="a longer request_timeout_seconds, shorter max_tokens, or less load",
        )


def _adapters(facts: Facts) -> Iterator[Finding]:
    for model in (facts.now.server or {}).get("models", []):
        stats = model.get("stats") or {}
        waiting = set(stats.get("waiting_adapters") or ()) - set(stats.get("running_adapters") or ())
        most = facts.now.setting("max_loras")
        if waiting and len(stats.get("running_adapters") or ()) >= (most or 1):
            yield Finding(
                code="adapters-wait",
                severity=WARNING,
                subject=f"model {model['name']}",
                what="requests wait for their adapter's turn",
                seen=(f"waiting: {', '.join(sorted(waiting))}; max_loras {most}",),
                advice="raise max_loras",
            )


def _prefix_cache(facts: Facts) -> Iterator[Finding]:
    samples = facts.now.samples
    if samples is None or facts.now.setting("enable_prefix_caching") is False:
        return
    for one, _ in _models(facts):
        queries = samples.value("prefix_cache_queries_total", model_name=one.name) or 0.0
        hits = samples.value("prefix_cache_hits_total", model_name=one.name) or 0.0
        reasons = samples.by("prefix_cache_misses_total", "reason", model_name=one.name)
        lost = reasons.get("evicted", 0.0)
        if queries > MANY_QUERIES and hits < FEW_HITS * queries and lost > 0.5 * (queries - hits):
            yield Finding(
                code="cache-evicted",
                severity=NOTE,
                subject=f"model {one.name}",
                what="most of what is asked again was evicted from the prefix cache",
                seen=(f"{hits / queries:.0%} of {queries:.0f} tokens were cached; {lost:.0f} had been evicted",),
                advice="more kv_cache_memory_bytes, or send a conversation to the replica that has it (llm-d's picker)",
            )


def _speculation(facts: Facts) -> Iterator[Finding]:
    for one, _ in _models(facts):
        if one.acceptance_share is not None and one.acceptance_share < LOW_ACCEPTANCE:
            yield Finding(
                code="drafts-refused",
                severity=NOTE,
                subject=f"model {one.name}",
                what="few drafts are accepted",
                seen=(f"{one.acceptance_share:.0%} of the draft tokens",),
                advice="fewer num_speculative_tokens, or another method: docs/speculative-decoding.md",
            )


def _machine(facts: Facts) -> Iterator[Finding]:
    local = facts.local
    if local is None:
        return
    if local.load > 2 * local.cores:
        yield Finding(
            code="machine-busy",
            severity=WARNING,
            subject="machine",
            what="more threads want to run than there are cores",
            seen=(f"load {local.load:.1f} on {local.cores} cores",),
            advice="a node with less on it, or CPU requests equal to limits, and threads no more than its cores",
        )
    if local.memory_limit and local.memory_left is not None and local.memory_left < 0.05 * local.memory_limit:
        yield Finding(
            code="memory-short",
            severity=WARNING,
            subject="machine",
            what="the container has nearly used up its memory",
            seen=(f"{_bytes(local.memory_left)} left of {_bytes(local.memory_limit)}",),
            advice="raise its limit, or lower kv_cache_memory_bytes",
        )
    hosts = {rank["host"] for health in facts.now.models.values() for rank in health.get("ranks") or []}
    if len(hosts) > 1 and (local.interface_errors or local.interfaces_down):
        errors = (f"{name}: {count} packets lost or wrong" for name, count in local.interface_errors.items())
        down = (f"{name} is down" for name in local.interfaces_down)
        yield Finding(
            code="network",
            severity=NOTE,
            subject="machine",
            what="ranks on several machines, and network interfaces here that are down or lose packets",
            seen=(*errors, *down),
            advice="`pagoda doctor --cluster`; choose the interface with network_interface",
        )


RULES: tuple[Rule, ...] = (
    *(_processes, _key, _states, _restarts, _stalled, _parts),
    *(_slow_answer, _queue, _kv_cache, _quota, _deadlines, _adapters, _prefix_cache, _speculation, _machine),
)


def _bytes(count: int | None) -> str:
    return "none" if count is None else format_bytes(count)
