"""What this process may use of the machine, and the versions of what it runs on.

Cores respect the process's affinity and the container's CPU quota, memory the container's limit. Nothing heavy is imported;
GPUs are looked for, through torch, only when asked. `root` is the file system's root, another one in tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from pagoda.platform.cgroup import cpu_quota, memory_left, memory_limit
from pagoda.version import __version__

# Instruction sets that matter to matrix products and attention, as /proc/cpuinfo spells them (x86 and Arm).
INSTRUCTION_SETS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16"),
)
PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "msgspec"),
    *("fastapi", "httptools", "uvloop", "grpcio", "protobuf", "prometheus-client", "ray"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuReport:
    """`logical_cores` and `physical_cores` are those of the process's affinity; `quota`: the container's, in cores, or None.

    `usable_cores` is what a pool of compute threads should have: physical cores, no more than the quota, at least one.
    """

    name: str
    architecture: str
    logical_cores: int
    physical_cores: int
    quota: float | None
    usable_cores: int
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes: the machine's memory, the container's limit (None: no limit), and what can still be taken now."""

    total: int
    limit: int | None
    available: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """One GPU: memory in bytes; `capability` is CUDA's (major, minor)."""

    index: int
    name: str
    memory: int
    capability: tuple[int, int]


def cpu_report(root: Path = Path("/"), affinity: frozenset[int] | None = None) -> CpuReport:
    """The CPU and this process's share of it; `affinity`: logical cores, those of this process if None."""
    cores = _affinity() if affinity is None else affinity
    physical = len({_physical_core(root, core) for core in cores})
    quota = cpu_quota(root)
    fields = _first_cpu(root)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return CpuReport(
        name=fields.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        logical_cores=len(cores),
        physical_cores=physical,
        quota=quota,
        usable_cores=max(1, physical if quota is None else min(physical, int(quota))),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
    )


def first_logical_cores(root: Path = Path("/"), affinity: frozenset[int] | None = None) -> tuple[int, ...]:
    """Of each physical core in `affinity` (None: of this process) the logical core with the lowest number, ascending."""
    first: dict[str, int] = {}
    for core in sorted(_affinity() if affinity is None else affinity):
        first.setdefault(_physical_core(root, core), core)
    return tuple(first.values())


def memory_report(root: Path = Path("/")) -> MemoryReport:
    """Memory of the machine and the container now."""
    sizes = {}
    for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) * 1024
    left = memory_left(root)
    available = sizes.get("MemAvailable", sizes["MemFree"])
    return MemoryReport(
        total=sizes["MemTotal"],
        limit=memory_limit(root),
        available=available if left is None else min(available, left),
    )


def resident_bytes() -> int:
    """Memory that this process has now, without pages of files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def gpu_reports() -> tuple[GpuReport, ...]:
    """The CUDA GPUs that torch sees; imports torch."""
    import torch

    if not torch.cuda.is_available():
        return ()
    reports = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        reports.append(
            GpuReport(
                index=index,
                name=properties.name,
                memory=properties.total_memory,
                capability=(properties.major, properties.minor),
            )
        )
    return tuple(reports)


def may_have_gpu() -> bool:
    """Whether there is a device of NVIDIA's driver, without torch, which alone knows whether it can be used."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/dxg"))


def versions() -> dict[str, str | None]:
    """Versions of Pagoda, Python and every package that matters, None for one that is not installed; imports none of them."""
    found: dict[str, str | None] = {"pagoda": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _physical_core(root: Path, core: int) -> str:
    """A name of the physical core that logical core `core` is a thread of; its own where the kernel does not report it."""
    topology = root / f"sys/devices/system/cpu/cpu{core}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if (topology / name).is_file():
            return (topology / name).read_text(encoding="utf-8").strip()
    return str(core)


def _first_cpu(root: Path) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = root / "proc/cpuinfo"
    if not path.is_file():
        return {}
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            break
        fields[name.strip()] = value.strip()
    return fields
