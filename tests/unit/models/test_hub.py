"""Downloads from a hub that stalls, cuts connections and lies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.errors import CheckpointError
from pagoda.models import hub
from pagoda.models.checkpoint_source import checkpoint_directory
from tests.support.fake_hub import COMMIT, MODEL, FakeHub

WEIGHTS = bytes(range(256)) * 4096
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "original/copy.safetensors": b"x"}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(FILES) as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


def fetch(cache: Path, revision: str | None = None, stall_seconds: float = 20.0) -> Path:
    patterns, ignored = ["*.json", "*.safetensors"], ["original/*"]
    return hub.download(MODEL, revision, str(cache), patterns, ignored, stall_seconds=stall_seconds)


def check_whole(snapshot: Path) -> None:
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_is_downloaded_once_and_found_again_without_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    snapshot = fetch(tmp_path)
    check_whole(snapshot)
    assert snapshot.name == COMMIT
    fake_hub.status = 503
    assert fetch(tmp_path) == snapshot
    assert fake_hub.ranges == {"config.json": [0], "model.safetensors": [0]}


@pytest.mark.parametrize("revision", ["v1.0", COMMIT])
def test_a_revision_is_a_tag_or_a_commit(fake_hub: FakeHub, tmp_path: Path, revision: str) -> None:
    assert checkpoint_directory(MODEL, revision, str(tmp_path)).name == COMMIT


def test_a_connection_that_is_cut_is_resumed_where_it_broke(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.faults["model.safetensors"] = ["cut", "cut"]
    check_whole(fetch(tmp_path))
    first, second, third = fake_hub.ranges["model.safetensors"]
    assert first == 0 < second < third < len(WEIGHTS)


def test_one_silent_connection_is_given_up_for_another(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.faults["model.safetensors"] = ["stall"]
    check_whole(fetch(tmp_path))
    assert fake_hub.ranges["model.safetensors"][1] >= len(WEIGHTS) // 2


def test_a_download_that_stands_still_ends_and_is_resumed_by_the_next_start(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 60)
    fake_hub.faults["model.safetensors"] = ["stall"]
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"owner/name could not be had from .*: no byte has come for 1 s"):
        fetch(tmp_path, stall_seconds=1.0)
    assert time.monotonic() - began < 30
    fake_hub.released.set()  # the thread that hung ends, and its lock with it
    check_whole(fetch(tmp_path))
    assert 0 not in fake_hub.ranges["model.safetensors"][1:]


def test_a_file_with_another_hash_is_downloaded_again_and_refused_the_second_time(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.faults["model.safetensors"] = ["lie"]
    check_whole(fetch(tmp_path / "once"))
    fake_hub.faults["model.safetensors"] = ["lie", "lie"]
    with pytest.raises(CheckpointError, match=r"has not the hash [0-9a-f]{64} that it names, twice: a broken mirror"):
        fetch(tmp_path / "twice")
    check_whole(fetch(tmp_path / "twice"))  # nothing broken is left behind


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no model owner/name at http://127.*, or it is private: set HF_TOKEN"),
        (403, "GatedRepo", "owner/name at http://127.* is gated: ask for access on its page, and set HF_TOKEN"),
        (404, "RevisionNotFound", "owner/name at http://127.* has no revision 'nope'"),
        (503, "", "it is not in the Hugging Face cache .*, and http://127.* cannot be reached"),
    ],
)
def test_errors_say_what_to_do(fake_hub: FakeHub, tmp_path: Path, status: int, code: str, message: str) -> None:
    fake_hub.status, fake_hub.error_code = status, code
    with pytest.raises(CheckpointError, match=message):
        fetch(tmp_path, "nope")


def test_what_cannot_be_written_is_said(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"owner/name does not fit: no space is left in {tmp_path}"):
        fetch(tmp_path)


def test_the_hubs_variables_count(fake_hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT names a mirror, HF_HUB_OFFLINE forbids to ask."""
    program = (
        "import sys\nfrom pagoda.models.checkpoint_source import checkpoint_directory\n"
        "from pagoda.errors import CheckpointError\n"
        "try: print(checkpoint_directory('owner/name', None, sys.argv[1]))\nexcept CheckpointError as error: print(error)"
    )

    def run(**environ: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "HF_ENDPOINT": fake_hub.url, "HF_HUB_DISABLE_XET": "1", **environ},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    assert "HF_HUB_OFFLINE forbids to ask" in run(HF_HUB_OFFLINE="1")
    check_whole(Path(run()))
    check_whole(Path(run(HF_HUB_OFFLINE="1")))
