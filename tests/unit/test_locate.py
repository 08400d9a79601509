"""Where a checkpoint comes from."""

from pathlib import Path

import pytest

from pagoda.config import from_kwargs
from pagoda.errors import CheckpointError
from pagoda.models import locate


def test_directories_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate.locate_checkpoint("model") == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate.locate_checkpoint("~/model") == tmp_path / "model"


def test_no_model_is_the_demo_model_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = locate.with_local_checkpoint(from_kwargs({}))
    assert config.model is not None
    assert (Path(config.model) / "config.json").is_file()
    assert config.model_name == "demo"


def test_a_hub_id_is_fetched_and_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        fetched.append((model, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = locate.with_local_checkpoint(from_kwargs({"model": "org/name", "tokenizer": "org/words"}))
    assert (config.model, config.tokenizer, config.model_name) == (str(tmp_path), str(tmp_path), "name")
    assert sorted(fetched) == [("org/name", True), ("org/words", False)]


@pytest.mark.parametrize("model", ["/does/not/exist", "./nope", "~/nope"])
def test_a_missing_directory_is_no_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such directory"):
        locate.locate_checkpoint(model)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        locate.locate_checkpoint(str(tmp_path / "model.gguf"))


def test_a_failed_download_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        raise TimeoutError("no answer")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(
        CheckpointError, match=r"model org/name is no directory here, and it cannot be fetched .*no answer"
    ):
        locate.locate_checkpoint("org/name")
