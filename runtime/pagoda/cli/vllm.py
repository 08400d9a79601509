"""The `vllm` command of an environment with Pagoda: what a manifest made for vLLM starts.

KServe's LLMInferenceService runs `vllm --version` and `vllm serve MODEL FLAGS…`, llm-d's charts too. The flags are those of
`pagoda serve`, see docs/vllm-flags.md; the defaults that a manifest relies on are vLLM's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from pagoda import __version__
from pagoda.cli import serve
from pagoda.cli.main import USAGE_ERROR, run_command
from pagoda.config.vllm_flags import VLLM_VERSION

_COUNTERPARTS = {"chat": "pagoda chat", "complete": "pagoda generate", "bench": "pagoda bench"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (the process's own if None) and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-v"], ["--version"]):
        # KServe's preset takes the last word for vLLM's version, and chooses flags by it.
        print(f"pagoda {__version__}, with the command line of vllm {VLLM_VERSION}")
        return 0
    if words[:1] == ["serve"]:
        return run_command(partial(serve.run, as_vllm=True), words[1:], "vllm serve")
    if not words or words[0] in ("-h", "--help"):
        print("usage: vllm serve MODEL [OPTIONS]\n\nThis is Pagoda; `pagoda --help` lists all of its commands.")
        return 0 if words else USAGE_ERROR
    counterpart = f": use `{_COUNTERPARTS[words[0]]}`" if words[0] in _COUNTERPARTS else ", which has `vllm serve`"
    print(f"vllm: {words[0]} is not a command of Pagoda{counterpart}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
