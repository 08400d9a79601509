"""`pagoda embed`: vectors of texts offline, from arguments, a file or standard input, to JSON lines or a NumPy file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pagoda.cli.offline import loaded_llm, make_parser, parse
from pagoda.cli.parser import CommandParser
from pagoda.errors import InvalidRequestError
from pagoda.text.output import PoolingOutput

DESCRIPTION = (
    "Makes vectors of texts without a server, by an embedding model or any other (the last token's vector). Texts are "
    "arguments, or come from --input, one a line; with neither, from standard input."
)


def run(arguments: Sequence[str]) -> int:
    """Embed the texts of a command line; 1 if any of them failed in the engine."""
    own, config = parse(_parser(), arguments)
    if config.task == "auto":
        config = replace(config, task="embed")  # of a model that would generate, too
    texts = _texts(own)
    if own.output is not None and not own.output.endswith((".npy", ".jsonl")):
        raise InvalidRequestError(f"--output {own.output}: the name must end with .npy or .jsonl")
    with loaded_llm(config) as llm:
        outputs = llm.embed(
            texts,
            dimensions=own.dimensions,
            prompt_name=own.prompt_name,
            truncate_prompt_tokens=-1 if own.truncate else None,
        )
    failed = [output for output in outputs if output.pooled is None]
    for output in failed:
        print(f"pagoda embed: {output.error}", file=sys.stderr)
    if not failed:
        _write(outputs, own.output)
    return 1 if failed else 0


def _parser() -> CommandParser:
    parser = make_parser("embed", DESCRIPTION)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="text to embed")
    parser.add_argument("--input", metavar="FILE", help="texts from a file, one a line; - for standard input")
    parser.add_argument(
        "--output", metavar="FILE", help="a .npy file of float32, or .jsonl; default: JSON lines to standard output"
    )
    parser.add_argument("--dimensions", type=int, metavar="N", help="keep so many numbers of each vector (Matryoshka)")
    parser.add_argument(
        "--prompt-name", metavar="NAME", help="the checkpoint's prompt to put before each text, such as query"
    )
    parser.add_argument("--truncate", action="store_true", help="cut texts that are longer than the model takes")
    return parser


def _texts(own: argparse.Namespace) -> list[str]:
    if own.texts and own.input is not None:
        raise InvalidRequestError("give texts as arguments or --input, not both")
    if own.texts:
        return list(own.texts)
    try:
        content = sys.stdin.read() if own.input in (None, "-") else Path(own.input).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--input {own.input}: {error}") from error
    texts = [line for line in content.splitlines() if line.strip()]
    if not texts:
        raise InvalidRequestError("there is no text to embed")
    return texts


def _write(outputs: list[PoolingOutput], path: str | None) -> None:
    if path is not None and path.endswith(".npy"):
        import numpy as np

        np.save(path, np.array([output.embedding for output in outputs], dtype=np.float32))
        return
    lines = "".join(
        json.dumps({"text": output.prompt, "num_tokens": len(output.prompt_token_ids), "embedding": output.embedding})
        + "\n"
        for output in outputs
    )
    if path is None:
        sys.stdout.write(lines)
    else:
        Path(path).write_text(lines, encoding="utf-8")
