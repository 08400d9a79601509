"""`pagoda serve`: the server, with every setting as an option."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.process_control import uncollected

HEAD = """usage: {command} [DIR|HF-ID] [OPTIONS]

Serves a model over REST, gRPC and OpenAI routes. Settings come from the command line, then from the file that --config names
(YAML or JSON), then from the environment (--max-model-len is PAGODA_MAX_MODEL_LEN), then from the defaults below. Dashes and
underscores are the same; sizes may be written 512MiB or 2GiB; `pagoda doctor` shows what is in effect and why. The flags of
`vllm serve` are taken, too: docs/vllm-flags.md says what becomes of each.

  --config FILE
          Settings in a file. Also: PAGODA_CONFIG
"""


def run(arguments: Sequence[str], *, as_vllm: bool = False) -> int:
    """Serve until SIGTERM; the exit status is the server's. `as_vllm`: with the defaults of `vllm serve`."""
    if "-h" in arguments or "--help" in arguments:
        from pagoda.config.command_line import options_help

        print(HEAD.format(command="vllm serve" if as_vllm else "pagoda serve"))
        print(options_help(), end="")
        return 0
    from pagoda.engine.client.prelaunch import PrelaunchedProcess

    # First of all: the core's own imports take longer than everything that this process has to do.
    with PrelaunchedProcess() as core:
        with uncollected():
            from pagoda.config.sources import LoadedConfig, load, load_as_vllm

            def read() -> LoadedConfig:
                return load_as_vllm(arguments) if as_vllm else load(arguments, vllm=True)

            loaded = read()
            from pagoda.serving.server import run as run_server
        return int(run_server(loaded, core, read) or 0)
