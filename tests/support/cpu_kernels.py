"""The compiled CPU kernels, at the slowest level and at the fastest on this processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pagoda_kernels.cpu.build import BuildError
from pagoda_kernels.interface import KernelBackend
from tests.support.kernel_backends import using_backend

LEVELS = ("avx2", "fastest")
ALL_LEVELS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16")


def require_cpu_kernels() -> KernelBackend:
    """The compiled kernels. Skips the module where there are none and none can be built, or the processor cannot run them."""
    try:
        from pagoda_kernels.cpu import operators
    except BuildError as error:
        pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)
    if not operators.available_levels():
        pytest.skip("this processor has no AVX2", allow_module_level=True)
    return operators.BACKEND


@pytest.fixture(scope="module", params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[KernelBackend]:
    """The compiled kernels at one level, active while a module's tests run."""
    from pagoda_kernels.cpu import operators

    level = operators.active_level() if request.param == "fastest" else request.param
    with cpu_kernels_at(level) as active:
        yield active


@contextmanager
def cpu_kernels_at(level: str) -> Iterator[KernelBackend]:
    """The compiled kernels at a level, active; skips the test where the processor cannot run it."""
    from pagoda_kernels.cpu import operators

    if level not in operators.available_levels():
        pytest.skip(f"this processor cannot run {level}")
    level_before = operators.active_level()
    with using_backend("cpu") as active:
        operators.use_level(level)
        try:
            yield active
        finally:
            operators.use_level(level_before)
