"""A run as one SVG, with nothing but the standard library: how latencies are distributed, and how much ran when."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pagoda.benchmarking.metrics import latencies, percentile
from pagoda.benchmarking.records import RequestRecord

WIDTH, PANEL_HEIGHT, LEFT, TOP, RIGHT = 720, 220, 60, 40, 20
PLOT_HEIGHT = 150
COLORS = {"ttft": "#1f77b4", "tpot": "#2ca02c", "itl": "#ff7f0e", "e2el": "#d62728"}
NUM_POINTS = 101
NUM_TICKS = 5
Point = tuple[float, float]


def load_plot(records: Sequence[RequestRecord], title: str) -> str:
    """SVG of a run: a distribution for each metric, and requests under way over time."""
    parts = [_text(WIDTH / 2, 20, title, size=14, anchor="middle")]
    panels = 0
    for name, values in latencies(records).items():
        if values:
            points = [(percentile(values, percent), percent) for percent in range(NUM_POINTS)]
            caption = f"{name}: share of values (%) up to so many ms"
            parts += _panel(panels, caption, points, COLORS[name], highest=100)
            panels += 1
    parts += _panel(panels, "requests under way, over seconds", _under_way(records), "#555555")
    height = TOP + (panels + 1) * PANEL_HEIGHT
    frame = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11"'
    background = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>', background, *parts, "</svg>"]) + "\n"


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


def _panel(number: int, caption: str, points: Sequence[Point], color: str, highest: float = 0.0) -> list[str]:
    """A framed line of `points` with its axes; `highest`: end of the vertical axis, that of the points if 0."""
    top = TOP + number * PANEL_HEIGHT
    most_x = max((x for x, _ in points), default=0.0) or 1.0
    most_y = highest or max((y for _, y in points), default=0.0) or 1.0
    width = WIDTH - LEFT - RIGHT

    def place(x: float, y: float) -> Point:
        return LEFT + width * x / most_x, top + 20 + PLOT_HEIGHT * (1 - y / most_y)

    parts = [_text(LEFT, top + 12, caption)]
    for tick in range(NUM_TICKS):
        share = tick / (NUM_TICKS - 1)
        x, y = place(most_x * share, most_y * share)
        _, bottom = place(0, 0)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{most_y * share:.3g}", anchor="end"))
        parts.append(_text(x, bottom + 14, f"{most_x * share:.3g}", anchor="middle"))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    return parts


def _text(x: float, y: float, words: str, *, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
