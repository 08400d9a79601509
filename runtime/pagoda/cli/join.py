"""`pagoda join`: this machine as a worker node of a Ray cluster, for ranks of a model that is served elsewhere.

A worker pod runs this and nothing else; `pagoda probe startup|ready|live --rank` are its probes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pagoda.cli.parser import CommandParser, settings_names
from pagoda.config.command_line import parse_command_line
from pagoda.config.rules import raise_problems
from pagoda.config.sources import load
from pagoda.errors import CommunicationError, ConfigError

HEAD_LOST = 1


def run(arguments: Sequence[str]) -> int:
    """Belong to the cluster until SIGTERM (exit status 0), or until the head does not come back (1)."""
    from pagoda.distributed.private_directory import default_directory
    from pagoda.distributed.ray.node import RayNode
    from pagoda.distributed.ray.worker_node import WorkerNode
    from pagoda.logs import configure_logging
    from pagoda.process_control import become_subreaper

    line = parse_command_line(arguments)
    own = _parser().parse_args(line.others)
    raise_problems(line.problems)
    settings = [f"--{given.name}={given.raw}" for given in line.given]
    config = load([*settings, f"--config={line.config_file}"] if line.config_file else settings).config
    address = own.head or config.ray_address
    if address is None or address == "auto":
        raise ConfigError(
            "no Ray head is given: `pagoda join HOST:PORT`, or the setting ray_address (PAGODA_RAY_ADDRESS)"
        )
    configure_logging(config.log_level, config.log_format)
    node = WorkerNode(
        config, address, RayNode.of(config), own.state_directory or default_directory(), is_subreaper=True
    )
    become_subreaper()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.stop())
    try:
        node.run()
    except CommunicationError as error:
        print(f"pagoda join: {error}", file=sys.stderr)
        return HEAD_LOST
    return os.EX_OK


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="pagoda join",
        description="Make this machine a worker node of a Ray cluster. Takes the settings of `pagoda serve` too, of which "
        "network_interface, ray_address, ray_num_cpus, ray_first_port, rendezvous_timeout_seconds (how long to wait for the "
        "head) and those of logs count.",
        further=settings_names,
    )
    parser.add_argument("head", nargs="?", metavar="HOST[:PORT]", help="the head; default: the setting ray_address")
    parser.add_argument("--state-directory", type=Path, metavar="DIR", help="where the node's probes look")
    return parser
