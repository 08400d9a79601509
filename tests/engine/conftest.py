"""What the tests of the engine share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagoda.models.dummy import DummySpec
from tests.support.checkpoints import shared_checkpoint


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Two layers of random weights, to be read only. A module that needs another model has a fixture of this name."""
    return shared_checkpoint(DummySpec(num_layers=2))
