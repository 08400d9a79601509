"""`pagoda bench throughput`: a whole workload through `LLM`, as fast as it goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from pagoda.benchmarking.prompts import TokenIdSource, plain_token_ids
from pagoda.benchmarking.report import print_rows
from pagoda.benchmarking.workloads import check_fits
from pagoda.cli.bench_options import (
    add_result_options,
    add_workload_options,
    make_workload,
    with_acceptance_length,
    write_json,
)
from pagoda.cli.offline import add_model, loaded_llm, make_parser, parse
from pagoda.cli.parser import CommandParser

DESCRIPTION = (
    "Completes a whole workload through the engine in this process, as fast as it goes. Settings of the engine (--model, "
    "--dtype, --max-num-seqs, ...) are taken as by `pagoda serve`."
)
_COLUMNS = {
    "requests": "requests",
    "seconds": "seconds",
    "requests_per_second": "requests/s",
    "output_tokens_per_second": "output tok/s",
    "tokens_per_second": "all tok/s",
    "cached_share": "prompt tokens cached",
}


def run(arguments: Sequence[str]) -> int:
    """Measure, print a table, write JSON where asked."""
    own, config = parse(_parser(), arguments)

    from pagoda.benchmarking.engine_runs import run_throughput

    with loaded_llm(config) as llm:
        workload = make_workload(own, TokenIdSource(plain_token_ids(llm.tokenizer)))
        check_fits(workload, llm.max_model_len)
        progress = sys.stderr.isatty() if own.progress is None else own.progress
        result = run_throughput(llm, workload, progress=progress)
    tokens = result.prompt_tokens + result.output_tokens
    row = {
        **asdict(result),
        "requests_per_second": result.requests / result.seconds,
        "output_tokens_per_second": result.output_tokens / result.seconds,
        "tokens_per_second": tokens / result.seconds,
        "cached_share": result.cached_tokens / result.prompt_tokens,
    }
    columns = dict(_COLUMNS)
    if result.later_prompt_tokens:
        row["cached_share_of_later_turns"] = result.later_cached_tokens / result.later_prompt_tokens
        columns["cached_share_of_later_turns"] = "from the second turn on"
    print_rows([row], with_acceptance_length(columns, config))
    settings = {"model": config.model, "dtype": config.dtype, "quantization": config.quantization}
    write_json(own.json, "throughput", own, {"settings": settings, "results": row})
    return 0


def _parser() -> CommandParser:
    parser = make_parser("bench throughput", DESCRIPTION)
    add_model(parser)
    add_workload_options(parser)
    add_result_options(parser)
    return parser
