"""The kernel backend that a test runs on, and the one from before put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pagoda_kernels import backend
from pagoda_kernels.interface import KernelBackend


@contextmanager
def using_backend(name: str) -> Iterator[KernelBackend]:
    """Make the backend of that name the active one; the test may choose others meanwhile."""
    before = backend.active
    try:
        yield backend.use_backend(name)
    finally:
        backend.active = before


@pytest.fixture
def reference_kernels() -> Iterator[KernelBackend]:
    """The reference backend, active during a test."""
    with using_backend("reference") as kernels:
        yield kernels
