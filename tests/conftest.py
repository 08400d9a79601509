"""What the whole suite needs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.support.notes import Note

pytest_plugins = ["tests.support.leftovers"]

# A shell that starts the suite in the background has SIGINT ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton runs kernels on the CPU if this is set before its first import, and transformers imports it in other tests. Where
# there is a GPU, TRITON_INTERPRET=0 leaves the kernels to it.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def restore_kernel_backend() -> Iterator[None]:
    """An engine chooses the kernels of its process; the next module begins without that choice."""
    from pagoda_kernels import backend

    before = backend.active
    yield
    backend.active = before


_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Adds a sentence to the figures that the run prints after its results."""
    figures = request.config.stash.setdefault(_FIGURES, [])
    return lambda sentence: figures.append(f"{request.node.name}: {sentence}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print them."""
    figures = config.stash.get(_FIGURES, [])
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.line(figure)
