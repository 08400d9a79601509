"""`pagoda join`: this machine as a worker node of a Ray cluster, for ranks of a model that is served elsewhere.

A worker pod runs this and nothing else; `pagoda probe startup|ready|live --rank` are its probes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pagoda.config.checks import raise_problems
from pagoda.config.command_line import parse_command_line
from pagoda.config.hardware import cpu_report
from pagoda.config.sources import load
from pagoda.errors import CommunicationError, ConfigError

LOST = 1


def run(arguments: Sequence[str]) -> int:
    """Belong to the cluster until told to stop (exit status 0) or the head is lost for good (1)."""
    from pagoda.execution.ray_join import WorkerNode
    from pagoda.execution.ray_node import RayNode
    from pagoda.observability.logs import configure_logging
    from pagoda.parallel.node_state import default_directory

    line = parse_command_line(arguments)
    own = _parser().parse_args(line.others)
    raise_problems(line.problems)
    settings = [f"--{given.name}={given.raw}" for given in line.given]
    config = load([*settings, f"--config={line.config_file}"] if line.config_file else settings).config
    address = own.head or config.ray_address
    if address is None or address == "auto":
        raise ConfigError("which head? `pagoda join HOST:PORT`, or the setting ray_address (PAGODA_RAY_ADDRESS)")
    configure_logging(config.log_level, config.log_format)
    offer = RayNode(
        address="",
        num_cpus=cpu_report().usable_cores if own.num_cpus is None else own.num_cpus,
        num_gpus=own.num_gpus,
        node_manager_port=own.node_manager_port,
        object_manager_port=own.object_manager_port,
        worker_ports=own.worker_ports,
    )
    node = WorkerNode(config, address, offer, own.state_directory or default_directory())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.stop())
    try:
        node.run()
    except CommunicationError as error:
        print(f"pagoda join: {error}", file=sys.stderr)
        return LOST
    return os.EX_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pagoda join",
        description="Make this machine a worker node of a Ray cluster. Takes the settings of `pagoda serve` too, of which "
        "network_interface, ray_address, rendezvous_timeout_seconds (how long to wait for the head) and those of logs count.",
        allow_abbrev=False,
    )
    parser.add_argument("head", nargs="?", metavar="HOST[:PORT]", help="the head; default: the setting ray_address")
    parser.add_argument("--num-cpus", type=int, help="ranks that fit here without a GPU; default: the cores")
    parser.add_argument("--num-gpus", type=int, help="GPUs to offer; default: all")
    parser.add_argument("--node-manager-port", type=int, default=0, metavar="PORT", help="of Ray; 0: any free one")
    parser.add_argument("--object-manager-port", type=int, default=0, metavar="PORT", help="of Ray; 0: any free one")
    parser.add_argument("--worker-ports", type=_port_range, metavar="LOW-HIGH", help="of Ray's workers; default: Ray's")
    parser.add_argument("--state-directory", type=Path, metavar="DIR", help="where the node's probes look")
    return parser


def _port_range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (dash and low.isdigit() and high.isdigit() and 1024 <= int(low) <= int(high) < 65536):
        raise argparse.ArgumentTypeError(f"{text}: must be LOW-HIGH, of ports from 1024 to 65535")
    return int(low), int(high)
