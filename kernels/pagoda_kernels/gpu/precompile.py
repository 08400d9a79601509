"""Compiling kernels before they are launched: several at a time, in processes of their own, into Triton's cache.

What is to be compiled follows from the launches themselves. Inside `recorded_launches`, the functions that launch kernels are
called with tensors of the device `meta`, which have types and strides and no memory; nothing runs, and what each launch would
have wanted compiled is written down. A launch with real tensors of the same types and strides wants just that, and finds it.

    with recorded_launches() as wanted:
        model(…)                                   # on meta
    with KernelPrecompiler(wanted, processes=8) as compiling:
        …                                          # weights are loaded meanwhile
        compiling.wait()

Processes and not threads: more than half of a compilation is Python, which holds the interpreter's lock. They import Triton
and not torch, which takes longer than a kernel:

    python -m pagoda_kernels.gpu.precompile        a JSON object a line: what to compile on stdin, what came of it on stdout
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pagoda_kernels.gpu.machine_code import resource_usage

# Their compilation takes longest, so each process begins with one of them.
_LONGEST = "paged_attention_kernel"


@dataclass(frozen=True, slots=True)
class Specialization:
    """A kernel, by module and name, for arguments of certain types: `data`: Triton's own description of them.

    `target` is the backend, compute capability and warp size of the GPU; `is_cached`, that Triton's cache had it when it was
    recorded.
    """

    module: str
    name: str
    data: str
    target: tuple[str, int, int]
    is_cached: bool


@dataclass(frozen=True, slots=True)
class Compiled:
    """The result of a specialization: the kernel's resource usage, or the compiler's error.

    Registers and bytes of stack (spills) a thread, bytes of shared memory a program.
    """

    name: str
    seconds: float
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""


@contextmanager
def recorded_launches() -> Iterator[list[Specialization]]:
    """Nothing is launched or compiled meanwhile, by any thread; the list holds what launches wanted, each once.

    A kernel that this process has compiled already is not in it.
    """
    found: dict[str, Specialization] = {}
    run, hook = JITFunction.run, triton.knobs.runtime.jit_cache_hook

    def only_specialize(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *arguments, grid=grid, warmup=True, **options)

    def take(*, key: str, fn: Any, compile: Mapping[str, Any], **rest: Any) -> bool:
        name = f"{fn.module}:{fn.name}:{key}"
        if name not in found:
            found[name] = _recorded(fn, compile)
        return True  # then Triton does not compile

    wanted: list[Specialization] = []
    JITFunction.run, triton.knobs.runtime.jit_cache_hook = only_specialize, take
    try:
        yield wanted
    finally:
        JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, hook
        wanted.extend(found.values())


def _recorded(kernel: Any, compilation: Mapping[str, Any]) -> Specialization:
    data = compilation["specialization_data"]
    target = driver.active.get_current_target()
    source = ASTSource(
        kernel.jit_function, compilation["signature"], compilation["constants"], compilation["configs"][0]
    )
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options(_options(data))
    environment = triton._C.libtriton.get_cache_invalidating_env_vars()
    # Named as `triton.compile` names it.
    entry = hashlib.sha256(get_cache_key(source, backend, options, env_vars=environment).encode()).hexdigest()
    is_cached = get_cache_manager(entry).get_group(f"{source.name[:150]}.json") is not None
    return Specialization(kernel.module, kernel.name, data, (target.backend, target.arch, target.warp_size), is_cached)


def _options(data: str) -> dict[str, Any]:
    """The options of a specialization; JSON has made lists of tuples."""
    options = json.loads(data)["options"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


class KernelPrecompiler:
    """Processes that compile, from construction on. As a context: what still compiles at its end is killed."""

    def __init__(self, wanted: Sequence[Specialization], *, processes: int) -> None:
        missing = sorted((one for one in wanted if not one.is_cached), key=lambda one: (one.name != _LONGEST, one.name))
        count = max(1, min(processes, len(missing)))
        self.num_kernels = len(missing)
        self._shares = [missing[share::count] for share in range(count)] if missing else []
        self.children = [_start(share) for share in self._shares]

    def wait(self) -> dict[Specialization, Compiled]:
        """Wait for all, and return what came of them. What a process that ended early has left is an error of each kernel."""
        results: dict[Specialization, Compiled] = {}
        for share, child in zip(self._shares, self.children, strict=True):
            output, errors = child.communicate()
            said = (errors.strip().splitlines() or ["nothing"])[-1]
            ended = f"the compiler ended with status {child.returncode}: {said}"
            results |= {one: Compiled(one.name, 0.0, error=ended) for one in share}
            results |= {
                one: Compiled(**json.loads(line)) for one, line in zip(share, output.splitlines(), strict=False)
            }
        self._shares, self.children = [], []
        return results

    def __enter__(self) -> KernelPrecompiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.children:
            child.kill()
            child.communicate()


def _start(share: Sequence[Specialization]) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    child = subprocess.Popen(
        [sys.executable, "-m", "pagoda_kernels.gpu.precompile"],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    # The child reads all of it first. If it has exited before, `wait` returns its status.
    with suppress(BrokenPipeError), child.stdin as lines:
        lines.write("".join(json.dumps(asdict(one)) + "\n" for one in share))
    child.stdin = None
    return child


class NoDevice:
    """Replaces Triton's driver on a machine without a GPU, to compile for one."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_one(wanted: Specialization) -> Compiled:
    """Compile into Triton's cache. What the compiler raises is in the result."""
    began = time.perf_counter()
    driver.set_active(NoDevice(GPUTarget(*wanted.target)))
    kernel: JITFunction[Any] = getattr(importlib.import_module(wanted.module), wanted.name)
    try:
        compiled = kernel.preload(wanted.data)
        usage = resource_usage(compiled.asm["cubin"])
    except Exception as error:  # of many kinds; the first launch of the kernel raises it again
        said = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return Compiled(wanted.name, time.perf_counter() - began, error=said)
    return Compiled(
        name=wanted.name,
        seconds=time.perf_counter() - began,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
    )


def main() -> None:
    """Compile what stdin lists."""
    for line in sys.stdin.readlines():
        fields = json.loads(line)
        wanted = Specialization(**{**fields, "target": tuple(fields["target"])})
        print(json.dumps(asdict(compile_one(wanted))), flush=True)


if __name__ == "__main__":
    main()
