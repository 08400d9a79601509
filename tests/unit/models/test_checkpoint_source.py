"""Where a checkpoint comes from."""

from pathlib import Path

import pytest

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_source import checkpoint_directory


def test_directories_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    assert checkpoint_directory(str(tmp_path / "model")) == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint_directory("~/model") == tmp_path / "model"


def test_no_model_is_the_demo_model() -> None:
    assert (checkpoint_directory(None) / "config.json").is_file()


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, allow_patterns: str(tmp_path / model))
    assert checkpoint_directory("owner/name") == tmp_path / "owner/name"


@pytest.mark.parametrize("model", ["/does/not/exist", "./nope", "nope"])
def test_what_is_neither_directory_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        checkpoint_directory(model)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint_directory(str(tmp_path / "model.gguf"))


def test_a_failed_download_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        raise TimeoutError("no answer")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"owner/name could not be had .*no answer"):
        checkpoint_directory("owner/name")
