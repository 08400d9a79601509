"""Results as tables on the terminal. The same results are written as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pagoda.benchmarking.load import ClientLoad
from pagoda.benchmarking.metrics import METRICS, MILLISECONDS, summary
from pagoda.benchmarking.records import RequestRecord

LATE_MILLISECONDS = 10.0
BUSY_SHARE = 0.9
_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def client_figures(client: ClientLoad, records: list[RequestRecord]) -> dict[str, Any]:
    """What measuring cost, and whether that may have coloured the results."""
    lateness = summary([record.lateness * MILLISECONDS for record in records])
    lag = summary([value * MILLISECONDS for value in client.lags])
    worst = max(lateness["p99"] or 0.0, lag["p99"] or 0.0)
    return {
        "lateness_ms": lateness,
        "event_loop_lag_ms": lag,
        "cpu_share": client.cpu_share,
        "is_slow": worst > LATE_MILLISECONDS or client.cpu_share > BUSY_SHARE,
    }


def print_load(figures: dict[str, Any], client: dict[str, Any]) -> None:
    """Print the figures of `metrics.summarize` and `client_figures`."""
    console = Console()
    console.print(
        f"{figures['completed']} of {figures['requests']} requests in {figures['duration_seconds']:.2f} s: "
        f"{figures['request_throughput']:.2f} requests/s, {figures['output_token_throughput']:.1f} output tokens/s, "
        f"{figures['total_token_throughput']:.1f} tokens/s in all; at most {figures['max_concurrent_requests']} at once"
    )
    if (share := figures["cached_share"]) is not None:
        later = figures["cached_share_of_later_turns"]
        turns = "" if later is None else f"; from the second turn on {later:.1%}"
        console.print(f"{share:.1%} of {figures['prompt_tokens']} prompt tokens were cached{turns}")
    table = Table("ms", *_COLUMNS)
    for name, meaning in METRICS.items():
        _add_row(table, f"{meaning} ({name})", figures[f"{name}_ms"])
    _add_row(table, "sent after its time, by this client", client["lateness_ms"])
    console.print(table)
    if goodput := figures.get("goodput"):
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["limits_ms"].items())
        console.print(
            f"goodput under {limits}: {goodput['requests_per_second']:.2f} requests/s, {goodput['share']:.1%} of requests"
        )
    if speculation := figures.get("speculative_decoding"):
        console.print(_acceptance(speculation))
    for kind, count in figures["errors"].items():
        console.print(f"[red]{count} failed: {kind}[/red]")
    console.print(
        f"client: {client['cpu_share']:.0%} of a core, event loop late by "
        f"{client['event_loop_lag_ms']['p99'] or 0:.1f} ms (p99)"
    )
    if client["is_slow"]:
        console.print(
            "[yellow]the client was late: that much of the latencies may be its own, or other work on this machine[/yellow]"
        )


def _acceptance(figures: dict[str, Any]) -> str:
    if not figures["num_drafts"]:
        return "speculative decoding: no drafts"
    by_position = ", ".join(f"{count / figures['num_drafts']:.0%}" for count in figures["accepted_per_position"])
    return (
        f"speculative decoding: acceptance length {figures['acceptance_length']:.2f} over {figures['num_drafts']} drafts; "
        f"{figures['acceptance_rate']:.0%} of {figures['num_draft_tokens']} draft tokens accepted, by position {by_position}"
    )


def print_rows(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Print `rows` as a table; `columns`: heading by key."""
    table = Table(*columns.values())
    for row in rows:
        table.add_row(*(_number(row[key]) for key in columns))
    Console().print(table)


def _add_row(table: Table, name: str, figures: dict[str, float | None]) -> None:
    if figures["mean"] is not None:
        table.add_row(name, *(_number(figures[column]) for column in _COLUMNS))


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
