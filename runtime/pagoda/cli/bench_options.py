"""What the kinds of `pagoda bench` share: options of a workload, and where results go."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pagoda.benchmarking.environment import environment
from pagoda.benchmarking.prompts import PromptSource
from pagoda.benchmarking.text_files import read_workload
from pagoda.benchmarking.workloads import (
    Conversation,
    LengthRange,
    agent_sessions,
    multi_turn_conversations,
    random_prompts,
    shared_prefix_prompts,
)
from pagoda.config.schema import PagodaConfig
from pagoda.errors import InvalidRequestError

_LENGTH = "TOKENS or LOW:HIGH"

# The options that are not given. An agent's: of 219 sessions of Claude Code that llm-d reports, the median request had 195,000
# tokens in and 317 out, and 96 % of the turns had nine tenths of their prompt from the turn before. Here prompts are a
# tenth of that, for models of today's context on a machine with one GPU, or with none.
_DEFAULTS: dict[str, LengthRange | int] = {
    "num_prompts": 100,
    "input_len": LengthRange(128, 128),
    "output_len": LengthRange(64, 64),
    "num_prefixes": 8,
    "prefix_len": LengthRange(256, 256),
    "num_turns": LengthRange(4, 4),
}
_OF_WORKLOAD: dict[str, dict[str, LengthRange | int]] = {
    "agent": {
        "num_prompts": 16,
        "input_len": LengthRange(64, 512),
        "output_len": LengthRange(16, 64),
        "num_prefixes": 2,
        "prefix_len": LengthRange(6000, 8000),
        "num_turns": LengthRange(12, 24),
    }
}


def length(text: str) -> LengthRange:
    """`LengthRange.parse` with argparse's error type."""
    try:
        return LengthRange.parse(text)
    except InvalidRequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """An integer of 1 or more, with argparse's error type."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of 1 or more")
    return int(text)


def _default(name: str) -> str:
    """The default of an option, for its help."""
    others = ", ".join(f"{workload} {_plain(values[name])}" for workload, values in _OF_WORKLOAD.items())
    return f"default: {_plain(_DEFAULTS[name])}, {others}"


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Options of the workload."""
    group = parser.add_argument_group("workload", "made up by the seed; equal options give equal workloads")
    group.add_argument(
        "--workload", choices=["random", "shared-prefix", "multi-turn", "agent", "file"], default="random"
    )
    group.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help=f"prompts, conversations or sessions; {_default('num_prompts')}",
    )
    group.add_argument("--input-len", type=length, metavar=_LENGTH, help=_default("input_len"))
    group.add_argument("--output-len", type=length, metavar=_LENGTH, help=_default("output_len"))
    group.add_argument(
        "--num-prefixes",
        type=positive,
        metavar="N",
        help=f"shared-prefix, agent: how many beginnings; {_default('num_prefixes')}",
    )
    group.add_argument(
        "--prefix-len",
        type=length,
        metavar=_LENGTH,
        help="shared-prefix, agent: length of a beginning; --input-len is what follows it; " + _default("prefix_len"),
    )
    group.add_argument(
        "--num-turns",
        type=length,
        metavar="N or LOW:HIGH",
        help="multi-turn, agent: requests of a conversation; --input-len is what each adds; " + _default("num_turns"),
    )
    group.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="file: one prompt a line, *.jsonl, or *.json in the form of ShareGPT",
    )
    group.add_argument("--workload-seed", type=int, default=0, metavar="N")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Options of the output files."""
    group = parser.add_argument_group("results")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="the results, with machine, versions, commit and arguments"
    )
    group.add_argument("--progress", action=argparse.BooleanOptionalAction, help="show a bar; default: on a terminal")


def make_workload(own: argparse.Namespace, source: PromptSource) -> list[Conversation]:
    """The conversations that the options ask for. Raises `InvalidRequestError` for what is impossible."""
    for name, value in {**_DEFAULTS, **_OF_WORKLOAD.get(own.workload, {})}.items():
        if getattr(own, name) is None:
            setattr(own, name, value)
    count, seed = own.num_prompts, own.workload_seed
    if (own.dataset_path is None) == (own.workload == "file"):
        raise InvalidRequestError("--workload file and --dataset-path FILE go together")
    if own.workload == "file":
        return read_workload(own.dataset_path, count, own.output_len, seed)
    if own.workload == "shared-prefix":
        return shared_prefix_prompts(
            source, count, own.num_prefixes, own.prefix_len, own.input_len, own.output_len, seed
        )
    if own.workload == "multi-turn":
        return multi_turn_conversations(source, count, own.num_turns, own.input_len, own.output_len, seed)
    if own.workload == "agent":
        return agent_sessions(
            *(source, count, own.num_prefixes, own.prefix_len, own.num_turns, own.input_len, own.output_len, seed)
        )
    return random_prompts(source, count, own.input_len, own.output_len, seed)


def with_acceptance_length(columns: dict[str, str], config: PagodaConfig) -> dict[str, str]:
    """The columns of a table, with what speculative decoding adds where it is on."""
    return columns if config.speculative_config is None else {**columns, "acceptance_length": "accept length"}


def write_json(path: Path | None, kind: str, own: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write `results` with all that is needed to measure them again; nothing if `path` is None.

    Raises `InvalidRequestError` when the file cannot be written.
    """
    if path is None:
        return
    hidden = ("json", "progress", "plot", "api_key")
    arguments = {name: _plain(value) for name, value in vars(own).items() if name not in hidden}
    report = {"kind": kind, **environment(), "arguments": arguments, **results}
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"--json {path} cannot be written: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, LengthRange):
        return f"{value.low}:{value.high}" if value.low < value.high else str(value.low)
    return value if isinstance(value, int | float | str | list | dict | None) else str(value)
