"""Compiling the C++ kernels: once, when Pagoda is installed or when they are first needed.

    python -m pagoda_kernels.cpu.build        build into the package; `make install` and the image do this

A library is found by its key, a hash of the sources, the flags and torch's version: in the package first, then in the cache.
One that is not found is compiled into the cache, by one process at a time, and appears there whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
PACKAGE_LIBRARIES = Path(__file__).parent / "_compiled"

# No -march=native: a library may be built on one machine and run on another. Contraction is off since the compiler would fuse
# a product and a sum in one instance of a template and not in another, and results must not depend on the batch.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_VNNI = (*_AVX512, "-mavx512vnni")
_BF16 = (*_VNNI, "-mavx512bf16", "-DPAGODA_BF16_DOT")


@dataclass(frozen=True, slots=True)
class Unit:
    """One run of the compiler: `source` in namespace `isa`, or with torch's headers where `isa` is empty."""

    source: str
    isa: str = ""
    flags: tuple[str, ...] = ()


# Longest first, so that they do not end last.
UNITS = (
    Unit("operators.cpp"),
    Unit("decoder.cpp"),
    Unit("encoder.cpp"),
    Unit("experts.cpp"),
    Unit("lora.cpp"),
    Unit("step.cpp"),
    Unit("rank_counts.cpp"),
    Unit("attention.cpp", "avx512", _AVX512),
    Unit("attention.cpp", "avx512_bf16", _BF16),
    Unit("attention.cpp", "avx2", _AVX2),
    Unit("linear.cpp", "avx512_bf16", _BF16),
    Unit("linear.cpp", "avx512", _AVX512),
    Unit("linear.cpp", "avx2", _AVX2),
    Unit("linear_quantized.cpp", "avx512", _AVX512),
    Unit("linear_quantized.cpp", "avx512_vnni", _VNNI),
    Unit("linear_quantized.cpp", "avx2", _AVX2),
    Unit("encoder_kernels.cpp", "avx512", _AVX512),
    Unit("encoder_kernels.cpp", "avx2", _AVX2),
    Unit("lora_kernels.cpp", "avx512", _AVX512),
    Unit("lora_kernels.cpp", "avx2", _AVX2),
    Unit("elementwise.cpp", "avx512", _AVX512),
    Unit("elementwise.cpp", "avx2", _AVX2),
    Unit("delta_net.cpp", "avx512", _AVX512),
    Unit("delta_net.cpp", "avx2", _AVX2),
    Unit("dispatch.cpp"),
)


class BuildError(Exception):
    """The library is missing and cannot be built here; the message names the cause."""


def library(emulate_bf16: bool = False) -> Path:
    """The compiled library for this torch: the package's, the cache's, or one built now.

    `emulate_bf16`: bfloat16 products written out in AVX-512, to test their code where the processor has none.

    Raises `BuildError` where there is none and no compiler, or the compiler fails.
    """
    name = _library_name(emulate_bf16)
    if (PACKAGE_LIBRARIES / name).exists():
        return PACKAGE_LIBRARIES / name
    compiler = _compiler()
    directory = _cache_directory()
    target = directory / f"{hashlib.sha256(_version_of(compiler).encode()).hexdigest()[:8]}-{name}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(compiler, target, emulate_bf16)
    return target


def build_into_package() -> Path:
    """Build into the package's own directory unless it is there already. Raises `BuildError`."""
    target = PACKAGE_LIBRARIES / _library_name(False)
    if target.exists():
        return target
    compiler = _compiler()
    try:
        PACKAGE_LIBRARIES.mkdir(exist_ok=True)
    except OSError as error:
        raise BuildError(f"{PACKAGE_LIBRARIES} cannot be made: {error}") from error
    for old in PACKAGE_LIBRARIES.glob("pagoda_cpu-*.so"):
        old.unlink()
    _build(compiler, target, False)
    return target


def _library_name(emulate_bf16: bool) -> str:
    """The file name, with the key in it."""
    digest = hashlib.sha256(repr((FLAGS, UNITS, emulate_bf16, torch.__version__, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"pagoda_cpu-{digest.hexdigest()[:16]}.so"


def _compiler() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the kernels are written for x86-64, this machine is {platform.machine()}")
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(f"there is no C++ compiler ({asked or 'g++, c++ or clang++'})")


def _version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _cache_directory() -> Path:
    """The first of the user's cache and a private directory for temporary files that can be written."""
    cache = os.environ.get("XDG_CACHE_HOME")
    homes = [Path(cache)] if cache else []
    if "HOME" in os.environ:
        homes.append(Path(os.environ["HOME"]) / ".cache")
    private = Path(tempfile.gettempdir()) / f"pagoda-{os.getuid()}"
    problems = []
    for directory in (*(home / "pagoda" / "kernels" for home in homes), private):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            # What is loaded from here runs as this user, so no other user may be able to write it.
            if directory.stat().st_uid != os.getuid() or directory.stat().st_mode & 0o022:
                raise PermissionError(f"{directory} can be written by others")
            with tempfile.TemporaryFile(dir=directory):
                return directory
        except OSError as error:
            problems.append(str(error))
    raise BuildError(f"there is no directory for the compiled kernels: {'; '.join(problems)}")


def _build(compiler: str, target: Path, emulate_bf16: bool) -> None:
    started = time.monotonic()
    logger.info("compiling the CPU kernels with %s, about a minute", compiler)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{index}.o" for index in range(len(UNITS))]
        extra = ("-DPAGODA_EMULATE_BF16_DOT",) if emulate_bf16 else ()
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            commands = [
                [compiler, *FLAGS, *extra, *_own_flags(unit), "-c", str(SOURCES / unit.source), "-o", str(path)]
                for unit, path in zip(UNITS, objects, strict=True)
            ]
            for done in pool.map(_run, commands):
                del done
        linked = Path(scratch) / target.name
        torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        shared = [compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(linked)]
        _run([*shared, torch_libraries, "-lc10", "-ltorch_cpu", "-ltorch"])
        linked.replace(target)
    logger.info("compiled the CPU kernels in %.0f s: %s", time.monotonic() - started, target)


def _own_flags(unit: Unit) -> tuple[str, ...]:
    if unit.isa:
        # GCC's own intrinsics read what they call undefined, and it warns of that.
        return (*unit.flags, f"-DPAGODA_ISA={unit.isa}")
    include = Path(torch.__file__).parent / "include"
    return (f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-D_GLIBCXX_USE_CXX11_ABI={_cxx11_abi()}")


def _cxx11_abi() -> int:
    return int(torch._C._GLIBCXX_USE_CXX11_ABI)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-500:])
        raise BuildError(f"{' '.join(command[:1])} failed: {first}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        build_into_package()
    except BuildError as error:
        logger.warning("the CPU kernels were not built, the slower torch ones will be used: %s", error)
