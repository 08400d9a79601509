"""The `pagoda` command: dispatches to one module a subcommand, which is imported when it is called and not before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from pagoda import __version__
from pagoda.errors import PagodaError

# name: (module with `run(arguments) -> exit status`, what it does)
COMMANDS = {
    "serve": ("pagoda.cli.serve", "serve a model over REST, gRPC and OpenAI routes"),
    "generate": ("pagoda.cli.generate", "complete prompts offline"),
    "embed": ("pagoda.cli.embed", "make vectors of texts offline"),
    "chat": ("pagoda.cli.chat", "talk to a model in the terminal"),
    "bench": ("pagoda.cli.bench", "measure the engine, or a running server under load"),
    "join": ("pagoda.cli.join", "make this machine a worker node of the cluster that serves a model"),
    "doctor": ("pagoda.cli.doctor", "show hardware, versions, and every setting with its source"),
    "config": ("pagoda.cli.config", "get, set and compare the settings of a running server"),
    "trace": ("pagoda.cli.trace", "record the steps of a running server for ui.perfetto.dev"),
    "report": ("pagoda.cli.report", "measure a running server, and say what to change"),
    "why": ("pagoda.cli.why", "say why a server, model, rank or pod is not ready or slow"),
    "top": ("pagoda.cli.top", "show what a running server is at, live"),
    "probe": ("pagoda.cli.probe", "ask a server on this machine whether it is started, ready or live"),
    "deploy": ("pagoda.cli.deploy", "put a model into a Kubernetes cluster with KServe, and ask it"),
    "models": ("pagoda.cli.models", "inspect a checkpoint, or make one with random weights"),
}
USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (the process's own if None) and return the exit status.

    A `PagodaError` is printed without a traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version", "version"):
        print(f"pagoda {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _unknown(words[0])
    return run_command(importlib.import_module(COMMANDS[words[0]][0]).run, words[1:], f"pagoda {words[0]}")


def run_command(run: Callable[[Sequence[str]], int], arguments: Sequence[str], name: str) -> int:
    """The exit status of `run(arguments)`; a `PagodaError` is printed without a traceback, after the command's `name`."""
    try:
        return int(run(arguments))
    except PagodaError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130  # the shell's status of a command ended by Ctrl-C
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output closed it, as `head` does; exit without a message
        return 141


def usage() -> str:
    """The text of `pagoda --help`."""
    lines = ["usage: pagoda COMMAND [OPTIONS]", "", "Commands:"]
    lines += [f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join([*lines, "", "`pagoda COMMAND --help` says more; `pagoda serve --help` lists every setting."])


def _unknown(word: str) -> int:
    from pagoda.config.names import nearest

    what = "option" if word.startswith("-") else "command"
    hint = nearest(word, COMMANDS) or f"; commands are {', '.join(COMMANDS)}"
    print(f"pagoda: unknown {what} {word}{hint}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
