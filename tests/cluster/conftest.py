"""The figures of a run on several nodes are printed as they come, too, for such a run is long."""

from __future__ import annotations

import sys

import pytest

from tests.support.notes import Note


@pytest.fixture(name="note")
def note_at_once(note: Note) -> Note:
    """Adds a sentence to the figures of this run."""

    def add(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)
        note(sentence)

    return add
