"""The figures of a run as one SVG, with nothing but the standard library: `python -m benchmarks.gpu.plots DIR`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 900, 300, 70
BAR, GAP, TITLE = 14, 4, 34
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars under a title; `goal` is a line across them."""

    title: str
    bars: list[tuple[str, float, str]]
    goal: float | None = None

    @property
    def height(self) -> int:
        """Pixels."""
        return TITLE + len(self.bars) * (BAR + GAP) + 12


@dataclass(slots=True)
class _Bars:
    """Collects bars; one colour for each kind."""

    kinds: list[str] = field(default_factory=list)
    bars: list[tuple[str, float, str]] = field(default_factory=list)

    def add(self, label: str, value: object, kind: str = "") -> None:
        if isinstance(value, int | float):
            if kind not in self.kinds:
                self.kinds.append(kind)
            color = COLORS[self.kinds.index(kind) % len(COLORS)]
            self.bars.append((f"{label} {kind}".strip(), float(value), color))


def draw(folder: Path) -> Path | None:
    """Write FOLDER/plots.svg of the parts that are there; None if none of them has figures."""
    panels = [panel for name, panels in PANELS.items() for panel in panels(_results(folder, name)) if panel.bars]
    if not panels:
        return None
    parts, top = [], 40
    for panel in panels:
        parts += _drawn(panel, top)
        top += panel.height
    device = _read(folder).get("environment", {}).get("device", "")
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{top}" fill="white"/>',
        _text(20, 24, f"Pagoda on {device}", size=15),
    ]
    path = folder / "plots.svg"
    path.write_text("\n".join([*head, *parts, "</svg>"]) + "\n", encoding="utf-8")
    return path


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _results(folder: Path, name: str) -> list[dict[str, Any]]:
    found = _read(folder).get("parts", {}).get(name, {}).get("results")
    return found if isinstance(found, list) else []


def _decode(entries: list[dict[str, Any]]) -> Iterator[Panel]:
    shares, beside = _Bars(), _Bars()
    for entry in entries:
        label = f"{entry['heads']}/{entry['kv_heads']} heads, {entry['batch']} × {entry['context']}"
        shares.add(label, entry["share_of_copy"], entry["kv_dtype"])
        beside.add(label, entry.get("over_flashinfer"))
    yield Panel("Decode attention: bytes a second over the copy bandwidth", shares.bars, goal=0.9)
    yield Panel("Decode attention: FlashInfer's time over ours", beside.bars, goal=1.0)


def _prefill(entries: list[dict[str, Any]]) -> Iterator[Panel]:
    rates, beside = _Bars(), _Bars()
    for entry in entries:
        heads = f"{entry['heads']}/{entry['kv_heads']} × {entry['head_dim']}"
        label = f"{heads}, {entry['rows']} of {entry['query_len']} behind {entry['seq_len'] - entry['query_len']}"
        rates.add(label, entry["tflops"])
        for peer in ("flash", "cudnn"):
            beside.add(label, entry.get(f"over_{peer}"), peer)
    yield Panel("Prefill attention: TFLOP/s", rates.bars)
    yield Panel("Prefill attention: SDPA's time over ours", beside.bars, goal=1.0)


def _profile(entries: list[dict[str, Any]]) -> Iterator[Panel]:
    for entry in entries:
        bars = _Bars()
        for kernel in entry["kernels"][:10]:
            bars.add(kernel["name"][:48], kernel["microseconds"])
        yield Panel(f"{entry['step']}: µs a step, the ten longest kernels", bars.bars)


def _workload(entries: list[dict[str, Any]]) -> Iterator[Panel]:
    rates, hidden = _Bars(), _Bars()
    for entry in entries:
        rates.add(entry["model"], entry.get("output_tokens_per_second"), "measured")
        rates.add(entry["model"], entry.get("goal"), "goal")
        rates.add(entry["model"], entry.get("ceiling_by_bandwidth"), "ceiling")
        hidden.add(
            entry["model"], entry.get("share_of_steps_hidden_behind_the_device"), "host hidden behind the device"
        )
        hidden.add(entry["model"], entry.get("share_of_time_the_device_was_idle"), "device idle (goal: below 0.05)")
    yield Panel("256 requests: output tokens a second", rates.bars)
    yield Panel("256 requests: share of steps, share of time", hidden.bars)


def _online(entries: list[dict[str, Any]]) -> Iterator[Panel]:
    for key in ("time_to_first_token_ms", "inter_token_latency_ms"):
        bars = _Bars()
        for entry in entries:
            for percentile, value in (entry.get(key) or {}).items():
                bars.add(f"{entry['share_of_peak']:.0%} of peak", value, percentile)
        yield Panel(f"Poisson arrivals: {key.removesuffix('_ms').replace('_', ' ')}, ms", bars.bars)


def _elementwise(entries: list[dict[str, Any]]) -> Iterator[Panel]:
    bars = _Bars()
    for entry in entries:
        bars.add(f"{entry['kernel']}, {entry['tokens']} tokens", entry["share_of_copy"])
    yield Panel("Other kernels: bytes a second over the copy bandwidth", bars.bars)


def _cold_start(entries: list[dict[str, Any]]) -> Iterator[Panel]:
    bars = _Bars()
    for entry in entries:
        for stage, seconds in entry.items():
            bars.add(str(entry["run"]), seconds, stage)
    yield Panel("From start to ready, seconds", bars.bars, goal=15.0)


PANELS = {
    "decode": _decode,
    "prefill": _prefill,
    "workload": _workload,
    "workload_more": _workload,
    "profile": _profile,
    "online": _online,
    "elementwise": _elementwise,
    "cold_start": _cold_start,
}


def _drawn(panel: Panel, top: int) -> list[str]:
    """A panel's title, bars and goal, from `top` on."""
    most = max([value for _, value, _ in panel.bars] + [panel.goal or 0.0]) or 1.0
    width = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    parts = [_text(20, top + 20, panel.title, size=13)]
    for number, (label, value, color) in enumerate(panel.bars):
        y = top + TITLE + number * (BAR + GAP)
        length = max(0.0, value) / most * width
        parts.append(_text(LABEL_WIDTH - 6, y + BAR - 3, label, anchor="end"))
        parts.append(f'<rect x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>')
        parts.append(_text(LABEL_WIDTH + length + 4, y + BAR - 3, f"{value:.3g}" if value < 1000 else f"{value:,.0f}"))
    if panel.goal is not None:
        x = LABEL_WIDTH + panel.goal / most * width
        bottom = top + TITLE + len(panel.bars) * (BAR + GAP)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + TITLE - 4}" y2="{bottom}" stroke="#d62728" stroke-dasharray="4 3"/>'
        )
    return parts


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    written = draw(Path(sys.argv[1])) if len(sys.argv) == 2 else sys.exit("usage: python -m benchmarks.gpu.plots DIR")
    print(written or "there are no figures to draw")
