"""Compiling kernels ahead of time, without a GPU, and reading from the machine code what they need of one.

    python -m pagoda_kernels.gpu.compilation --arch 90 [--match EXPRESSION …] [--json FILE]

prints registers, spills and shared memory of every tuned configuration.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pagoda_kernels.gpu.kernel_list import KernelBuild, tuned_builds
from pagoda_kernels.gpu.machine_code import resource_usage

# Bytes of shared memory that one program may have, by compute capability (CUDA C++ Programming Guide, technical
# specifications per compute capability).
SHARED_MEMORY_LIMIT = {75: 64 << 10, 80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
WARP_SIZE = 32
REGISTERS_PER_MULTIPROCESSOR = 1 << 16


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel needs: registers a thread, bytes of stack (spills) a thread, bytes of shared memory.

    `is_decode`: it runs in decode steps, which are many and short. `copies_under_way`: groups of asynchronous copies to shared
    memory that its loop does not wait for when it takes what the earliest one brought; 0 exposes memory's whole latency.
    """

    kernel: str
    arch: int
    is_decode: bool
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    uses_wgmma: bool
    copies_under_way: int

    @property
    def programs_per_multiprocessor(self) -> int:
        """Occupancy: programs per multiprocessor, as registers and shared memory allow."""
        registers = -(-self.registers // 8) * 8 * WARP_SIZE * self.num_warps
        by_registers = REGISTERS_PER_MULTIPROCESSOR // registers
        return min(by_registers, (SHARED_MEMORY_LIMIT[self.arch] + 1024) // (self.shared_bytes + 1024))


def compile_kernel(build: KernelBuild, arch: int) -> Resources:
    """Compile for compute capability `arch` (80 for 8.0) and read the resources back. Raises what the compiler raises."""
    signature, constants, attributes = _specialization(build)
    source = ASTSource(build.kernel, signature, constants, attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    return Resources(
        kernel=build.name,
        arch=arch,
        is_decode=build.is_decode,
        num_warps=build.num_warps,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        uses_wgmma="wgmma.mma_async" in compiled.asm["ptx"],
        copies_under_way=max(map(int, re.findall(r"async_wait .*num = (\d+)", compiled.asm["ttgir"])), default=0),
    )


def _specialization(build: KernelBuild) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignment of the arguments, as a launch with aligned tensors would find them."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    unaligned = {param.name for param in build.kernel.params if param.do_not_specialize_on_alignment}
    for index, name in enumerate(build.kernel.arg_names):
        signature[name] = "constexpr" if name in build.constants else build.types[name]
        aligned = signature[name].startswith("*") or name in build.aligned_integers
        if aligned and name not in unaligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, dict(build.constants), attributes


def compile_all(arch: int, matches: Sequence[str] = ("",)) -> Iterator[Resources]:
    """Every tuned configuration for `arch` in whose name one of the regular expressions is found, one after the other."""
    for build in tuned_builds(arch):
        if any(re.search(match, build.name) for match in matches):
            yield compile_kernel(build, arch)


def main() -> None:
    """Compile and print a table."""
    parser = argparse.ArgumentParser(description="Compile every tuned kernel and print what it needs of a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_MEMORY_LIMIT))
    parser.add_argument(
        "--match", nargs="+", default=[""], help="only kernels in whose name one of these regular expressions is found"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    own = parser.parse_args()
    found = []
    print(f"{'kernel':<72} {'arch':>4} {'regs':>5} {'stack':>6} {'shared':>7} {'programs':>9} wgmma")
    for arch in own.arch:
        for used in compile_all(arch, own.match):
            found.append(asdict(used))
            print(
                f"{used.kernel:<72} {arch:>4} {used.registers:>5} {used.stack_bytes:>6} {used.shared_bytes:>7} "
                f"{used.programs_per_multiprocessor:>9} {'yes' if used.uses_wgmma else ''}",
                flush=True,
            )
    if own.json:
        own.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
