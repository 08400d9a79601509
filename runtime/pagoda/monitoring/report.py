"""The content of `pagoda report`, as plain values: of a running server, or of a result of `pagoda bench serve`.

server ─▶ look, record for some seconds, look again ─▶ report ─▶ advice     page: HTML of the same
bench  ─▶ its JSON                                  ─┘
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from pagoda.benchmarking.metrics import METRICS, ServiceLevel
from pagoda.errors import ConfigError, PagodaError
from pagoda.monitoring.advice import advise
from pagoda.monitoring.causes import Facts, find_causes
from pagoda.monitoring.figures import figures
from pagoda.monitoring.findings import Finding
from pagoda.monitoring.local import is_local, local_facts
from pagoda.monitoring.samples import Samples
from pagoda.monitoring.server import KEY_HINT, Server, Snapshot, look, look_closely
from pagoda.monitoring.steps import Machine, Recording, Size, best_seen
from pagoda.sampling.output import FinishReason

HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "time to first token"),
    "itl": ("inter_token_latency_seconds", "inter-token latency"),
    "e2el": ("e2e_request_latency_seconds", "end-to-end latency"),
    "queue": ("request_queue_time_seconds", "time in the queue"),
    "prefill": ("request_prefill_time_seconds", "prefill time"),
    "decode": ("request_decode_time_seconds", "decode time"),
}
"""Metrics by the name that the report has for them, and what they are."""
_QUANTILES = (50, 90, 99)
GOOD_ENDS = frozenset(FinishReason) - {FinishReason.ABORT, FinishReason.ERROR}
"""Reasons for which a request ends that has its answer."""


def of_server(server: Server, seconds: float, level: ServiceLevel, machine: Machine | None) -> dict[str, Any]:
    """Look at a server for so long. `machine`: what was measured; None: the best that steps reach is taken for it.

    Raises `SilentError`, and `PagodaError` where the key does not show enough.
    """
    try:
        then = look(server)
    except ValueError as error:
        raise PagodaError(str(error)) from None
    if then.samples is None:
        raise PagodaError(f"{server.url}: the metrics are not shown: {then.refusals['/metrics']}; {KEY_HINT}")
    recordings = _record(server, seconds)
    now = look_closely(server)
    local = local_facts(server.url) if is_local(server.url) else None
    causes = find_causes(Facts(now=now, then=then, local=local))
    return report_of(now, then, recordings, level, machine, causes)


def report_of(
    now: Snapshot,
    then: Snapshot,
    recordings: Mapping[str, Recording],
    level: ServiceLevel,
    machine: Machine | None,
    causes: Sequence[Finding] = (),
) -> dict[str, Any]:
    """The report of two looks and what was recorded between them."""
    assert now.samples is not None
    assert then.samples is not None
    shown = figures(now, then)
    models = {one["name"]: one for one in (now.server or {}).get("models", [])}
    found: dict[str, Any] = {
        "kind": "server",
        "subject": now.url,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "seconds": now.time - then.time,
        "version": now.info.get("version"),
        "state": now.health["state"],
        "system": now.info.get("system_env"),
        "settings": {
            name: {"value": one["value"], "default": one["default"], "source": one["source"]}
            for name, one in now.settings.items()
        },
        "not_shown": now.refusals,
        "models": [],
        "causes": [_plain(one) for one in causes],
    }
    for one in shown.models:
        limits = models.get(one.name, {}).get("limits")
        size = Size.of_limits(limits)
        recording = recordings.get(one.name, Recording())
        roof = machine or (best_seen(recording.steps, size) if size is not None else None)
        latencies = _latencies(now.samples, then.samples, one.name)
        found["models"].append(
            {
                "name": one.name,
                "state": one.state,
                "limits": limits,
                "load": {
                    "running": one.running,
                    "waiting": one.waiting,
                    "kv_usage": one.kv_usage,
                    "requests": one.requests,
                    "output_tokens": one.output_tokens,
                    "prompt_tokens": one.prompt_tokens,
                },
                "latencies": latencies,
                "goodput": goodput_while_watched(recording, level) or _goodput(now.samples, one.name, level),
                "steps": recording.as_json(size, roof) if recording.steps else None,
                "prefix_cache": _prefix_cache(now.samples, one.name),
                "speculation": _speculation(now.samples, one.name),
                "size": None if size is None else {"parameters": size.parameters, "weight_bytes": size.weight_bytes},
            }
        )
    found["advice"] = [_plain(one) for one in advise(found)]
    return found


def of_bench(content: Mapping[str, Any], level: ServiceLevel) -> dict[str, Any]:
    """The report of what `pagoda bench serve --json` wrote. Raises `ConfigError` for another file."""
    results = content.get("results")
    if content.get("kind") != "serve" or not isinstance(results, Mapping):
        raise ConfigError("the file is no result of `pagoda bench serve --json`")
    requests: Mapping[str, list[float | None]] = content.get("requests_ms", {})
    latencies = {}
    for name, meaning in METRICS.items():
        summary = results[f"{name}_ms"]
        if summary["mean"] is None:
            continue
        values = [value for value in requests.get(name, []) if value is not None]
        latencies[name] = {
            "what": meaning,
            "count": len(values) or results["completed"],
            "mean": summary["mean"],
            **{f"p{percent}": summary[f"p{percent}"] for percent in _QUANTILES},
            "since": "bench",
            "histogram": _histogram_of(values),
        }
    goodput = results.get("goodput")
    if level.limits:
        if not requests:
            raise ConfigError("the file has no latencies of single requests, which --slo needs: measure again")
        goodput = _goodput_of_requests(requests, level, results)
    speculation = results.get("speculative_decoding")
    found: dict[str, Any] = {
        "kind": "bench",
        "subject": f"pagoda bench serve, {content['arguments'].get('base_url', '')}",
        "time": content.get("time"),
        "seconds": results["duration_seconds"],
        "version": (content.get("versions") or {}).get("pagoda"),
        "state": "measured",
        "system": {
            "cpu": content.get("cpu"),
            "memory": {"total": content.get("memory_bytes")},
            "versions": content.get("versions"),
        },
        "settings": {
            name: {"value": value, "default": None, "source": "command line"}
            for name, value in content["arguments"].items()
        },
        "not_shown": {},
        "causes": [],
        "models": [
            {
                "name": content["arguments"].get("model") or "the first model",
                "state": "measured",
                "limits": None,
                "load": {
                    "requests": results["request_throughput"],
                    "output_tokens": results["output_token_throughput"],
                    "running": results["max_concurrent_requests"],
                    "errors": results["errors"],
                },
                "latencies": latencies,
                "goodput": None if goodput is None else {**goodput, "joint": True},
                "steps": None,
                "prefix_cache": None
                if results["cached_share"] is None
                else {"share": results["cached_share"], "queries": results["prompt_tokens"], "misses": {}},
                "speculation": None
                if not speculation or not speculation["num_draft_tokens"]
                else {
                    "acceptance": speculation["acceptance_rate"],
                    "length": speculation["acceptance_length"],
                    "positions": [count / speculation["num_drafts"] for count in speculation["accepted_per_position"]],
                },
                "size": None,
            }
        ],
    }
    found["advice"] = [_plain(one) for one in advise(found)]
    return found


def _record(server: Server, seconds: float) -> dict[str, Recording]:
    """By model, the steps of so many seconds; nothing where the server has no `/ui/events`."""
    found: dict[str, Recording] = {}
    begun = time.monotonic()
    try:
        with closing(server.events(seconds)) as events:
            for event in events:
                if event["type"] in ("trace", "requests"):
                    found.setdefault(event["model"], Recording()).take(event)
    except PagodaError:  # looked at closely afterwards, which says why
        time.sleep(max(0.0, seconds - (time.monotonic() - begun)))
    for recording in found.values():
        recording.seconds = time.monotonic() - begun
    return found


def _latencies(now: Samples, then: Samples, model: str) -> dict[str, Any]:
    """Of the time between the looks where requests ended in it, else since the server began."""
    found = {}
    for name, (metric, meaning) in HISTOGRAMS.items():
        all_of_it = now.histogram(metric, model_name=model)
        if all_of_it is None or not all_of_it.count:
            continue
        recent = all_of_it.minus(then.histogram(metric, model_name=model))
        chosen, since = (recent, "watched") if recent.count else (all_of_it, "start")
        mean = chosen.mean
        found[name] = {
            "what": meaning,
            "count": chosen.count,
            "mean": None if mean is None else mean * 1000,
            **{f"p{percent}": (chosen.quantile(percent / 100) or 0.0) * 1000 for percent in _QUANTILES},
            "since": since,
            "histogram": [[_finite(bound), count] for bound, count in zip(chosen.bounds, chosen.counts, strict=True)],
        }
    return found


def goodput_while_watched(recording: Recording, level: ServiceLevel) -> dict[str, Any] | None:
    """The share of the requests that ended while the server was watched within all limits; None where none did.

    One that failed, or ran into a deadline, has met none. One whose client left is not counted.
    """
    counted = [one for one in recording.requests if one["cause"] != "client"]
    if not level.limits or not counted:
        return None
    met = {
        name: [one["reason"] in GOOD_ENDS and (one[name] or 0.0) * 1000 <= limit for one in counted]
        for name, limit in level.limits.items()
    }
    within_all = sum(map(all, zip(*met.values(), strict=True)))
    return {
        "limits_ms": dict(level.limits),
        "shares": {name: sum(values) / len(counted) for name, values in met.items()},
        "share": within_all / len(counted),
        "joint": True,
        "requests": len(counted),
        "requests_per_second": within_all / recording.seconds if recording.seconds else 0.0,
    }


def _goodput(now: Samples, model: str, level: ServiceLevel) -> dict[str, Any] | None:
    """The share of all requests so far within each limit, where none ended while the server was watched.

    Histograms do not say which requests are the same: all limits together cannot be known.
    """
    shares: dict[str, float] = {}
    names = {name: HISTOGRAMS[{"tpot": "itl"}.get(name, name)][0] for name in level.limits}
    for name, limit in level.limits.items():
        histogram = now.histogram(names[name], model_name=model)
        share = histogram.share_below(limit / 1000) if histogram is not None else None
        if share is not None:
            shares[name] = share
    if not shares:
        return None
    return {"limits_ms": dict(level.limits), "shares": shares, "share": min(shares.values()), "joint": False}


def _goodput_of_requests(
    requests: Mapping[str, list[float | None]], level: ServiceLevel, results: Mapping[str, Any]
) -> dict[str, Any]:
    names = list(level.limits)
    columns = list(zip(*(requests[name] for name in names), strict=True))
    met = sum(
        all(value is None or value <= level.limits[name] for name, value in zip(names, row, strict=True))
        for row in columns
    )
    shares = {
        name: sum(value is None or value <= limit for value in requests[name]) / max(1, results["requests"])
        for name, limit in level.limits.items()
    }
    return {
        "limits_ms": dict(level.limits),
        "shares": shares,
        "share": met / max(1, results["requests"]),
        "requests_per_second": met / results["duration_seconds"] if results["duration_seconds"] else 0.0,
    }


def _prefix_cache(samples: Samples, model: str) -> dict[str, Any] | None:
    queries = samples.value("prefix_cache_queries_total", model_name=model)
    hits = samples.value("prefix_cache_hits_total", model_name=model)
    if not queries or hits is None:
        return None
    misses = samples.by("prefix_cache_misses_total", "reason", model_name=model)
    prefill, prompts = samples.value("request_prefill_time_seconds_sum", model_name=model), queries - hits
    saved = prefill / prompts * hits if prefill and prompts else None
    return {"share": hits / queries, "queries": queries, "hits": hits, "misses": misses, "saved_seconds": saved}


def _speculation(samples: Samples, model: str) -> dict[str, Any] | None:
    drafts = samples.value("spec_decode_num_drafts_total", model_name=model)
    drafted = samples.value("spec_decode_num_draft_tokens_total", model_name=model)
    accepted = samples.value("spec_decode_num_accepted_tokens_total", model_name=model) or 0.0
    if not drafts or not drafted:
        return None
    positions = samples.by("spec_decode_num_accepted_tokens_per_pos_total", "position", model_name=model)
    ordered = [positions[key] / drafts for key in sorted(positions, key=int)]
    return {"acceptance": accepted / drafted, "length": 1 + accepted / drafts, "positions": ordered}


def _histogram_of(values: Sequence[float], num_bins: int = 24) -> list[list[float | None]]:
    """Upper bounds in seconds and counts, in bins of equal width on a logarithmic scale."""
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    low, high = math.log(min(positive)), math.log(max(positive) * 1.0001)
    width = (high - low) / num_bins or 1.0
    counts = [0] * num_bins
    for value in positive:
        counts[min(num_bins - 1, int((math.log(value) - low) / width))] += 1
    return [[math.exp(low + width * (index + 1)) / 1000, count] for index, count in enumerate(counts)]


def _finite(bound: float) -> float | None:
    return None if math.isinf(bound) else bound


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "severity": finding.severity.name.lower(),
        "subject": finding.subject,
        "what": finding.what,
        "seen": list(finding.seen),
        "advice": finding.advice,
    }
