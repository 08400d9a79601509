"""What `pagoda doctor` says of what is open: who may call the server, and who may run code in the Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig


def examine_security(config: PagodaConfig) -> dict[str, Any]:
    """`server` and `ray` (None without ranks on Ray): a sentence each; `warnings`: what others could use.

    Raises `ConfigError` for a file of API keys, or a token of Ray, that cannot be used.
    """
    warnings: list[str] = []
    report: dict[str, Any] = {"server": _server(config, warnings), "ray": None, "warnings": warnings}
    if config.ray_address is not None or config.distributed_executor_backend == "ray":
        report["ray"] = _ray(config, warnings)
    return report


def security_as_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"  server  {report['server']}"]
    lines += [f"  ray     {report['ray']}"] if report["ray"] else []
    return [*lines, *(f"  WARNING {warning}" for warning in report["warnings"])]


def _server(config: PagodaConfig, warnings: list[str]) -> str:
    tls = "TLS" if config.ssl_certfile else "no TLS"
    where = f"{config.host}, ports {config.http_port} (REST) and {config.grpc_port} (gRPC), {tls}"
    if not config.api_keys and config.api_keys_file is None:
        warnings.append("no API keys: whoever reaches the ports may do everything; set api_keys_file or api_keys")
        return f"{where}, open to everybody"
    num_keys = len(config.api_keys)
    if config.api_keys_file is not None:
        from pagoda.serving.auth.key_files import parse_contents, read_contents

        path = Path(config.api_keys_file)
        num_keys += len(parse_contents(path, read_contents(path)))
    if config.anonymous_scopes:
        warnings.append(f"anonymous_scopes: without a key there is {', '.join(config.anonymous_scopes)}")
    return f"{where}, {num_keys} API keys"


def _ray(config: PagodaConfig, warnings: list[str]) -> str:
    from pagoda.distributed.ray.authentication import RayAuthentication
    from pagoda.distributed.ray.open_ports import open_ports

    found = RayAuthentication.of_member(os.environ)
    listening = open_ports()
    ports = ", ".join(map(str, listening)) or f"no process of Ray runs here; it will listen on {_planned_ports(config)}"
    if any(port.is_beyond("127.0.0.1") for port in listening) or not listening:
        warnings.append(
            "Ray binds its ports to all interfaces, whatever address it is given. The token keeps others from running code, "
            "not from connecting: let a firewall or a NetworkPolicy (the chart's does) admit the machines of the cluster only"
        )
    if found.has_token:
        return f"{found}; {ports}"
    if config.ray_address is None and not found.is_disabled:
        return f"a token will be made for the head that is started here; {ports}"
    warnings.append(f"Ray: {found}")
    return ports


def _planned_ports(config: PagodaConfig) -> str:
    """Those of a head or node that these settings start."""
    from pagoda.distributed.ray.node import HEAD_PORT, NUM_PORTS

    first = config.ray_first_port
    others = (
        "ports that the kernel chooses (ray_first_port)" if first is None else f"{first} to {first + NUM_PORTS - 1}"
    )
    return f"{HEAD_PORT} (head) and {others}"
