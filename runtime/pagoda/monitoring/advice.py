"""What to change next and why: one rule a kind of advice, from figures of a report that it shows as its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pagoda.monitoring.findings import Finding, Severity

KV_FULL = 0.9
PREEMPTED_STEPS = 0.01
QUEUE_SHARE = 0.5
PREFILL_SHARE = 0.5
FEW_ROWS = 4
LOW_ACCEPTANCE = 0.3
LONG_TAIL = 5.0
GOOD = 0.95
FAR_FROM_ROOF = 0.4
BUSY = 0.3  # of the time, below which nothing is worth changing for speed
ENOUGH_STEPS = 20
ENOUGH_TOKENS = 1000

Model = Mapping[str, Any]
Report = Mapping[str, Any]
Rule = Callable[[Report, Model], Iterator[Finding]]


def advise(report: Report) -> list[Finding]:
    """What helps most first."""
    found = [finding for model in report["models"] for rule in RULES for finding in rule(report, model)]
    return sorted(found, key=lambda finding: finding.severity)


def _finding(model: Model, code: str, severity: Severity, what: str, seen: tuple[str, ...], advice: str) -> Finding:
    return Finding(code=code, severity=severity, subject=f"model {model['name']}", what=what, seen=seen, advice=advice)


def _setting(report: Report, name: str) -> Any:
    return (report["settings"].get(name) or {}).get("value")


def _kind(model: Model, kind: str) -> Mapping[str, Any] | None:
    """The figures of a kind of step, where there were enough of them."""
    found = ((model["steps"] or {}).get("kinds") or {}).get(kind)
    return found if found and found["steps"] >= ENOUGH_STEPS else None


def _is_busy(model: Model) -> bool:
    idle = (model["steps"] or {}).get("idle_share")
    return idle is not None and 1 - idle >= BUSY


def _kv_cache(report: Report, model: Model) -> Iterator[Finding]:
    steps, usage = model["steps"] or {}, model["load"].get("kv_usage") or 0.0
    share = steps.get("preempted_share", 0.0)
    if share > PREEMPTED_STEPS:
        equation = (model["limits"] or {}).get("kv_equation") or "no KV equation is shown"
        yield _finding(
            model,
            "more-kv-memory",
            Severity.WARNING,
            "sequences lose their KV blocks and are computed again",
            (f"KV cache {usage:.0%} full; {share:.1%} of the steps preempt, {steps['preempted']} requests", equation),
            "raise kv_cache_memory_bytes, or lower max_num_seqs until fewer than 1 % of the steps preempt",
        )
    elif usage >= KV_FULL and model["load"].get("waiting"):
        yield _finding(
            model,
            "kv-limits-batch",
            Severity.WARNING,
            "the KV cache and not the compute bounds how many requests run",
            (
                f"KV cache {usage:.0%} full with {model['load']['running']:.0f} running, {model['load']['waiting']:.0f} wait",
            ),
            "raise kv_cache_memory_bytes, or add a replica",
        )


def _slots(report: Report, model: Model) -> Iterator[Finding]:
    queue, first = model["latencies"].get("queue"), model["latencies"].get("ttft")
    usage = model["load"].get("kv_usage") or 0.0
    if queue and first and first["p90"] and queue["p90"] > QUEUE_SHARE * first["p90"] and queue["p90"] > 50:
        seen = (
            f"p90 of the time in the queue {queue['p90']:.0f} ms, of the time to the first token {first['p90']:.0f} ms",
            f"KV cache {usage:.0%} full, max_num_seqs {(model['limits'] or {}).get('max_num_seqs')}",
        )
        what = "requests wait longer for their turn than for their prefill"
        advice = "raise max_num_seqs: KV blocks are left" if usage < KV_FULL else "add replicas: KV blocks are all held"
        yield _finding(model, "queue-dominates", Severity.WARNING, what, seen, advice)


def _prefill(report: Report, model: Model) -> Iterator[Finding]:
    kinds = (model["steps"] or {}).get("kinds") or {}
    share = sum(kinds[kind]["share"] for kind in ("prefill", "mixed") if kind in kinds)
    cache = model["prefix_cache"]
    if not _is_busy(model) or share < PREFILL_SHARE:
        return
    seen = f"{share:.0%} of the steps' time has prompts in it"
    if _setting(report, "enable_prefix_caching") is False:
        yield _finding(
            model,
            "prefix-caching-off",
            Severity.WARNING,
            "most of the time goes into prompts, and none of them are kept",
            (seen,),
            "enable_prefix_caching",
        )
    elif cache and cache["queries"] > ENOUGH_TOKENS and cache["misses"].get("evicted", 0) > 0.2 * cache["queries"]:
        yield _finding(
            model,
            "prefixes-evicted",
            Severity.WARNING,
            "prompts are computed again that the prefix cache had to let go",
            (seen, f"{cache['misses']['evicted'] / cache['queries']:.0%} of prompt tokens had been evicted"),
            "raise kv_cache_memory_bytes, or route a conversation to the replica that has it",
        )
    elif cache and cache["misses"].get("other_cache_keys", 0) > 0.2 * cache["queries"]:
        yield _finding(
            model,
            "prefixes-kept-apart",
            Severity.NOTE,
            "the same beginnings come from different tenants, salts or adapters, which share no cache",
            (seen, f"{cache['misses']['other_cache_keys'] / cache['queries']:.0%} of prompt tokens"),
            "one key for those who may see each other's cache",
        )


def _tail(report: Report, model: Model) -> Iterator[Finding]:
    gaps, mixed = model["latencies"].get("itl"), _kind(model, "mixed")
    decode = _kind(model, "decode")
    if not gaps or not gaps["p50"] or gaps["p99"] < LONG_TAIL * gaps["p50"]:
        return
    if mixed and decode and mixed["ms"]["p50"] > 2 * decode["ms"]["p50"]:
        yield _finding(
            model,
            "prefill-stalls-decode",
            Severity.WARNING,
            "streams falter when others' prompts are in their steps",
            (
                f"inter-token latency p50 {gaps['p50']:.0f} ms, p99 {gaps['p99']:.0f} ms",
                f"a step takes {decode['ms']['p50']:.0f} ms, with a prompt in it {mixed['ms']['p50']:.0f} ms",
            ),
            f"lower max_num_batched_tokens ({(model['limits'] or {}).get('max_num_batched_tokens')}) or "
            "long_prefill_token_threshold",
        )


def _batch(report: Report, model: Model) -> Iterator[Finding]:
    decode = _kind(model, "decode")
    if not decode or decode.get("bound") != "memory" or not _is_busy(model):
        return
    if decode["rows"] >= FEW_ROWS:
        return
    seen = f"a decode step has {decode['rows']:.1f} rows on average, and reads all weights whatever their number"
    if not _setting(report, "speculative_config"):
        yield _finding(
            model,
            "try-speculation",
            Severity.NOTE,
            "decode waits for memory, with compute to spare: drafts cost little",
            (seen,),
            'speculative_config {"method": "ngram", "num_speculative_tokens": 3}, or a head (docs/speculative-decoding.md)',
        )
    dtype = (model["limits"] or {}).get("dtype")
    if dtype in ("float32", "bfloat16", "float16") and not _setting(report, "quantization"):
        yield _finding(
            model,
            "smaller-weights",
            Severity.NOTE,
            "decode is as fast as weights are read: fewer bytes are more tokens",
            (seen, f"weights in {dtype}"),
            ("dtype bfloat16 halves them; " if dtype == "float32" else "")
            + "quantization int8 or int4, after `pagoda models quantize` has shown what it costs (docs/quantization.md)",
        )


def _speculation(report: Report, model: Model) -> Iterator[Finding]:
    found = model["speculation"]
    if found and found["acceptance"] < LOW_ACCEPTANCE:
        yield _finding(
            model,
            "drafts-refused",
            Severity.NOTE,
            "most drafts are computed for nothing",
            (f"{found['acceptance']:.0%} of draft tokens are accepted, {found['length']:.2f} tokens a step",),
            "fewer num_speculative_tokens, or another method",
        )
    elif found and len(found["positions"]) > 1 and found["positions"][-1] > 0.6:
        yield _finding(
            model,
            "draft-more",
            Severity.NOTE,
            "even the last draft is accepted more often than not",
            (f"position {len(found['positions'])}: {found['positions'][-1]:.0%}",),
            "raise num_speculative_tokens",
        )


def _roof(report: Report, model: Model) -> Iterator[Finding]:
    roof = (model["steps"] or {}).get("roofline")
    if not roof or not roof["source"].startswith("measured"):
        return
    for kind in ("decode", "prefill"):
        figures = _kind(model, kind)
        if figures and figures.get("roof_share", 1.0) < FAR_FROM_ROOF and _is_busy(model):
            cpu = ((report["system"] or {}).get("cpu") or {}).get("usable_cores")
            yield _finding(
                model,
                f"{kind}-far-from-roof",
                Severity.NOTE,
                f"{kind} steps reach a small part of what the machine can do",
                (
                    f"{figures['roof_share']:.0%} of the {figures['bound']} roof; {figures['rows']:.1f} rows, "
                    f"{figures['tokens']:.0f} tokens a step",
                    f"threads {_setting(report, 'threads')}, usable cores {cpu}",
                ),
                "larger batches; no more threads than cores that are free; look for other work on the machine",
            )


def _goodput(report: Report, model: Model) -> Iterator[Finding]:
    goodput = model["goodput"]
    if not goodput or goodput["share"] >= GOOD:
        return
    latencies = model["latencies"]
    shares = goodput.get("shares") or {}
    worst = min(shares, key=lambda name: shares[name]) if shares else next(iter(goodput["limits_ms"]))
    limit = goodput["limits_ms"][worst]
    seen = [
        f"{goodput['share']:.0%} of requests are within "
        + ", ".join(f"{k} {v:g} ms" for k, v in goodput["limits_ms"].items())
    ]
    if worst in shares:
        seen.append(f"{worst}: {shares[worst]:.0%} within {limit:g} ms")
    queue, prefill = latencies.get("queue"), latencies.get("prefill")
    if worst == "ttft" and queue and prefill:
        seen.append(f"p90: queue {queue['p90']:.0f} ms, prefill {prefill['p90']:.0f} ms")
        advice = (
            "the queue: more replicas, or a larger max_num_seqs where KV blocks are left"
            if queue["p90"] > prefill["p90"]
            else "the prefill: prefix caching, shorter prompts, tensor parallelism, or smaller weights"
        )
    elif worst == "tpot":
        advice = "fewer sequences in a step (max_num_seqs), smaller weights, or speculative decoding"
    else:
        advice = "see what of it is queue, prefill and decode above; more replicas shorten all but the decode"
    yield _finding(model, "slo-missed", Severity.WARNING, "the service level is missed", tuple(seen), advice)


RULES: tuple[Rule, ...] = (_goodput, _kv_cache, _slots, _prefill, _tail, _batch, _speculation, _roof)
