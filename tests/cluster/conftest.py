"""The figures of a run on several nodes are printed after the results, and as they come, for such a run is long."""

from __future__ import annotations

import sys

import pytest

from tests.chaos.conftest import note as note_for_the_end
from tests.chaos.conftest import pytest_terminal_summary
from tests.support.notes import Note

__all__ = ["note", "note_for_the_end", "pytest_terminal_summary"]


@pytest.fixture
def note(note_for_the_end: Note) -> Note:
    """Adds a sentence to the figures of this run."""

    def add(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)
        note_for_the_end(sentence)

    return add
