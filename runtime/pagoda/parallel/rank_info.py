"""The description of a rank, and what must be equal on all ranks of a model.

Every rank sends it once at rendezvous; the driver compares. Versions are read from the installed packages, and what
only torch knows (device, dtype, NCCL) is handed in.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.version import __version__

# Settings that do not affect what the ranks compute, or may differ from node to node.
_LOCAL_SETTINGS = frozenset(
    {
        "model",
        "threads",
        "network_interface",
        "host",
        "http_port",
        "grpc_port",
        "api_keys",
        "api_keys_file",
        "anonymous_scopes",
    }
)

_HASH_LENGTH = 12
_NUM_SAMPLES = 17
_SAMPLE_BYTES = 4096
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Identity, versions and device of one rank. `nccl` and `ray`: None where it uses none. `device`: `cpu` or `cuda`.

    `device_name`: for people. `memory_bytes`: the device's. `interface`, `address`: where its model traffic goes.
    """

    rank: int
    host: str
    pid: int
    pagoda: str
    python: str
    torch: str
    nccl: str | None
    ray: str | None
    model_hash: str
    configuration_hash: str
    dtype: str
    device: str
    device_name: str
    memory_bytes: int
    interface: str
    address: str

    @property
    def where(self) -> str:
        """The rank and its host, for people."""
        return f"rank {self.rank} on {self.host}"


# What must be equal on all ranks, its name in messages, and what to do about a difference.
_MUST_AGREE: tuple[tuple[str, str, str], ...] = (
    ("pagoda", "versions of Pagoda", "install the same image on every node"),
    ("python", "versions of Python", "install the same image on every node"),
    ("torch", "versions of torch", "install the same image on every node"),
    ("nccl", "versions of NCCL", "install the same image on every node"),
    ("ray", "versions of Ray", "install the same image on every node"),
    ("model_hash", "checkpoints (hash of config.json and the weights' index)", "put the same model on every node"),
    ("configuration_hash", "configurations (hash)", "start every rank with the same settings"),
    ("dtype", "dtypes", "set dtype to one that every node can run"),
    ("device", "kinds of device", "run all ranks on GPUs or all on CPUs"),
)


def describe_rank(
    config: PagodaConfig,
    *,
    rank: int,
    model_directory: Path,
    device: str,
    device_name: str,
    memory_bytes: int,
    dtype: str,
    nccl: str | None,
    uses_ray: bool,
    interface: str,
    address: str,
) -> RankInfo:
    """The `RankInfo` of the calling process."""
    return RankInfo(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        pagoda=__version__,
        python=python_series(),
        torch=installed_version("torch") or "not installed",
        nccl=nccl,
        ray=installed_version("ray") if uses_ray else None,
        model_hash=model_hash(model_directory),
        configuration_hash=configuration_hash(config),
        dtype=dtype,
        device=device,
        device_name=device_name,
        memory_bytes=memory_bytes,
        interface=interface,
        address=address,
    )


def find_mismatches(ranks: Sequence[RankInfo]) -> list[str]:
    """One sentence for each thing in which the ranks differ and must not; empty if they fit together."""
    sentences = [
        f"{what} differ: {_grouped(ranks, name)}; {remedy}"
        for name, what, remedy in _MUST_AGREE
        if len({getattr(item, name) for item in ranks}) > 1
    ]
    alone = [item for item in ranks if ipaddress.ip_address(item.address).is_loopback]
    if alone and len({item.host for item in ranks}) > 1:
        sentences.append(
            f"{alone[0].where} talks over {alone[0].interface} ({alone[0].address}), which no other host reaches; "
            "set network_interface"
        )
    return sentences


def rank_table(ranks: Sequence[RankInfo]) -> list[str]:
    """A line a rank, for the log."""
    return [
        f"{item.where} (pid {item.pid}): {item.device_name}, {item.memory_bytes / 2**30:.1f} GiB, "
        f"over {item.interface} ({item.address}), torch {item.torch}" + (f", NCCL {item.nccl}" if item.nccl else "")
        for item in ranks
    ]


def model_hash(directory: Path) -> str:
    """A hash of a checkpoint that costs a few reads: config.json, the weights' index, and name, size and samples of each file.

    The beginning of a safetensors file names every tensor with its type, shape and place; samples spread over the rest tell a
    model from its fine-tuned sister. Two that differ in less than that are taken for one: to see it, the whole would be read.
    """
    digest = hashlib.sha256()
    if directory.is_file():  # GGUF; of several shards the first, which holds the metadata
        files = [directory]
    else:
        names = [path.name for path in directory.iterdir() if path.suffix == ".safetensors"]
        files = [directory / name for name in sorted([*names, "config.json", "model.safetensors.index.json"])]
    for path in files:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        for part in [path.read_bytes()] if path.suffix == ".json" and size <= _MAX_JSON_BYTES else _samples(path):
            digest.update(part)
    return digest.hexdigest()[:_HASH_LENGTH]


def configuration_hash(config: PagodaConfig) -> str:
    """A hash of all settings that must be the same on every rank; secrets are no part of it."""
    fields = {name: value for name, value in asdict(config).items() if name not in _LOCAL_SETTINGS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=_plain).encode()).hexdigest()[:_HASH_LENGTH]


def python_series() -> str:
    """Major and minor version of Python: Ray and pickled code agree within one."""
    return ".".join(platform.python_version_tuple()[:2])


def installed_version(package: str) -> str | None:
    """The version of an installed package; None for one that is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _grouped(ranks: Sequence[RankInfo], name: str) -> str:
    """`2.13.0 on ranks 0 and 1 (host a), 2.12.0 on rank 2 (host b)`; the value of most ranks first."""
    groups: dict[Any, list[RankInfo]] = {}
    for item in ranks:
        groups.setdefault(getattr(item, name), []).append(item)
    in_order = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return ", ".join(f"{'none' if value is None else value} on {_ranks(members)}" for value, members in in_order)


def _ranks(members: Sequence[RankInfo]) -> str:
    numbers = [str(item.rank) for item in members]
    hosts = sorted({item.host for item in members})
    listed = numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
    return f"rank{'s' if len(numbers) > 1 else ''} {listed} ({', '.join(hosts)})"


def _samples(path: Path) -> Iterator[bytes]:
    """Bytes at the beginning of a file and at even distances through it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(_NUM_SAMPLES):
            file.seek(index * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)
