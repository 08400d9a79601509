"""Which network interface the ranks of a model talk over.

In this order: the setting `network_interface`; `GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME`, where the environment gives them;
else the interface on the route to the head, or the loopback when everything runs on this machine. What is chosen is written
back to both variables by `export_interface`, once, before process groups are made: gloo and NCCL read them then.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import psutil

from pagoda.errors import ConfigError

GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
NCCL_VARIABLE = "NCCL_SOCKET_IFNAME"

_ELSEWHERE = "198.51.100.1"  # reserved for documentation: any address that is not of this network will do
_BACKLOG = 1024  # ranks may all connect at once
_ANY_PORT = 9  # nothing is sent: connecting a datagram socket only looks up the route


@dataclass(frozen=True, slots=True)
class NetworkInterface:
    """An interface of this host, and where the choice came from, for people."""

    name: str
    address: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" + (f", {self.source}" if self.source else "")


@dataclass(frozen=True, slots=True)
class HostInterface:
    """An interface as the host has it: its addresses without link-local ones, IPv4 first, and whether it is up."""

    name: str
    addresses: tuple[str, ...]
    is_up: bool

    def __str__(self) -> str:
        if not self.is_up:
            return f"{self.name} (down)"
        return f"{self.name} ({', '.join(self.addresses) or 'no address'})"


def listen_on(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on this IP address alone; port 0: at any free port. Raises `OSError` where that cannot be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=_BACKLOG)


def host_interfaces() -> list[HostInterface]:
    """Every interface of this host (network namespace), the usable ones first."""
    up = psutil.net_if_stats()
    found = [
        HostInterface(name, _addresses(entries), name in up and up[name].isup)
        for name, entries in psutil.net_if_addrs().items()
    ]
    return sorted(found, key=lambda item: (not (item.is_up and item.addresses), item.name == "lo", item.name))


def choose_interface(
    configured: str | None = None, route_to: str | None = None, environ: Mapping[str, str] | None = None
) -> NetworkInterface:
    """The interface for the traffic of the model.

    `configured`: the setting `network_interface`. `route_to`: name or address of the head, None when every rank runs on this
    machine. `environ`: the process's own if None.

    Raises:
        ConfigError: a name that no usable interface has, the setting contradicts the environment, or there is no route. The
            message lists the interfaces that exist.
    """
    variables = os.environ if environ is None else environ
    gloo, nccl = variables.get(GLOO_VARIABLE), variables.get(NCCL_VARIABLE)
    host = host_interfaces()
    if configured is not None:
        chosen = _named(host, configured, f"network_interface={configured}", "set by network_interface")
        if gloo is not None and configured not in gloo.split(","):
            raise _contradiction(configured, GLOO_VARIABLE, gloo)
        if nccl is not None and not nccl_selects(nccl, configured):
            raise _contradiction(configured, NCCL_VARIABLE, nccl)
        return chosen
    if gloo is not None:
        names = gloo.split(",")
        found = [_named(host, name, f"{GLOO_VARIABLE}={gloo}", f"set by {GLOO_VARIABLE}") for name in names]
        if nccl is not None:
            _selected_by_nccl(host, nccl)
        return found[0]
    route = _on_route(host, route_to)
    if nccl is None or nccl_selects(nccl, route.name):
        return route if nccl is None else NetworkInterface(route.name, route.address, f"set by {NCCL_VARIABLE}")
    return _selected_by_nccl(host, nccl)


def choose_outward_interface(
    configured: str | None = None, environ: Mapping[str, str] | None = None
) -> NetworkInterface:
    """The interface on which other machines, as yet unknown ones, reach this one: that of the default route, if nothing else
    is said. Without a default route it is the only one besides the loopback, and the loopback on a machine with no network.

    Raises:
        ConfigError: as `choose_interface`, and when there are several and nothing says which.
    """
    variables = os.environ if environ is None else environ
    if configured is not None or GLOO_VARIABLE in variables or NCCL_VARIABLE in variables:
        return choose_interface(configured, environ=variables)
    try:
        chosen = choose_interface(route_to=_ELSEWHERE, environ=variables)
        return NetworkInterface(chosen.name, chosen.address, "on the default route")
    except ConfigError:
        usable = [item for item in host_interfaces() if item.is_up and item.addresses]
    others = [item for item in usable if not any(map(_is_loopback, item.addresses))]
    if len(others) > 1:
        raise ConfigError(f"network_interface: there is no default route, so it must be set; {_existing(usable)}")
    if not others:
        return choose_interface(environ=variables)
    return NetworkInterface(others[0].name, others[0].addresses[0], "the only one with an address")


def export_interface(interface: NetworkInterface, environ: MutableMapping[str, str] | None = None) -> None:
    """Set gloo's and NCCL's interface; a variable that is set already was respected by the choice, and stays."""
    variables = os.environ if environ is None else environ
    variables.setdefault(GLOO_VARIABLE, interface.name)
    variables.setdefault(NCCL_VARIABLE, f"={interface.name}")


def nccl_selects(value: str, name: str) -> bool:
    """Whether `NCCL_SOCKET_IFNAME=value` admits the interface `name`: prefixes, `=` for exact names, `^` for all but these."""
    excluded = value.startswith("^")
    patterns = value.removeprefix("^")
    exact = patterns.startswith("=")
    words = patterns.removeprefix("=").split(",")
    matches = any(name == word if exact else name.startswith(word) for word in words if word)
    return matches != excluded


def _selected_by_nccl(host: list[HostInterface], value: str) -> NetworkInterface:
    for item in host:
        if item.is_up and item.addresses and nccl_selects(value, item.name):
            return NetworkInterface(item.name, item.addresses[0], f"set by {NCCL_VARIABLE}")
    raise ConfigError(f"{NCCL_VARIABLE}={value}: selects no usable interface; {_existing(host)}")


def _named(host: list[HostInterface], name: str, setting: str, source: str) -> NetworkInterface:
    for item in host:
        if item.name != name:
            continue
        if not item.is_up:
            raise ConfigError(f"{setting}: the interface {name} is down; {_existing(host)}")
        if not item.addresses:
            raise ConfigError(f"{setting}: the interface {name} has no address; {_existing(host)}")
        return NetworkInterface(name, item.addresses[0], source)
    raise ConfigError(f"{setting}: there is no interface {name!r}; {_existing(host)}")


def _on_route(host: list[HostInterface], route_to: str | None) -> NetworkInterface:
    """The interface whose address the kernel would send from to reach `route_to`; the loopback for None."""
    if route_to is None:
        for item in host:
            if item.is_up and any(_is_loopback(address) for address in item.addresses):
                return NetworkInterface(item.name, item.addresses[0], "everything runs on this machine")
        raise ConfigError(f"this host has no loopback interface; {_existing(host)}")
    address = source_address(route_to)
    for item in host:
        if address in item.addresses:
            return NetworkInterface(item.name, address, f"on the route to {route_to}")
    raise ConfigError(f"the route to {route_to} leaves from {address}, which no interface has; {_existing(host)}")


def source_address(host: str) -> str:
    """The address of this machine from which `host` is reached. Raises `ConfigError` for an unknown name or no route."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"there is no route to {host}: {error.strerror or error}; {_existing(host_interfaces())}"
        ) from error


def _contradiction(configured: str, variable: str, value: str) -> ConfigError:
    return ConfigError(
        f"network_interface={configured}: contradicts {variable}={value} in the environment of {socket.gethostname()}; "
        "drop one of the two"
    )


def _existing(host: list[HostInterface]) -> str:
    return f"{socket.gethostname()} has {', '.join(map(str, host)) or 'no interface'}"


def _addresses(entries: list[Any]) -> tuple[str, ...]:
    """IPv4 addresses, then IPv6 ones that are not link-local: those need a scope that other hosts do not know."""
    families = {
        family: [e.address for e in entries if e.family == family] for family in (socket.AF_INET, socket.AF_INET6)
    }
    return (*families[socket.AF_INET], *(a for a in families[socket.AF_INET6] if not a.lower().startswith("fe80")))


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
