from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from pagoda_kernels import backend, reference
from pagoda_kernels.activation import silu_and_mul


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    before = backend.active
    yield
    backend.active = before


def test_operations_call_the_backend_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = dataclasses.replace(
        reference.BACKEND, name="doubled", silu_and_mul=lambda x: 2 * reference.BACKEND.silu_and_mul(x)
    )
    plain = silu_and_mul(torch.ones(1, 4))
    monkeypatch.setattr(backend, "active", doubled)
    assert torch.equal(silu_and_mul(torch.ones(1, 4)), 2 * plain)
    assert backend.use_backend("reference") is reference.BACKEND
    assert torch.equal(silu_and_mul(torch.ones(1, 4)), plain)


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'abacus'.*reference"):
        backend.use_backend("abacus")
