"""`pagoda report`: a running server, or a result of `pagoda bench serve`, as one HTML file and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagoda.benchmarking.metrics import ServiceLevel
from pagoda.cli.parser import CommandParser
from pagoda.errors import ConfigError, InvalidRequestError
from pagoda.monitoring.local import is_local
from pagoda.monitoring.page import as_html
from pagoda.monitoring.report import of_bench, of_server
from pagoda.monitoring.server import Server, add_options
from pagoda.monitoring.steps import Machine


def run(arguments: Sequence[str]) -> int:
    """Write the files that were asked for; exit status 0."""
    parser = CommandParser(
        prog="pagoda report",
        description="Where a server's time and memory go, how near its steps come to what the machine can do, and what to "
        "change next.",
    )
    add_options(parser)
    parser.add_argument("--bench", type=Path, metavar="FILE", help="of `pagoda bench serve --json FILE`, and no server")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to watch the server; default: 10")
    parser.add_argument(
        "--slo", nargs="+", default=[], metavar="NAME:MS", help="service level: ttft:200 tpot:50 e2el:5000"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure what this machine can do at most, on all its cores for a second, before the server is watched",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--json", metavar="FILE", help="also as JSON; -: to the terminal, and no HTML")
    options = parser.parse_args(list(arguments))
    if not 0 < options.seconds <= 3600:
        parser.error("--seconds must be more than 0 and at most 3600")
    try:
        level = ServiceLevel.parse(options.slo)
    except InvalidRequestError as error:
        raise ConfigError(str(error).replace("--goodput", "--slo")) from None
    if options.bench is not None:
        report = of_bench(_read(options.bench), level)
    else:
        server = Server.of_options(options)
        report = of_server(server, options.seconds, level, _measured(server) if options.measure else None)
    text = json.dumps(report, indent=2)
    if options.json == "-":
        print(text)
        return 0
    if options.json is not None:
        _write(Path(options.json), text + "\n")
    _write(options.out, as_html(report))
    for one in [*report["causes"], *report["advice"]]:
        print(f"{one['severity'].upper()} {one['subject']}: {one['what']}")
    print(f"{options.out}: {len(report['advice'])} things to change, {len(report['causes'])} to mend")
    return 0


def _measured(server: Server) -> Machine:
    """What the machine does at most, with the server's threads and dtype. Raises `ConfigError` for another machine."""
    if not is_local(server.url):
        raise ConfigError("--measure needs the server's own machine: run it there, or leave it out")
    from pagoda.monitoring.machine import measure
    from pagoda.monitoring.server import look_closely

    found = look_closely(server)
    models = (found.server or {}).get("models") or [{}]
    limits = models[0].get("limits") or {}
    if limits.get("device") not in (None, "cpu"):
        raise ConfigError("--measure measures a CPU, and the model runs on a GPU: leave it out")
    threads = found.setting("threads")
    cores = ((found.info.get("system_env") or {}).get("cpu") or {}).get("usable_cores")
    return measure(limits.get("dtype") or "float32", threads if isinstance(threads, int) else cores)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--bench {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--bench {path} is no JSON object")
    return content


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
