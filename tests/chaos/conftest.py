"""The figures of a chaos run: what was done to the servers and what was measured, printed after the results."""

from __future__ import annotations

import pytest

from tests.support.notes import Note

_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Adds a sentence to the figures of this run."""
    figures = request.config.stash.setdefault(_FIGURES, [])
    return lambda sentence: figures.append(f"{request.node.name}: {sentence}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print them."""
    figures = config.stash.get(_FIGURES, [])
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.line(figure)
