"""Checkpoints that tests only read: each is written once in a run, by the first process that wants it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pagoda.errors import CheckpointError
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from tests.support.leftovers import SHARED_DIRECTORY

SMALL = DummySpec()


def shared_checkpoint(spec: DummySpec = SMALL) -> Path:
    """The checkpoint of random weights that `spec` describes."""
    name = f"{spec.family}-{hashlib.sha256(repr(spec).encode()).hexdigest()[:12]}"
    directory = Path(os.environ[SHARED_DIRECTORY]) / name
    if not directory.is_dir():
        try:
            write_dummy_checkpoint(directory, spec)
        except CheckpointError:
            if not directory.is_dir():
                raise
    return directory
