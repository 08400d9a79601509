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
    asked: list[dict[str, object]] = []

    def snapshot_download(model: str, **arguments: object) -> str:
        asked.append(arguments)
        return str(tmp_path / model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert checkpoint_directory("owner/name", "v1.0", "/models") == tmp_path / "owner/name"
    assert {(call["revision"], call["cache_dir"]) for call in asked} == {("v1.0", "/models")}
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/model.safetensors").touch()
    asked.clear()
    checkpoint_directory("owner/name")
    (call,) = asked  # no weights a second time, as pytorch_model.bin
    assert "pytorch_model*.bin" not in call["allow_patterns"]  # type: ignore[operator]


@pytest.mark.parametrize("model", ["/does/not/exist", "./nope", "nope"])
def test_what_is_neither_directory_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        checkpoint_directory(model)


def test_a_file_is_a_gguf_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    assert checkpoint_directory(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
