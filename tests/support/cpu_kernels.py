"""The compiled CPU kernels, at the slowest and at the fastest level that this processor can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pagoda_kernels import backend
from pagoda_kernels.cpu.build import BuildError

LEVELS = ("avx2", "fastest")
ALL_LEVELS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16")


def require_cpu_kernels() -> None:
    """Skip the module where the kernels are not compiled and cannot be, or this processor cannot run them."""
    try:
        from pagoda_kernels.cpu import operators
    except BuildError as error:
        pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)
    if not operators.available_levels():
        pytest.skip("this processor has no AVX2", allow_module_level=True)


@pytest.fixture(params=LEVELS)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let the public operations call the compiled kernels during a test; gives the level."""
    from pagoda_kernels.cpu import operators

    level = operators.available_levels()[-1] if request.param == "fastest" else request.param
    with cpu_kernels_at(level):
        yield level


@contextmanager
def cpu_kernels_at(level: str) -> Iterator[None]:
    """The compiled kernels at a level in the operations' place; skips the test where the processor cannot run it."""
    from pagoda_kernels.cpu import operators

    if level not in operators.available_levels():
        pytest.skip(f"this processor cannot run {level}")
    before, level_before = backend.active, operators.active_level()
    backend.use_backend("cpu")
    operators.use_level(level)
    try:
        yield
    finally:
        operators.use_level(level_before)
        backend.active = before
