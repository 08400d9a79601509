"""`pagoda bench serve`: load on a running server, and what its users would have felt."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pagoda.benchmarking.arrivals import LoadPlan
from pagoda.benchmarking.endpoints import (
    Endpoint,
    OpenAIChat,
    OpenAICompletions,
    RequestFailure,
    Target,
    V2Generate,
    V2Infer,
    get_json,
)
from pagoda.benchmarking.load import LoadResult, run_load
from pagoda.benchmarking.metrics import ServiceLevel, by_request, summarize
from pagoda.benchmarking.plot import load_plot
from pagoda.benchmarking.prompts import (
    PromptSource,
    TokenIdSource,
    WordSource,
    common_words,
    plain_token_ids,
)
from pagoda.benchmarking.records import RequestRecord
from pagoda.benchmarking.report import client_figures, print_load
from pagoda.benchmarking.spec_decode import spec_decode_counters, spec_decode_figures
from pagoda.benchmarking.workloads import Conversation, check_fits
from pagoda.cli.bench_options import add_result_options, add_workload_options, make_workload, positive, write_json
from pagoda.cli.parser import CommandParser
from pagoda.errors import InvalidRequestError, PagodaError
from pagoda.text.tokenizer import Tokenizer

DESCRIPTION = (
    "Puts load on a running server, any that serves OpenAI's protocol or V2. Without --request-rate all prompts are "
    "sent at once, or, with --max-concurrency, one as soon as another ends (closed loop). With it they arrive at random "
    "moments at that rate and wait for no answer (open loop)."
)
QUESTION_SECONDS = 10.0
WORDS_FOR_TOKEN_IDS = 400
HTTP_ENDPOINTS: dict[str, Callable[[Target, float], Endpoint]] = {
    "openai-completions": OpenAICompletions,
    "openai-chat": OpenAIChat,
    "v2-generate": V2Generate,
    "v2-infer": V2Infer,
}
GRPC_ENDPOINT = "v2-grpc"


def run(arguments: Sequence[str]) -> int:
    """Measure, print, write what was asked for; 1 if any request failed."""
    own = _parser().parse_args(arguments)
    plan = LoadPlan(own.request_rate, own.burstiness, own.max_concurrency, own.workload_seed)
    level = ServiceLevel.parse(own.goodput)
    try:
        result, speculation = asyncio.run(_measure(own, plan))
    except RequestFailure as failure:
        raise PagodaError(f"{own.base_url} ({own.endpoint_type}): {failure.kind}: {failure}") from failure
    figures = summarize(result.records, level)
    if speculation is not None:
        figures["speculative_decoding"] = speculation
    client = client_figures(result.client, result.records)
    print_load(figures, client)
    _print_first_failures(result.records)
    write_json(
        own.json, "serve", own, {"results": figures, "client": client, "requests_ms": by_request(result.records)}
    )
    if own.plot is not None:
        _write(own.plot, load_plot(result.records, f"{own.endpoint_type}, {own.workload}"))
    return 1 if figures["errors"] else 0


async def _measure(own: argparse.Namespace, plan: LoadPlan) -> tuple[LoadResult, dict[str, Any] | None]:
    """The load, and what the server's speculative decoding did meanwhile, where it has any."""
    is_grpc = own.endpoint_type == GRPC_ENDPOINT
    if is_grpc and own.model is None:
        raise InvalidRequestError(f"--endpoint-type {GRPC_ENDPOINT} needs --model NAME")
    model, max_model_len = (own.model, None) if is_grpc else await _served_model(own)
    target = Target(
        base_url=own.base_url.rstrip("/"),
        model=model,
        api_key=own.api_key,
        ignore_eos=own.ignore_eos,
        temperature=own.temperature,
        extra_body=own.extra_body,
    )
    endpoint = _endpoint(own, target)
    try:
        source = await _prompt_source(own, target, endpoint.takes_token_ids)
        workload = make_workload(own, source)
        if max_model_len is not None:
            check_fits(workload, max_model_len)
        await _ask_once(endpoint, workload[0])
        before = None if is_grpc else await spec_decode_counters(target, QUESTION_SECONDS)
        with _progress(own, sum(len(conversation.turns) for conversation in workload)) as on_record:
            result = await run_load(workload, endpoint, plan, on_record)
        after = None if is_grpc else await spec_decode_counters(target, QUESTION_SECONDS)
        return result, spec_decode_figures(before, after)
    finally:
        await endpoint.close()


def _endpoint(own: argparse.Namespace, target: Target) -> Endpoint:
    if own.endpoint_type != GRPC_ENDPOINT:
        return HTTP_ENDPOINTS[own.endpoint_type](target, own.timeout)
    from pagoda.benchmarking.grpc_endpoint import V2Grpc

    return V2Grpc(target, own.timeout)


async def _served_model(own: argparse.Namespace) -> tuple[str, int | None]:
    """The model to ask for and its longest sequence, as `/v1/models` has them; a server may lack that route.

    Raises `RequestFailure` when nothing is there, and `InvalidRequestError` for a model that is not served.
    """
    target = Target(base_url=own.base_url.rstrip("/"), model="", api_key=own.api_key)
    try:
        listed = (await get_json(target, "/v1/models", QUESTION_SECONDS)).get("data", [])
    except RequestFailure as failure:
        if own.model is None or not failure.kind.startswith("HTTP 404"):
            raise
        return own.model, None
    cards = {card["id"]: card.get("max_model_len") for card in listed}
    if not cards:
        raise InvalidRequestError(f"{own.base_url} serves no model")
    model = own.model or next(iter(cards))
    if model not in cards:
        raise InvalidRequestError(f"--model {model} is not served by {own.base_url}; it has {', '.join(cards)}")
    return model, cards[model]


async def _prompt_source(own: argparse.Namespace, target: Target, takes_token_ids: bool) -> PromptSource:
    """Token ids where the endpoint takes them and the vocabulary is known, else words.

    Conversations of several turns are text: the answers in them come back as text.
    """
    tokenizer = None if own.tokenizer is None else Tokenizer.from_directory(own.tokenizer)
    wants_ids = takes_token_ids and own.workload not in ("multi-turn", "agent")
    if own.prompt_format == "ids" and not wants_ids:
        raise InvalidRequestError(f"--prompt-format ids: {own.endpoint_type} with {own.workload} prompts takes text")
    if own.prompt_format == "text" or not wants_ids:
        return WordSource(tokenizer)
    if tokenizer is not None:
        return TokenIdSource(plain_token_ids(tokenizer))
    if own.endpoint_type == GRPC_ENDPOINT:
        return WordSource()
    body = {"model": target.model, "prompt": common_words(WORDS_FOR_TOKEN_IDS), "add_special_tokens": False}
    try:
        tokens = (await get_json(target, "/tokenize", QUESTION_SECONDS, body))["tokens"]
    except (RequestFailure, KeyError) as failure:
        if own.prompt_format == "ids":
            raise InvalidRequestError(
                f"--prompt-format ids: the server has no /tokenize ({failure}); give --tokenizer DIR"
            ) from failure
        print(
            "the server has no /tokenize: prompts are words, lengths are approximate (--tokenizer DIR)", file=sys.stderr
        )
        return WordSource()
    return TokenIdSource(sorted(set(tokens)))


async def _ask_once(endpoint: Endpoint, conversation: Conversation) -> None:
    """One request before the load, so that a wrong name or length is one error and not a thousand."""
    turn = conversation.turns[0]
    await endpoint.send((*conversation.history, turn.content), turn.output_tokens, lambda: None)


def _progress(own: argparse.Namespace, total: int) -> AbstractContextManager[Callable[[RequestRecord], None] | None]:
    wanted = sys.stderr.isatty() if own.progress is None else own.progress
    if not wanted:
        return nullcontext(None)
    from pagoda.cli.bench_progress import RequestProgress

    return RequestProgress(total)


def _print_first_failures(records: Sequence[RequestRecord]) -> None:
    """One example of each kind of error."""
    seen = set()
    for record in records:
        if record.error is not None and record.error not in seen:
            seen.add(record.error)
            print(f"  {record.error}: {record.detail}", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error}") from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return content


def _parser() -> CommandParser:
    parser = CommandParser(prog="pagoda bench serve", description=DESCRIPTION)
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", default="http://127.0.0.1:8080", metavar="URL", help="gRPC: HOST:PORT")
    server.add_argument("--endpoint-type", choices=[*HTTP_ENDPOINTS, GRPC_ENDPOINT], default="openai-completions")
    server.add_argument("--model", metavar="NAME", help="the served name; default: the first that the server lists")
    server.add_argument("--api-key", metavar="KEY")
    server.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one request")
    server.add_argument("--tokenizer", metavar="DIR", help="for exact lengths where the server has no /tokenize")
    server.add_argument(
        "--prompt-format", choices=["auto", "ids", "text"], default="auto", help="auto: ids where they are taken"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=float, default=math.inf, metavar="RATE", help="arrivals a second")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="SHAPE", help="1: Poisson; below: in bursts")
    load.add_argument("--max-concurrency", type=positive, metavar="N", help="most under way at once")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0)
    sampling.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    sampling.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="added to every body")
    add_workload_options(parser)
    add_result_options(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="distributions and concurrency")
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="service level: ttft:200 tpot:50 e2el:5000"
    )
    return parser
