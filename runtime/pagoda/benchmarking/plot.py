"""A run as one SVG, with nothing but the standard library: how latencies are distributed, and how much ran when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from pagoda.benchmarking.metrics import METRICS, latencies, percentile
from pagoda.benchmarking.records import RequestRecord

WIDTH, PANEL_HEIGHT, LEFT, TOP, RIGHT = 720, 250, 70, 40, 30
PLOT_HEIGHT = 160
COLORS = {"ttft": "#1f77b4", "tpot": "#2ca02c", "itl": "#ff7f0e", "e2el": "#d62728"}
MARKED = (50, 99)
NUM_POINTS = 101
MOST_TICKS = 6
Point = tuple[float, float]


def load_plot(records: Sequence[RequestRecord], title: str) -> str:
    """SVG of a run: a distribution for each metric with its p50 and p99, and requests under way over time."""
    parts = [_text(WIDTH / 2, 20, title, size=14, anchor="middle")]
    panels = 0
    for name, values in latencies(records).items():
        if values:
            points = [(percentile(values, percent), percent) for percent in range(NUM_POINTS)]
            marks = {f"p{percent}": percentile(values, percent) for percent in MARKED}
            labels = (f"{name}: {METRICS[name]}", "milliseconds", "% of values")
            parts += _panel(panels, labels, points, COLORS[name], marks)
            panels += 1
    labels = ("requests under way", "seconds since the first was sent", "requests")
    parts += _panel(panels, labels, _under_way(records), "#555555", {})
    height = TOP + (panels + 1) * PANEL_HEIGHT
    frame = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11"'
    background = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>', background, *parts, "</svg>"]) + "\n"


def round_ticks(highest: float) -> list[float]:
    """0 and the multiples of 1, 2 or 5 times a power of ten after it, the last one `highest` or the first beyond; at most
    `MOST_TICKS` and one more.
    """
    if not 0 < highest < math.inf:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / MOST_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * MOST_TICKS >= highest)
    return [step * index for index in range(math.ceil(round(highest / step, 9)) + 1)]


def _under_way(records: Sequence[RequestRecord]) -> list[Point]:
    """Steps: at each moment of change, how many requests were under way before and after it."""
    if not records:
        return []
    began = min(record.sent for record in records)
    changes = sorted(
        [(record.sent - began, 1) for record in records] + [(record.ended - began, -1) for record in records]
    )
    points: list[Point] = []
    now = 0
    for moment, change in changes:
        points += [(moment, now), (moment, now + change)]
        now += change
    return points


def _panel(
    number: int, labels: tuple[str, str, str], points: Sequence[Point], color: str, marks: Mapping[str, float]
) -> list[str]:
    """A line of `points` between its axes. `labels`: of the panel and of both axes; `marks`: places on the horizontal one."""
    title, x_label, y_label = labels
    top = TOP + number * PANEL_HEIGHT + 20
    x_ticks = round_ticks(max((x for x, _ in points), default=0.0))
    y_ticks = round_ticks(max((y for _, y in points), default=0.0))
    width = WIDTH - LEFT - RIGHT
    bottom = top + PLOT_HEIGHT

    def place(x: float, y: float) -> Point:
        return LEFT + width * x / x_ticks[-1], top + PLOT_HEIGHT * (1 - y / y_ticks[-1])

    parts = [_text(LEFT, top - 8, title, size=12)]
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:.10g}", anchor="end"))
    for tick in x_ticks:
        x, _ = place(tick, 0)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="#555555"/>')
        parts.append(_text(x, bottom + 16, f"{tick:.10g}", anchor="middle"))
    parts.append(_text(LEFT + width / 2, bottom + 32, x_label, anchor="middle"))
    turned = f'transform="rotate(-90 14 {top + PLOT_HEIGHT / 2:.1f})"'
    parts.append(_text(14, top + PLOT_HEIGHT / 2, y_label, anchor="middle", more=turned))
    for row, (name, value) in enumerate(marks.items()):
        x, _ = place(value, 0)
        dashes = 'stroke="#333333" stroke-dasharray="4 3"'
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" {dashes}/>')
        # On the side that has room for the words, and each on a line of its own.
        is_left = x < LEFT + width / 2
        words = f"{name} {_figure(value)} ms"
        parts.append(
            _text(x + (4 if is_left else -4), bottom - 24 + 14 * row, words, anchor="start" if is_left else "end")
        )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    return parts


def _figure(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, words: str, *, size: int = 11, anchor: str = "start", more: str = "") -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {attributes}{' ' if more else ''}{more}>{escape(words)}</text>"
