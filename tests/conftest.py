"""What the whole suite needs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support.notes import Note

pytest_plugins = ["tests.support.leftovers"]

# A shell that starts the suite in the background has SIGINT ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers of a parallel run share the cores, and a thread of torch that spins while it waits for another takes one from them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Triton runs kernels on the CPU if this is set before its first import, and transformers imports it in other tests. Where
# there is a GPU, TRITON_INTERPRET=0 leaves the kernels to it.
os.environ.setdefault("TRITON_INTERPRET", "1")

# How fast examples are made and run is no property.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def restore_kernel_backend() -> Iterator[None]:
    """An engine chooses the kernels of its process; the next module begins without that choice."""
    from pagoda_kernels import backend

    before = backend.active
    yield
    backend.active = before


_FIGURE = "figure"


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Adds a sentence to the figures that the run prints after its results."""
    # With the report of the test, for a worker prints nothing.
    return lambda sentence: request.node.user_properties.append((_FIGURE, sentence))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print them."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    figures = [
        f"{report.nodeid.rpartition('::')[2]}: {sentence}"
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, sentence in report.user_properties
        if name == _FIGURE
    ]
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.line(figure)
