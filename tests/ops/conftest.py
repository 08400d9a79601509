"""Operations run on the reference backend, unless a module has a fixture `kernels` of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagoda_kernels.interface import KernelBackend
from tests.support.kernel_backends import using_backend


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[KernelBackend]:
    """The active backend."""
    with using_backend("reference") as active:
        yield active
