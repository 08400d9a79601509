"""The chart's Grafana dashboard as a picture, without Grafana: its panels, from a running server's metrics over some time.

    python -m benchmarks.dashboard_picture --base-url http://localhost:8080 --seconds 40 --out dashboard.html

Understands the expressions that the dashboard has, and refuses others: sums, rates, quantiles of histograms, one ratio.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagoda.monitoring.samples import Samples
from pagoda.monitoring.server import Server

DASHBOARD = Path(__file__).parent.parent / "charts" / "pagoda" / "files" / "dashboard.json"
EVERY_SECONDS = 1.0
RATE_SAMPLES = 5
"""A rate is over so many scrapes, as Grafana's `$__rate_interval` is over four."""
COLORS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#8ab8ff")
WIDTH, HEIGHT = 400, 150

_QUANTILE = re.compile(r"histogram_quantile\(([\d.]+), sum by \(le\) \(rate\(PREFIX_(\w+)_bucket")
_COUNTER = re.compile(r"(?:sum(?: by \(([\w, ]+)\))? ?\()?(?:rate|increase)\(PREFIX_(\w+)")
_GAUGE = re.compile(r"(?:(?:sum|max|min) by \(([\w, ]+)\) ?\()?PREFIX_(\w+)\{")

Scrape = tuple[float, Samples]
Points = list[tuple[float, float]]


def main() -> None:
    """Scrape, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8080")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default=Path("dashboard.html"))
    options = parser.parse_args()
    server = Server(options.base_url)
    scrapes: list[Scrape] = []
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        scrapes.append((time.monotonic(), Samples(server.get("/metrics").body.decode())))
        time.sleep(EVERY_SECONDS)
    options.out.write_text(page(json.loads(DASHBOARD.read_text(encoding="utf-8")), scrapes), encoding="utf-8")


def page(dashboard: dict[str, Any], scrapes: list[Scrape]) -> str:
    """All panels, in the rows and columns that they have in Grafana."""
    parts = []
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            parts.append(f"<h2>{html.escape(panel['title'])}</h2>")
            continue
        series = [one for target in panel["targets"] for one in series_of(target, scrapes)]
        parts.append(f"<figure><figcaption>{html.escape(panel['title'])}</figcaption>{chart(series, scrapes)}</figure>")
    style = (
        "body{background:#111217;color:#ccccdc;font:13px system-ui,sans-serif;margin:12px;display:grid;gap:8px;"
        "grid-template-columns:repeat(3,1fr);width:1260px}h2{grid-column:1/-1;font-size:14px;margin:6px 0 0}"
        "figure{background:#181b1f;border:1px solid #2c3235;margin:0;padding:8px}figcaption{font-weight:600}"
        "ul{list-style:none;display:flex;flex-wrap:wrap;gap:2px 12px;margin:4px 0 0;padding:0;font-size:11px}"
    )
    title = html.escape(dashboard["title"])
    head = f"<meta charset='utf-8'><title>{title}</title><style>{style}</style>"
    return f"<!doctype html><html lang='en'>{head}{''.join(parts)}</html>"


def series_of(target: dict[str, str], scrapes: list[Scrape]) -> Iterator[tuple[str, Points]]:
    """The lines of one expression, each with its legend. Raises `ValueError` for an expression of another form."""
    expression, legend = target["expr"], target.get("legendFormat", "")
    if quantile := _QUANTILE.match(expression):
        points = []
        for before, (at, now) in zip(scrapes, scrapes[RATE_SAMPLES:], strict=False):
            histogram = now.histogram(quantile[2])
            value = histogram and histogram.minus(before[1].histogram(quantile[2])).quantile(float(quantile[1]))
            if value is not None:
                points.append((at, value))
        yield legend, points
    elif " / " in expression:
        above, below = (_rates(_COUNTER.match(part), scrapes, "") for part in expression.split(" / "))
        shares = [(at, one / other) for (at, one), (_, other) in zip(above[""], below[""], strict=True) if other]
        yield legend, shares
    elif counter := _COUNTER.match(expression):
        rates = _rates(counter, scrapes, counter[1] or "")
        if expression.endswith("> 0"):
            rates = {key: points for key, points in rates.items() if any(value > 0 for _, value in points)}
        yield from _named(legend, rates)
    elif gauge := _GAUGE.match(expression):
        found: dict[str, Points] = {}
        for at, now in scrapes:
            for key, value in _by(now, gauge[2], gauge[1] or "").items():
                found.setdefault(key, []).append((at, value))
        yield from _named(legend, found)
    else:
        raise ValueError(f"an expression of another form: {expression}")


def _rates(counter: re.Match[str] | None, scrapes: list[Scrape], labels: str) -> dict[str, Points]:
    if counter is None:
        raise ValueError("a ratio of something else than counters")
    found: dict[str, Points] = {}
    for (then_at, then), (at, now) in zip(scrapes, scrapes[RATE_SAMPLES:], strict=False):
        before = _by(then, counter[2], labels)
        for key, value in _by(now, counter[2], labels).items():
            found.setdefault(key, []).append((at, max(0.0, value - before.get(key, 0.0)) / (at - then_at)))
    return found


def _by(samples: Samples, name: str, labels: str) -> dict[str, float]:
    """By the first label that the server itself gives; `pod` and `namespace` come from Prometheus."""
    for label in labels.split(", "):
        if label and (found := samples.by(name, label)):
            return found
    value = samples.value(name)
    return {} if value is None else {"": value}


def _named(legend: str, found: dict[str, Points]) -> Iterator[tuple[str, Points]]:
    legend = legend.replace("{{pod}}", "pagoda-0")
    for key, points in found.items():
        yield re.sub(r"\{\{\w+\}\}", key or "pagoda-0", legend, count=1) or key, points


def chart(series: list[tuple[str, Points]], scrapes: list[Scrape]) -> str:
    """Lines over time, those first that have values."""
    first, last = scrapes[0][0], scrapes[-1][0]
    most = max((value for _, points in series for _, value in points), default=0.0) or 1.0
    shown = sorted(series, key=lambda one: -max((value for _, value in one[1]), default=0.0))[: len(COLORS)]
    lines, names = [], []
    for color, (name, points) in zip(COLORS, shown, strict=False):
        path = " ".join(
            f"{40 + (at - first) / max(last - first, 1e-9) * (WIDTH - 44):.1f},{HEIGHT - 8 - value / most * (HEIGHT - 20):.1f}"
            for at, value in points
        )
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        names.append(f'<li><span style="color:{color}">━</span> {html.escape(re.sub(r"[{}]", "", name))}</li>')
    axis = "".join(
        f'<text x="0" y="{y}" fill="#8e8e9b" font-size="10">{text}</text>'
        for y, text in ((16, f"{most:,.4g}"), (HEIGHT - 6, "0"))
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%">{axis}{"".join(lines)}</svg><ul>{"".join(names)}</ul>'


if __name__ == "__main__":
    main()
