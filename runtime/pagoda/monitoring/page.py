"""A report as one HTML file: no script, no other host, light and dark, drawings with their figures in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pagoda.benchmarking.plot import round_ticks
from pagoda.config.values import format_bytes

_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 310, 170, 46, 34


def as_html(report: Mapping[str, Any]) -> str:
    """The whole file."""
    title = f"Pagoda report: {report['subject']}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">{_text(_head(report))}</p>',
        "<h2>What to change next</h2>",
        *_findings([*report["causes"], *report["advice"]]),
    ]
    for model in report["models"]:
        parts += _model(model)
    parts += ["<h2>Machine</h2>", _machine(report["system"]), "<h2>Settings</h2>", *_settings(report["settings"])]
    if report["not_shown"]:
        rows = [[path, why] for path, why in report["not_shown"].items()]
        parts += ["<h2>Not shown to this key</h2>", _table(("Route", "Why"), rows)]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _head(report: Mapping[str, Any]) -> str:
    version = f"Pagoda {report['version']}, " if report["version"] else ""
    return f"{version}{report['state']}, {report['time']}, watched for {report['seconds']:.0f} s"


def _findings(findings: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if not findings:
        yield "<p>Nothing: no rule has found anything to change.</p>"
    for one in findings:
        seen = "".join(f"<li>{_text(each)}</li>" for each in one["seen"])
        yield (
            f'<section class="finding {one["severity"]}"><h3>{_text(one["severity"].capitalize())}, '
            f"{_text(one['subject'])}: {_text(one['what'])}</h3><ul>{seen}</ul>"
            + (f"<p><strong>Do:</strong> {_text(one['advice'])}</p>" if one["advice"] else "")
            + f'<p class="quiet">{_text(one["code"])}</p></section>'
        )


def _model(model: Mapping[str, Any]) -> Iterable[str]:
    yield f"<h2>Model {_text(model['name'])}</h2>"
    load = model["load"]
    rows = [
        ("Running, waiting", f"{_number(load.get('running'))}, {_number(load.get('waiting'))}"),
        ("Requests a second", _number(load.get("requests"))),
        ("Output tokens a second", _number(load.get("output_tokens"))),
        ("Prompt tokens a second", _number(load.get("prompt_tokens"))),
        *((f"Failed: {kind}", str(count)) for kind, count in (load.get("errors") or {}).items()),
    ]
    yield _table(("Load", ""), [list(row) for row in rows if row[1] != "–"])
    yield from _latencies(model["latencies"])
    yield from _goodput(model["goodput"])
    yield from _time(model)
    yield from _memory(model)
    yield from _cache_and_drafts(model)


def _latencies(latencies: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    if not latencies:
        yield "<p>No request has ended yet: there are no latencies.</p>"
        return
    yield "<h3>Latencies</h3>"
    since = {"watched": "it is watched", "start": "the server began", "bench": "the run began"}
    rows = [
        [
            one["what"],
            *(_number(one[key]) for key in ("mean", "p50", "p90", "p99")),
            _number(one["count"]),
            since[one["since"]],
        ]
        for one in latencies.values()
    ]
    yield _table(("Milliseconds", "mean", "p50", "p90", "p99", "count", "since"), rows, numbers=True)
    yield '<div class="charts">'
    for one in latencies.values():
        if one["histogram"]:
            yield _histogram(one)
    yield "</div>"


def _goodput(goodput: Mapping[str, Any] | None) -> Iterable[str]:
    if not goodput:
        return
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["limits_ms"].items())
    yield "<h3>Goodput</h3>"
    how = "all limits together"
    if not goodput.get("joint"):
        how = "since the server began, the limit that is met least; tpot by the inter-token latency"
    elif "requests" in goodput:
        how += f", of {goodput['requests']} that ended while it was watched"
    text = f"{goodput['share']:.1%} of requests are within {limits} ({how})"
    if "requests_per_second" in goodput:
        text += f": {goodput['requests_per_second']:.2f} a second"
    yield f"<p>{_text(text)}.</p>"
    if shares := goodput.get("shares"):
        yield _table(("Limit", "Within it"), [[name, f"{share:.1%}"] for name, share in shares.items()], numbers=True)


def _time(model: Mapping[str, Any]) -> Iterable[str]:
    steps, limits = model["steps"], model["limits"] or {}
    yield "<h3>Where time goes</h3>"
    if steps is None:
        yield "<p>No step was seen: the engine was idle, or its steps are not shown.</p>"
    else:
        idle = steps["idle_share"] or 0.0
        shares = [(kind, one["share"] * (1 - idle)) for kind, one in steps["kinds"].items()]
        yield _shares([*shares, ("idle", idle)])
        rows = [
            [
                kind,
                str(one["steps"]),
                f"{one['share']:.0%}",
                *(
                    _number(value)
                    for value in (one["ms"]["p50"], one["ms"]["p99"], one["rows"], one["tokens"], one["new"])
                ),
                _rate(one.get("flops"), "FLOP/s"),
                _rate(one.get("bytes"), "B/s"),
                f"{one['roof_share']:.0%}, {one['bound']}" if "roof_share" in one else "–",
            ]
            for kind, one in steps["kinds"].items()
        ]
        head = (
            "Steps",
            "number",
            "of the time",
            "p50 ms",
            "p99 ms",
            "rows",
            "tokens",
            "new tokens",
            "compute",
            "memory",
            "of the roof",
        )
        yield _table(head, rows, numbers=True)
        yield f"<p>{steps['preempted']} preemptions; at most {steps['most_waiting']} requests waited.</p>"
        if steps["roofline"] and steps["roofline"]["points"]:
            yield _roofline(steps["roofline"])
    if phases := limits.get("phase_seconds"):
        rows = [[name, f"{seconds:.2f} s"] for name, seconds in phases.items()]
        yield _table(("Start-up", "took"), rows, numbers=True)


def _memory(model: Mapping[str, Any]) -> Iterable[str]:
    limits, steps, size = model["limits"] or {}, model["steps"] or {}, model["size"]
    if not limits:
        return
    yield "<h3>Where memory goes</h3>"
    if size:
        weights = format_bytes(size["weight_bytes"])
        yield f"<p>{size['parameters'] / 1e6:,.1f} million parameters a token; weights {weights}.</p>"
    yield f"<p>{_text(limits.get('kv_equation') or 'There is no KV cache.')}</p>"
    if blocks := steps.get("blocks"):
        total = sum(blocks.values()) or 1
        yield _table(
            ("KV blocks", "number", "share"), [[k, str(v), f"{v / total:.0%}"] for k, v in blocks.items()], numbers=True
        )


def _cache_and_drafts(model: Mapping[str, Any]) -> Iterable[str]:
    cache, drafts = model["prefix_cache"], model["speculation"]
    if cache:
        yield "<h3>Prefix cache</h3>"
        text = f"{cache['share']:.1%} of {cache['queries']:,.0f} prompt tokens were cached"
        if cache.get("saved_seconds"):
            text += f", about {cache['saved_seconds']:.1f} s of prefill"
        yield f"<p>{_text(text)}.</p>"
        rows = [[reason, f"{count:,.0f}"] for reason, count in cache["misses"].items() if count]
        if rows:
            yield _table(("Tokens not cached", "number"), rows, numbers=True)
    if drafts:
        yield "<h3>Speculative decoding</h3>"
        yield (
            f"<p>{drafts['acceptance']:.0%} of draft tokens are accepted; {drafts['length']:.2f} tokens of a sequence a step "
            "in which it has drafts.</p>"
        )
        rows = [[str(index + 1), f"{share:.0%}"] for index, share in enumerate(drafts["positions"])]
        yield _table(("Position", "accepted"), rows, numbers=True)


def _machine(system: Mapping[str, Any] | None) -> str:
    if not system:
        return "<p>Not known.</p>"
    cpu, memory = system.get("cpu") or {}, system.get("memory") or {}
    rows = [
        [name.replace("_", " "), ", ".join(value) if isinstance(value, list | tuple) else str(value)]
        for name, value in cpu.items()
    ]
    rows += [[f"memory {name}", format_bytes(value)] for name, value in memory.items() if value]
    rows += [[name, str(version)] for name, version in (system.get("versions") or {}).items()]
    return _table(("Machine", ""), rows)


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    changed = [[name, str(one["value"]), one["source"]] for name, one in settings.items() if one["source"] != "default"]
    yield (
        _table(("Not the default", "value", "source"), changed) if changed else "<p>Every setting has its default.</p>"
    )
    rows = [[name, str(one["value"]), one["source"]] for name, one in settings.items()]
    yield f"<details><summary>All {len(rows)}</summary>{_table(('Setting', 'value', 'source'), rows)}</details>"


# ---- drawings


def _histogram(one: Mapping[str, Any]) -> str:
    """Bars of equal width: buckets are no linear scale."""
    bins = [(bound, count) for bound, count in one["histogram"]]
    while len(bins) > 2 and not bins[-1][1]:
        bins.pop()
    while len(bins) > 2 and not bins[0][1]:
        bins.pop(0)
    most = max((count for _, count in bins), default=0) or 1
    width = (_WIDTH - _LEFT - 6) / len(bins)
    parts = []
    for index, (bound, count) in enumerate(bins):
        height = (_HEIGHT - _BOTTOM - 10) * count / most
        x, y = _LEFT + index * width, _HEIGHT - _BOTTOM - height
        upper = "more" if bound is None else _milliseconds(bound)
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width - 1):.1f}" height="{height:.1f}">'
            f"<title>up to {upper}: {count:g}</title></rect>"
        )
    for index in {0, len(bins) // 2, len(bins) - 1}:
        bound = bins[index][0]
        label = "more" if bound is None else _milliseconds(bound)
        x = _LEFT + (index + 0.5) * width
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{label}</text>')
    for tick in round_ticks(most):
        if tick <= most:
            y = _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - 10) * tick / most
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    said = f"{one['what']}: p50 {one['p50']:.1f} ms, p90 {one['p90']:.1f} ms, p99 {one['p99']:.1f} ms"
    return _figure("".join(parts), said, f"{one['what']}, upper bounds of buckets")


def _shares(shares: Sequence[tuple[str, float]]) -> str:
    x, parts = 0.0, []
    total = sum(share for _, share in shares) or 1.0
    for name, share in shares:
        width = 620 * share / total
        parts.append(
            f'<rect class="{name}" x="{x:.1f}" y="0" width="{width:.1f}" height="22"><title>{name} {share:.0%}</title></rect>'
        )
        x += width
    said = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    return _figure("".join(parts), said, said, 620, 22)


def _roofline(roof: Mapping[str, Any]) -> str:
    """Both axes logarithmic; below the roof each step at what it reached."""
    points = [(x, y, kind) for x, y, kind in roof["points"] if x > 0 and y > 0]
    ridge = roof["flops"] / roof["bytes"]
    xs, ys = [x for x, _, _ in points] + [ridge], [y for _, y, _ in points] + [roof["flops"]]
    x_low, x_high = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)) + 0.3)
    y_low, y_high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)) + 0.05)
    width, height = 620, 300

    def at(x: float, y: float) -> tuple[float, float]:
        right = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return _LEFT + 30 + right * (width - _LEFT - 40), height - _BOTTOM - up * (height - _BOTTOM - 10)

    start = max(10.0**x_low, 10.0**y_low / roof["bytes"])
    corners = [(start, start * roof["bytes"]), (ridge, roof["flops"]), (10.0**x_high, roof["flops"])]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*corner) for corner in corners))
    parts = [f'<polyline class="roof" points="{line}"/>']
    for x, y, kind in points:
        across, down = at(x, y)
        parts.append(f'<circle class="{kind}" cx="{across:.1f}" cy="{down:.1f}" r="2.5"/>')
    for power in range(x_low, x_high + 1):
        across, _ = at(10.0**power, 10.0**y_low)
        parts.append(f'<text x="{across:.1f}" y="{height - 18}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(y_low, y_high + 1):
        _, down = at(10.0**x_low, 10.0**power)
        parts.append(f'<text x="{_LEFT + 24}" y="{down + 4:.1f}" text-anchor="end">{_rate(10.0**power, "")}</text>')
    said = (
        f"Roofline: {_rate(roof['flops'], 'FLOP/s')} and {_rate(roof['bytes'], 'B/s')}, {roof['source']}; "
        f"{len(points)} steps below it"
    )
    caption = f"FLOP/s over FLOPs a byte: prefill blue, mixed violet, decode green. {said}"
    return _figure("".join(parts), said, caption, width, height)


def _figure(content: str, said: str, caption: str, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(said)}">{content}</svg><figcaption>{_text(caption)}</figcaption></figure>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """`numbers`: all columns but the first hold numbers."""
    cell = '<td class="number">' if numbers else "<td>"
    body = "".join(
        f"<tr><td>{_text(row[0])}</td>" + "".join(f"{cell}{_text(each)}</td>" for each in row[1:]) + "</tr>"
        for row in rows
    )
    columns = "".join(f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in head)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _text(value: object) -> str:
    return escape(str(value))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _rate(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    for name, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {name}{unit}".strip()
    return f"{value:.3g} {unit}".strip()
