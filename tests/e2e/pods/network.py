"""The cluster's network on one machine: a bridge for the pods, a name service, and addresses for Services.

Endpoints follow readiness with a delay, as in a cluster, where the news of a pod that goes travels to every node: until then
new connections still reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import re
import socket
import struct
import time
from typing import TYPE_CHECKING

from tests.e2e.pods.objects import Object, selects
from tests.e2e.pods.podman import podman, run

if TYPE_CHECKING:
    from tests.e2e.pods.cluster import Cluster
    from tests.e2e.pods.pod import Pod

NAME_ERROR = 3
ADDRESS_RECORD = 1
_IP_FREEBIND = 15  # bind before the bridge has its address, which is when its first pod starts


class Network:
    """A bridge with a subnet of its own; use `open` and `close`."""

    def __init__(self, cluster: Cluster, name: str, number: int) -> None:
        self.name = name
        self.gateway = f"10.77.{number}.1"
        self._cluster = cluster
        self._subnet = f"10.77.{number}.0/24"
        self._addresses = itertools.count(10)
        self._number = number
        self._service_addresses: dict[str, str] = {}
        self._others: dict[str, int] = {}
        self.creating = asyncio.Lock()  # podman loses sight of networks when it makes pods and networks side by side
        self._servers: list[asyncio.Server | asyncio.DatagramTransport] = []
        self._turns = itertools.count()

    def new_address(self) -> str:
        """An address for a pod."""
        return str(ipaddress.ip_network(self._subnet)[next(self._addresses)])

    async def attachments(self, address: str, others: list[str]) -> list[str]:
        """podman's arguments for a pod at `address`: `eth0` here and, as Multus does it, `net1`, `net2` on other networks."""
        words = [f"--network={self.name}:ip={address},interface_name=eth0"]
        for position, other in enumerate(others, start=1):
            if other not in self._others:
                self._others[other] = number = len(self._others)
                subnet = f"10.{78 + number}.{self._number}.0/24"
                await podman(
                    "network", "create", "--disable-dns", "--internal", f"--subnet={subnet}", self._other(other)
                )
            host = address.rpartition(".")[2]
            own = f"10.{78 + self._others[other]}.{self._number}.{host}"
            words.append(f"--network={self._other(other)}:ip={own},interface_name=net{position}")
        return words

    def _other(self, name: str) -> str:
        return f"{self.name}-{name}"

    async def open(self) -> None:
        await run("podman", "network", "rm", "--force", self.name)
        create = ("network", "create", "--disable-dns", "--subnet", self._subnet, "--gateway", self.gateway)
        await podman(*create, self.name)
        name_socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        name_socket.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        name_socket.bind((self.gateway, 53))
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _NameService(self), sock=name_socket)
        self._servers.append(transport)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for address in self._service_addresses.values():
            await run("ip", "address", "del", f"{address}/32", "dev", "lo")
        for name in (*map(self._other, self._others), self.name):
            await run("podman", "network", "rm", "--force", name)

    async def add_service(self, service: Object) -> None:
        """Give a Service its address, and forward its ports; a headless one has names only."""
        name = service["metadata"]["name"]
        if service["spec"].get("clusterIP") == "None" or name in self._service_addresses:
            return
        address = f"10.96.{self._number}.{10 + len(self._service_addresses)}"
        self._service_addresses[name] = address
        await run("ip", "address", "add", f"{address}/32", "dev", "lo")
        for port in service["spec"]["ports"]:
            forward = _Forward(self, name, port.get("targetPort", port["port"]))
            self._servers.append(await asyncio.start_server(forward.accept, address, port["port"]))

    def service_address(self, name: str) -> str:
        """The ClusterIP of a Service."""
        return self._service_addresses[name]

    def endpoints(self, name: str) -> list[Pod]:
        """The pods that a Service means now."""
        spec = self._cluster.objects.get("Service", name)["spec"]
        pods = [pod for pod in self._cluster.pods.values() if selects(spec.get("selector", {}), pod.labels)]
        return [pod for pod in pods if spec.get("publishNotReadyAddresses") or self._is_endpoint(pod)]

    def _is_endpoint(self, pod: Pod) -> bool:
        if pod.is_ready:
            return True
        return pod.withdrawn_at is not None and time.monotonic() - pod.withdrawn_at < self._cluster.endpoint_delay

    def resolve(self, name: str) -> list[str] | None:
        """Addresses of a name; None if there is no such name."""
        domain = re.escape(f"{self._cluster.namespace}.svc.cluster.local")
        match = re.fullmatch(rf"(?:([^.]+)\.)?([^.]+)\.{domain}", name.lower().rstrip("."))
        services = {document["metadata"]["name"] for document in self._cluster.objects.of_kind("Service")}
        if match is None or match[2] not in services:
            return None
        host, service = match[1], match[2]
        if service in self._service_addresses:
            return None if host else [self._service_addresses[service]]
        pods = [pod for pod in self.endpoints(service) if host is None or (pod.name, pod.service) == (host, service)]
        return [pod.address for pod in pods] or None

    def next_endpoint(self, name: str) -> Pod | None:
        """The pods of a Service in turn."""
        pods = self.endpoints(name)
        return pods[next(self._turns) % len(pods)] if pods else None


class _NameService(asyncio.DatagramProtocol):
    """Answers A questions about names of the cluster; it knows no others. RFC 1035."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        labels, end = [], 12
        while data[end]:
            labels.append(data[end + 1 : end + 1 + data[end]].decode())
            end += data[end] + 1
        (kind,) = struct.unpack("!H", data[end + 1 : end + 3])
        addresses = self._network.resolve(".".join(labels))
        answers = addresses if addresses and kind == ADDRESS_RECORD else []
        flags = 0x8580 | (NAME_ERROR if addresses is None else 0)
        reply = data[:2] + struct.pack("!5H", flags, 1, len(answers), 0, 0) + data[12 : end + 5]
        for answer in answers:
            reply += struct.pack("!HHHIH", 0xC00C, ADDRESS_RECORD, 1, 5, 4) + socket.inet_aton(answer)
        self._transport.sendto(reply, address)


class _Forward:
    """One port of a Service: each connection goes to one endpoint, and stays there, as with kube-proxy."""

    def __init__(self, network: Network, service: str, target: int | str) -> None:
        self._network = network
        self._service = service
        self._target = target

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pod = self._network.next_endpoint(self._service)
        try:
            if pod is None:
                raise ConnectionRefusedError("no endpoints")
            pod_reader, pod_writer = await asyncio.open_connection(pod.address, self._port(pod))
        except OSError:
            writer.transport.abort()
            return
        ways = (_copy(reader, pod_writer), _copy(pod_reader, writer))
        try:
            await asyncio.gather(*ways)
        finally:
            pod_writer.close()
            writer.close()

    def _port(self, pod: Pod) -> int:
        if isinstance(self._target, int):
            return self._target
        ports = [port for spec in pod.spec["containers"] for port in spec.get("ports", [])]
        return next(port["containerPort"] for port in ports if port.get("name") == self._target)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end; a broken connection breaks the other half too."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        with contextlib.suppress(OSError):
            writer.transport.abort()
