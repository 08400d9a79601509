"""`pagoda doctor`: every setting with its source, the values chosen for this machine, and what is wrong."""

import json
from pathlib import Path

import pytest

from pagoda.cli.main import main
from pagoda.config.schema import options
from pagoda.models.dummy import write_dummy_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_dummy_checkpoint(tmp_path / "model")


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    status = main(["doctor", "--device=cpu", *arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == (1 if report["problem"] else 0)
    return report


def test_every_setting_has_value_source_and_help(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGODA_SEED", "7")
    report = doctor(capsys, "--model", str(checkpoint), "--api-keys=s3cret")
    assert list(report["settings"]) == list(options())
    assert report["settings"]["seed"] == {
        "value": "7",
        "source": "environment PAGODA_SEED",
        "help": options()["seed"].help,
    }
    assert report["settings"]["max_model_len"]["value"] == "auto"
    assert report["settings"]["model_name"] == {
        "value": "model",
        "source": "derived",
        "help": options()["model_name"].help,
    }
    assert "s3cret" not in json.dumps(report)


def test_chosen_values_have_reasons_and_the_kv_equation_is_shown(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = doctor(capsys, "--model", str(checkpoint), "--kv-cache-memory-bytes=1MiB")
    assert {choice["key"] for choice in report["choices"]} == {
        *("device", "dtype", "threads", "max_num_seqs", "max_num_batched_tokens"),
        *("kv_cache_dtype", "kv_cache_memory_bytes"),
    }
    assert all(choice["reason"] for choice in report["choices"])
    assert report["kv_cache"].startswith("KV cache: 1.00 MiB / ")
    assert report["model"]["architecture"] == "Qwen3ForCausalLM"
    assert report["hardware"]["cpu"]["usable_cores"] >= 1
    assert report["versions"]["torch"]


def test_what_cannot_work_is_a_problem_beside_the_rest_of_the_report(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean --max-model-len?" in doctor(capsys, "--max-model-ln=1")["problem"]
    assert "did you mean --changed?" in doctor(capsys, "--chnged")["problem"]
    report = doctor(capsys, "--model", str(checkpoint), "--kv-cache-memory-bytes=64KiB", "--max-model-len=500")
    assert "max_model_len=500 does not fit" in report["problem"]
    assert report["settings"]
    assert report["choices"]


def test_the_text_report_reads_well(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--model", str(checkpoint), "--api-keys", "s3cret"]) == 0
    text = capsys.readouterr().out
    for part in (
        "Hardware\n",
        "Versions\n",
        "Settings\n",
        "Model\n",
        "Chosen for this machine\n",
        "Expected KV cache: ",
    ):
        assert part in text
    assert f"  model = {checkpoint}    [command line --model]\n" in text
    assert "  dtype = float32    (the checkpoint is float32)\n" in text
    assert "s3cret" not in text
    assert main(["doctor", "--device", "cpu", "--foo"]) == 1
    assert "PROBLEM: --foo" in capsys.readouterr().out


def test_what_is_open_is_said(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(variable, raising=False)
    found = doctor(capsys, "--model", str(checkpoint))["security"]
    assert found["server"].endswith("ports 8080 (REST) and 8081 (gRPC), no TLS, open to everybody")
    assert found["ray"] is None
    assert "no API keys" in found["warnings"][0]
    (tmp_path / "keys").write_text("one-key\nanother-key")
    keys = f"--api-keys-file={tmp_path / 'keys'}"
    found = doctor(capsys, "--model", str(checkpoint), keys, "--distributed-executor-backend=ray")["security"]
    assert found["server"].endswith("2 API keys")
    assert found["ray"].startswith("a token will be made for the head")
    assert "6379 (head) and ports that the kernel chooses" in found["ray"]
    (warning,) = found["warnings"]
    assert "binds its ports to all interfaces" in warning
    assert "NetworkPolicy" in warning
    found = doctor(
        capsys, "--model", str(checkpoint), keys, "--distributed-executor-backend=ray", "--ray-first-port=20000"
    )["security"]
    assert "20000 to 20099" in found["ray"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = doctor(capsys, "--model", str(checkpoint), keys, "--distributed-executor-backend=ray")["security"]
    assert any("whoever reaches its ports runs code" in warning for warning in found["warnings"])
    (tmp_path / "keys").write_text("")
    assert "holds no API key" in doctor(capsys, "--model", str(checkpoint), keys)["problem"]


def test_changed_settings_have_their_source_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "pagoda.yaml"
    file.write_text("max_body_bytes: 1MiB\nhttp_port: 8080\n")
    monkeypatch.setenv("PAGODA_SEED", "7")
    report = doctor(capsys, f"--config={file}", "--api-keys=s3cret", "--changed")
    assert {key: (value["value"], value["default"], value["source"]) for key, value in report["settings"].items()} == {
        "seed": ("7", "0", "environment PAGODA_SEED"),
        "device": ("cpu", "auto", "command line --device"),
        "api_keys": ("<secret>", "()", "command line --api-keys"),
        "max_body_bytes": ("1.00 MiB", "32.00 MiB", f"file {file}"),
    }
    assert main(["doctor", "--changed", "--device=cpu"]) == 0
    assert capsys.readouterr().out == (
        "seed = 7    [environment PAGODA_SEED; default 0]\ndevice = cpu    [command line --device; default auto]\n"
    )
