"""The `pagoda` command: dispatch, errors for people, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda import __version__
from pagoda.cli import main as cli
from pagoda.config.schema import options


def pagoda(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_no_command_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert pagoda() == 2
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    assert pagoda("--help") == 0
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert pagoda("--version") == 0
    assert capsys.readouterr().out == f"pagoda {__version__}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("serv", "pagoda: unknown command serv; did you mean serve?"),
        ("xyz", "pagoda: unknown command xyz; commands are serve,"),
        ("--model", "pagoda: unknown option --model"),
    ],
)
def test_an_unknown_command_is_a_clear_error(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pagoda(word) == 2
    assert capsys.readouterr().err.startswith(message)


def test_serve_help_lists_every_setting_under_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert pagoda("serve", "--help") == 0
    text = capsys.readouterr().out
    assert "usage: pagoda serve" in text
    for key in options():
        assert f"{key.replace('_', '-')}" in text
    assert "\nKV cache:\n" in text


def test_wrong_settings_end_with_a_sentence_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert pagoda("serve", "--max-model-ln=1", "--http-port=x") == 2
    error = capsys.readouterr().err
    assert error.startswith("pagoda serve: 2 settings are wrong:")
    assert "did you mean --max-model-len?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (
            ["probe", "live", "--timeout", "0.2"],
            ("torch", "numpy", "pydantic", "yaml", "kserve", "grpc", "ssl", "asyncio"),
        ),
        (["serve", "--seed=x"], ("torch", "numpy", "kserve", "grpc", "transformers", "fastapi")),
        (["--help"], ("torch", "numpy", "pydantic", "yaml", "pagoda.config")),
    ],
)
def test_nothing_heavy_is_imported(arguments: list[str], forbidden: tuple[str, ...]) -> None:
    script = f"""
import json, sys
from pagoda.cli.main import main
status = main({arguments!r})
print(json.dumps([name for name in {forbidden!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_models_make_dummy_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "model"
    options_given = ["--family", "llama", "--num_layers", "2", "--tie-word-embeddings", "--rope-scaling"]
    assert pagoda("models", "make-dummy", str(directory), *options_given, '{"rope_type": "linear", "factor": 2}') == 0
    config = json.loads((directory / "config.json").read_text())
    assert (config["num_hidden_layers"], config["tie_word_embeddings"]) == (2, True)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2}
    capsys.readouterr()
    assert pagoda("models", "inspect", str(directory), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] * 4 == facts["weight_bytes"] < facts["file_bytes"]
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    assert pagoda("models", "inspect", str(directory)) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/does/not/exist"], "there is no directory /does/not/exist"),
        (["make-dummy", "/tmp"], "/tmp exists already"),
        (["make-dummy", "/tmp/never-made", "--num-kv-heads", "3"], "multiple of num_kv_heads"),
        (["make-dummy", "/tmp/never-made", "--rope-scaling", "[]"], "is no JSON object"),
    ],
)
def test_models_errors_are_sentences(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pagoda("models", *arguments) == 2
    assert message in capsys.readouterr().err
