"""`pagoda bench latency`: one batch after the other through the engine in this process, each step timed."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pagoda.benchmarking.metrics import MILLISECONDS, percentile, summary
from pagoda.benchmarking.report import print_rows
from pagoda.cli.bench_options import add_result_options, positive, with_acceptance_length, write_json
from pagoda.cli.offline import add_model, make_parser, parse, say_model
from pagoda.cli.parser import CommandParser

if TYPE_CHECKING:
    from pagoda.benchmarking.engine_runs import BatchTimes

DESCRIPTION = (
    "Runs batches of random prompts through the engine in this process. Every sequence generates its full length. Settings of "
    "the engine (--model, --dtype, --threads, ...) are taken as by `pagoda serve`."
)
_COLUMNS = {
    "batch_size": "batch",
    "prefill_ms_p50": "prefill ms",
    "prefill_tokens_per_second": "prefill tok/s",
    "step_ms_p50": "step ms p50",
    "step_ms_p99": "p99",
    "decode_tokens_per_second": "decode tok/s",
    "total_ms_p50": "whole batch ms p50",
    "total_ms_p99": "p99",
}


def run(arguments: Sequence[str]) -> int:
    """Measure every batch size, print a table, write JSON where asked."""
    own, config = parse(_parser(), arguments)

    from pagoda.benchmarking.engine_runs import check_lengths, time_batch
    from pagoda.engine.core.startup import start_core

    say_model(config)
    core = start_core(config)
    try:
        for size in own.batch_size:
            check_lengths(core, size, own.input_len, own.output_len)
        rows = []
        for size in own.batch_size:
            rng = random.Random(own.workload_seed)
            count = own.num_iters_warmup + own.num_iters
            timed = [time_batch(core, size, own.input_len, own.output_len, rng) for _ in range(count)]
            row = _row(size, own.input_len, own.output_len, timed[own.num_iters_warmup :])
            rows.append({**row, "acceptance_length": core.stats().acceptance_length})
    finally:
        core.shutdown()
    print_rows(rows, with_acceptance_length(_COLUMNS, config))
    settings = {"model": config.model, "dtype": config.dtype, "quantization": config.quantization}
    results = {"settings": settings, "phase_seconds": core.ready.phase_seconds, "results": rows}
    write_json(own.json, "latency", own, results)
    return 0


def _parser() -> CommandParser:
    parser = make_parser("bench latency", DESCRIPTION)
    add_model(parser)
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1], metavar="N", help="one or several")
    parser.add_argument("--input-len", type=positive, default=128, metavar="TOKENS")
    parser.add_argument("--output-len", type=positive, default=64, metavar="TOKENS")
    parser.add_argument("--num-iters", type=positive, default=5, metavar="N", help="batches that are measured")
    parser.add_argument("--num-iters-warmup", type=positive, default=1, metavar="N", help="batches before them")
    parser.add_argument("--workload-seed", type=int, default=0, metavar="N")
    add_result_options(parser)
    return parser


def _row(batch_size: int, input_tokens: int, output_tokens: int, timed: list[BatchTimes]) -> dict[str, Any]:
    """The figures of one batch size. Rates come from medians: one slow moment of the machine is not the engine's."""
    steps = [seconds * MILLISECONDS for times in timed for seconds in times.steps]
    totals = [times.total * MILLISECONDS for times in timed]
    prefill = statistics.median(times.prefill for times in timed)
    # One a sequence, and with speculative decoding more.
    tokens_per_step = len(timed) * batch_size * (output_tokens - 1) / max(1, len(steps))
    return {
        "batch_size": batch_size,
        "prefill_ms_p50": prefill * MILLISECONDS,
        "prefill_tokens_per_second": batch_size * input_tokens / prefill,
        "step_ms_p50": percentile(steps, 50),
        "step_ms_p99": percentile(steps, 99),
        "decode_tokens_per_second": tokens_per_step * MILLISECONDS / percentile(steps, 50),
        "total_ms_p50": percentile(totals, 50),
        "total_ms_p99": percentile(totals, 99),
        "total_ms": summary(totals),
        "step_ms": summary(steps),
    }
