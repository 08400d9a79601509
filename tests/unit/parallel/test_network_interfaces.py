"""Which interface the ranks talk over, and what is said about a name that cannot be used."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from pagoda.errors import ConfigError
from pagoda.parallel.interfaces import (
    choose_interface,
    choose_outward_interface,
    export_interface,
    nccl_selects,
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with a loopback, two networks, one of them with IPv6 only, an interface that is down and one without address."""
    addresses = {
        "lo": [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")],
        "eth0": [(socket.AF_INET, "10.1.0.5"), (socket.AF_INET6, "fe80::5%eth0"), (socket.AF_INET6, "fd00::5")],
        "ib0": [(socket.AF_INET6, "fd01::5")],
        "eth9": [(socket.AF_INET, "10.9.0.5")],
        "dummy0": [(socket.AF_INET6, "fe80::9%dummy0")],
    }
    entries = {
        name: [SimpleNamespace(family=family, address=address) for family, address in pairs]
        for name, pairs in addresses.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {n: SimpleNamespace(isup=n != "eth9") for n in addresses})


def route_from(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("pagoda.parallel.interfaces.source_address", lambda host: address)


def test_everything_on_one_machine_talks_over_the_loopback() -> None:
    chosen = choose_interface(environ={})
    assert (chosen.name, chosen.address) == ("lo", "127.0.0.1")


@pytest.mark.parametrize(("address", "name"), [("10.1.0.5", "eth0"), ("fd01::5", "ib0"), ("127.0.0.1", "lo")])
def test_without_a_name_the_route_to_the_head_decides(monkeypatch: pytest.MonkeyPatch, address: str, name: str) -> None:
    route_from(monkeypatch, address)
    chosen = choose_interface(route_to="head", environ={})
    assert (chosen.name, chosen.address) == (name, address)
    assert chosen.source == "on the route to head"


def test_the_setting_wins_over_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    route_from(monkeypatch, "10.1.0.5")
    assert choose_interface("ib0", "head", environ={}).address == "fd01::5"


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "^eth,lo"}, "ib0"),
        ({"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0"}, "eth0"),
    ],
)
def test_the_environment_is_respected_and_named_as_the_source(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], name: str
) -> None:
    route_from(monkeypatch, "127.0.0.1")
    before = dict(environ)
    chosen = choose_interface(route_to="head", environ=environ)
    assert chosen.name == name
    assert chosen.source == f"set by {next(iter(environ))}"
    export_interface(chosen, environ)
    assert environ | before == environ


@pytest.mark.parametrize(
    ("configured", "environ", "words"),
    [
        ("eth7", {}, "network_interface=eth7: there is no interface 'eth7'"),
        ("eth9", {}, "network_interface=eth9: the interface eth9 is down"),
        ("dummy0", {}, "network_interface=dummy0: the interface dummy0 has no address"),
        (None, {"GLOO_SOCKET_IFNAME": "eth7"}, "GLOO_SOCKET_IFNAME=eth7: there is no interface 'eth7'"),
        (None, {"NCCL_SOCKET_IFNAME": "ens"}, "NCCL_SOCKET_IFNAME=ens: selects no usable interface"),
        (None, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ens"}, "NCCL_SOCKET_IFNAME=ens: selects no"),
    ],
)
def test_a_name_that_cannot_be_used_lists_the_interfaces_that_exist(
    configured: str | None, environ: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_interface(configured, environ=environ)
    assert str(caught.value).startswith(words)
    assert "eth0 (10.1.0.5, fd00::5), ib0 (fd01::5), lo (127.0.0.1, ::1)" in str(caught.value)


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_a_setting_that_contradicts_the_environment_is_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"network_interface=eth0: contradicts {variable}=ib0"):
        choose_interface("eth0", environ={variable: "ib0"})


def test_a_setting_that_the_environment_confirms_is_taken() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth"}
    assert choose_interface("eth0", environ=environ).name == "eth0"


def test_an_unknown_head_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="there is no route to head: Name or service not known"):
        choose_interface(route_to="head", environ={})


def test_the_choice_is_exported_exactly_for_both_libraries() -> None:
    environ: dict[str, str] = {}
    export_interface(choose_interface("eth0", environ=environ), environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}


@pytest.mark.parametrize(
    ("value", "name", "selected"),
    [
        *(("eth", "eth0", True), ("eth", "ib0", False), ("=eth", "eth0", False), ("=eth0,ib0", "ib0", True)),
        *(("^docker,lo", "eth0", True), ("^docker,lo", "docker0", False), ("^=eth1", "eth10", True)),
    ],
)
def test_nccl_patterns(value: str, name: str, selected: bool) -> None:
    assert nccl_selects(value, name) is selected


def without_default_route(monkeypatch: pytest.MonkeyPatch, *, gone: tuple[str, ...]) -> None:
    def unreachable(host: str) -> str:
        raise ConfigError("there is no route")

    present = {name: entry for name, entry in psutil.net_if_addrs().items() if name not in gone}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: present)
    monkeypatch.setattr("pagoda.parallel.interfaces.source_address", unreachable)


def test_a_head_listens_on_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    route_from(monkeypatch, "10.1.0.5")
    assert str(choose_outward_interface(environ={})) == "eth0 (10.1.0.5), on the default route"
    assert choose_outward_interface("ib0", environ={}).name == "ib0"
    assert choose_outward_interface(environ={"GLOO_SOCKET_IFNAME": "ib0"}).name == "ib0"


@pytest.mark.parametrize(("gone", "name"), [(("ib0",), "eth0"), (("ib0", "eth0"), "lo")])
def test_without_a_default_route_a_head_listens_where_there_is_no_choice(
    monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...], name: str
) -> None:
    without_default_route(monkeypatch, gone=gone)
    assert choose_outward_interface(environ={}).name == name


def test_without_a_default_route_several_networks_need_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    without_default_route(monkeypatch, gone=())
    with pytest.raises(
        ConfigError, match=r"network_interface: there is no default route, so it must be set; .* has eth0"
    ):
        choose_outward_interface(environ={})
