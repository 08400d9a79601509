"""Draws a run's loss curve as SVG, with nothing but the standard library: `python plot.py /tmp/demo/curve.json loss.svg`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 320, 50, 40
COLORS = {96: "#9467bd", 256: "#1f77b4", 512: "#2ca02c", 1024: "#ff7f0e", 2048: "#d62728"}
SMOOTHING = 0.9


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, not biased to the first value."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        smoothed.append(total / weight)
    return smoothed


def svg(curve: list[dict[str, float]]) -> str:
    """Loss (logarithmic) against millions of tokens, one line for each row length."""
    most_tokens = curve[-1]["tokens"]
    low, high = math.log(0.05), math.log(10.0)

    def place(tokens: float, loss: float) -> tuple[float, float]:
        share = (math.log(max(loss, 0.05)) - low) / (high - low)
        return LEFT + (WIDTH - LEFT - 10) * tokens / most_tokens, (HEIGHT - BOTTOM) * (1 - share) + 10 * share

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for loss in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10):
        _, y = place(0, loss)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>')
    for tick in range(5):
        x, y = place(most_tokens * tick / 4, 0.05)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{most_tokens * tick / 4e6:.1f} M</text>')
    for index, (length, color) in enumerate(COLORS.items()):
        points = [point for point in curve if point["length"] == length]
        if not points:
            continue
        losses = smooth([point["loss"] for point in points])
        places = [place(point["tokens"], loss) for point, loss in zip(points, losses, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<text x="{WIDTH - 120}" y="{24 + 15 * index}" fill="{color}">rows of {length}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">training tokens</text>')
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">'
    return "\n".join([start, *parts, "</svg>"]) + "\n"


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(svg(json.loads(source.read_text())["curve"]))


if __name__ == "__main__":
    main()
