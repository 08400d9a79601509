"""What small files of a checkpoint say is wrong: one sentence, before a port is open or a library for models imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.errors import PagodaError
from pagoda.serving.model_check import check_model
from tests.support.checkpoints import shared_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        source = shared_checkpoint() / name
        if source.exists():
            shutil.copy(source, directory / name)
    return directory


def changed(checkpoint: Path, name: str, **values: Any) -> None:
    path = checkpoint / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def problem(checkpoint: Path, **settings: Any) -> str:
    with pytest.raises(PagodaError) as caught:
        check_model(PagodaConfig(model=str(checkpoint), **settings))
    return str(caught.value)


def test_a_sound_model_passes_and_one_that_is_not_here_yet_is_left_to_the_download(checkpoint: Path) -> None:
    check_model(PagodaConfig(model=str(checkpoint)))
    check_model(PagodaConfig(model="owner/name"))
    check_model(PagodaConfig())


def test_all_settings_that_do_not_fit_the_model_are_named_at_once(checkpoint: Path) -> None:
    found = problem(checkpoint, tensor_parallel_size=7, max_model_len=10**6, quantization="gptq")
    assert [line.partition("=")[0] for line in found.splitlines()] == [
        "tensor_parallel_size",
        "quantization",
        "max_model_len",
    ]


def test_what_the_machine_cannot_do_and_the_demo_model_are_looked_at_too(checkpoint: Path) -> None:
    assert problem(checkpoint, device="cpu", kv_cache_dtype="fp8").startswith("kv_cache_dtype=fp8: ")
    with pytest.raises(PagodaError, match=r"^tensor_parallel_size=3 does not fit"):
        check_model(PagodaConfig(tensor_parallel_size=3))


def test_what_the_files_say_is_found(checkpoint: Path) -> None:
    changed(checkpoint, "generation_config.json", top_p=3)
    assert "generation_config.json: top_p must be" in problem(checkpoint)
    check_model(PagodaConfig(model=str(checkpoint), generation_config="none"))
    assert "override_generation_config: top_k must be" in problem(
        checkpoint, generation_config="none", override_generation_config={"top_k": -5}
    )
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "model.gguf")
    assert "model.gguf is no GGUF file" in problem(checkpoint)
    (checkpoint / "model.gguf").rename(checkpoint / "model.h5")
    assert "model.h5 is TensorFlow weights" in problem(checkpoint)
    check_model(PagodaConfig(model=str(checkpoint), load_format="dummy"))
    changed(checkpoint, "config.json", architectures=["T5ForConditionalGeneration"], model_type="t5")
    assert "T5ForConditionalGeneration is not supported" in problem(checkpoint)


def test_a_server_says_it_once_and_opens_no_port(checkpoint: Path) -> None:
    changed(checkpoint, "config.json", architectures=["T5ForConditionalGeneration"], model_type="t5")
    command = [
        sys.executable,
        "-m",
        "pagoda.cli.main",
        "serve",
        str(checkpoint),
        "--host",
        "127.0.0.1",
        "--http-port",
        "0",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"pagoda serve: {checkpoint}/config.json: T5ForConditionalGeneration is not supported; ")


def test_the_check_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pagoda.serving.model_check; "
        "sys.exit(str([m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules]) != '[]')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
