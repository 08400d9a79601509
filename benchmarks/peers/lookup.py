"""Drafts by look-up in a text that is mostly repeated: Pagoda and llama.cpp on one GGUF file, each with and without, in turn.

    python benchmarks/peers/lookup.py MODEL.gguf [--rounds 3] [--tokens 300] [--method ngram]

The prompts are those of row edit-1 of `benchmarks/speculation.py`: a text of 600 tokens, the same with five changes, and
its beginning once more. Greedy, one request at a time, time from the first token to the last. llama.cpp (`make peers
PEERS=llamacpp`) drafts with `LlamaPromptLookupDecoding`, as many tokens as `--peer-drafts` says; the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONTEXT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", default="ngram")
    parser.add_argument("--peer-drafts", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer:
        answer_as_peer(options)
    else:
        compare(options)


def answer_as_peer(options: argparse.Namespace) -> None:
    """In llama.cpp's environment: of each line, prompts and a number of drafts, the tokens and seconds of the answer."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    def load(num_drafts: int) -> Any:
        drafting = LlamaPromptLookupDecoding(num_pred_tokens=num_drafts) if num_drafts else None
        return Llama(
            str(options.model),
            n_ctx=CONTEXT,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            draft_model=drafting,
            logits_all=bool(num_drafts),
            verbose=False,
        )

    models = {num_drafts: load(num_drafts) for num_drafts in (0, *options.peer_drafts)}
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, num_drafts = json.loads(line)
        tokens, started = [], 0.0
        for token in models[num_drafts].generate(prompt, temp=0.0, reset=True):
            tokens.append(token)
            if len(tokens) == 1:
                started = time.perf_counter()
            elif len(tokens) == options.tokens:
                break
        print(json.dumps([tokens, time.perf_counter() - started]), flush=True)


def compare(options: argparse.Namespace) -> None:
    sys.path.insert(0, str(HERE.parent))
    from speculation import edits, run

    from pagoda.config.schema import PagodaConfig
    from pagoda.engine.core.startup import start_core
    from pagoda.platform.hardware import cpu_report
    from pagoda.text.tokenizer import Tokenizer

    python = HERE.parents[1] / ".peers" / "llamacpp" / "bin" / "python"
    drafts = list(map(str, options.peer_drafts))
    command = [str(python), __file__, str(options.model), "--as-peer", "--tokens", str(options.tokens)]
    command += ["--threads", str(options.threads), "--peer-drafts", *drafts]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    assert peer.stdout is not None
    settings = {
        "model": str(options.model),
        "device": "cpu",
        "dtype": "bfloat16",
        "threads": options.threads,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 1024,
        "max_model_len": CONTEXT,
    }
    plain = start_core(PagodaConfig(**settings))
    speculating = start_core(PagodaConfig(**settings, speculative_config={"method": options.method}))
    tokenizer = Tokenizer.from_directory(options.model)
    if peer.stdout.readline().strip() != "ready":
        raise SystemExit("llama.cpp does not start: `make peers PEERS=llamacpp` installs it")
    print(f"{cpu_report().name}; {options.threads} threads; tokens a second", flush=True)
    rows: list[dict[str, float]] = []
    for number in range(-1, options.rounds):
        (prompt,) = edits(tokenizer, 1, number)
        rates: dict[str, float] = {}
        for name, core in (("plain", plain), (options.method, speculating)):
            found = run(core, [[prompt]], options.tokens, None)
            rates[f"Pagoda {name}"] = found.num_tokens / found.wall_seconds
        for num_drafts in (0, *options.peer_drafts):
            print(json.dumps([prompt, num_drafts]), file=peer.stdin, flush=True)
            tokens, seconds = json.loads(peer.stdout.readline())
            rates[f"llama.cpp {num_drafts or 'plain'}"] = (len(tokens) - 1) / seconds
        if number >= 0:
            rows.append(rates)
            print(
                "  " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()),
                flush=True,
            )
    peer.stdin.close()
    peer.wait()
    best = [max(rates[f"llama.cpp {num_drafts}"] for num_drafts in options.peer_drafts) for rates in rows]
    own = [rates[f"Pagoda {options.method}"] for rates in rows]
    without = [rates["Pagoda plain"] for rates in rows]
    print(f"Pagoda with to without: {ratio(own, without)}; with to llama.cpp with: {ratio(own, best)}")
    for core in (plain, speculating):
        core.shutdown()


def ratio(upper: list[float], lower: list[float]) -> str:
    ratios = [one / other for one, other in zip(upper, lower, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
