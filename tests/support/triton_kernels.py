"""The Triton kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagoda_kernels import backend


def require_interpreter() -> None:
    """Skip the module if Triton is not there, or compiles for a GPU instead of interpreting."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for a GPU here (TRITON_INTERPRET=0)", allow_module_level=True)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """Let the public operations call the Triton kernels during a test."""
    before = backend.active
    backend.use_backend("triton")
    yield
    backend.active = before
