"""Room for ranks in a real Ray cluster of one node, in a process of its own: Ray leaves much behind in one that used it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

PROGRAM = """
import json, time
import ray
from pagoda.errors import ConfigError
from pagoda.distributed.ray.cluster import bundles_in_order, release, reserve
from pagoda.parallel.layout import ParallelLayout

ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
looks = []
try:
    reserve(ParallelLayout(1, 2), "cpu", time.monotonic() + 3, looks.append)
except ConfigError as error:
    refusal = str(error)
room = reserve(ParallelLayout(1, 1), "cpu", time.monotonic() + 60, looks.append)
bundles = bundles_in_order(room)
release(room)
print(json.dumps({"looks": looks, "refusal": refusal, "bundles": bundles}))
ray.shutdown()
"""


@pytest.fixture
def ray_sessions() -> Iterator[None]:
    """Ray keeps the files of its sessions."""
    yield
    shutil.rmtree(Path(tempfile.gettempdir()) / "ray")


@pytest.mark.usefixtures("ray_sessions")
def test_room_is_waited_for_without_asking_the_head_again_and_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # else Ray leaves a token in the home directory
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "has no room for tensor_parallel_size=1, pipeline_parallel_size=2" in found["refusal"]
    assert "2 nodes with 1 CPU each; the cluster has 1 CPU on" in found["refusal"]
    assert 1 <= len(found["looks"]) <= 12, "every half second of three, not as fast as it can"
    assert found["bundles"] == [0]
