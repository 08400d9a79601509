"""The command line of `vllm serve`, held against the flags of vLLM's own parser (tests/support/vllm_flags.py)."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pagoda.config.lora import LoraModule
from pagoda.config.names import settings_by_name
from pagoda.config.sources import LoadedConfig, load, load_as_vllm
from pagoda.config.vllm_flags import SHORT, TAKEN, VLLM_VERSION, vllm_flags
from pagoda.config.vllm_flags_page import flags_page
from pagoda.errors import ConfigError
from tests.support.vllm_flags import LIST, Flag

LISTED = json.loads(LIST.read_text())
FLAGS = [Flag(**flag) for flag in LISTED["flags"]]
BY_NAME = {flag.name.removeprefix("--").replace("-", "_"): flag for flag in FLAGS}
OTHER_NAMES = {"device_memory_utilization", "served_model_name", "config"}


def loaded(command: str, environ: dict[str, str] | None = None) -> LoadedConfig:
    return load_as_vllm(shlex.split(command), environ or {})


def config(command: str, **environ: str) -> dict[str, Any]:
    return vars_of(loaded(command, environ))


def vars_of(found: LoadedConfig) -> dict[str, Any]:
    return {name: getattr(found.config, name) for name in found.sources}


def test_metrics_are_read_without_the_key_as_of_vllm() -> None:
    assert config("--api-key secret")["anonymous_scopes"] == ("read",)
    assert config("", VLLM_API_KEY="secret")["anonymous_scopes"] == ("read",)
    assert config("--api-key secret --anonymous-scopes infer")["anonymous_scopes"] == ("infer",)
    assert config("")["anonymous_scopes"] == ()
    assert load(["--api-key", "secret"], {}, vllm=True).config.anonymous_scopes == ()


def test_no_flag_of_vllm_is_unknown() -> None:
    known = settings_by_name().keys() | vllm_flags().keys() | {"config"}
    assert LISTED["vllm"] == VLLM_VERSION
    assert len(BY_NAME) > 300
    assert sorted(set(BY_NAME) - known) == []


def test_no_flag_is_in_two_tables_and_none_is_made_up() -> None:
    assert vllm_flags().keys() - BY_NAME.keys() <= OTHER_NAMES
    assert {name.replace("-", "_") for name in TAKEN.split()} <= settings_by_name().keys() | {"config"}
    names = Counter(name.replace("-", "_") for name in TAKEN.split())
    names.update(list(vllm_flags()))
    assert [name for name, times in names.items() if times > 1] == []


def test_as_many_values_follow_a_flag_as_in_vllm() -> None:
    for name, flag in vllm_flags().items():
        if name in BY_NAME:
            assert flag.values == BY_NAME[name].values, name


def test_short_forms_are_those_of_vllm() -> None:
    theirs = {short: flag.name[2:] for flag in FLAGS for short in flag.short if not short.startswith("--")}
    assert {**theirs, "-O": "optimization-level"} == SHORT


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.negatable], ids=lambda flag: flag.name)
def test_the_negation_of_any_flag_is_taken(flag: Flag) -> None:
    loaded(f"--no-{flag.name[2:]}")


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_is_taken_noted_or_refused_with_its_reason(flag: Flag) -> None:
    name = flag.name[2:].replace("-", "_")
    known = vllm_flags().get(name)
    if known is None:
        return
    value = "" if flag.values == "none" else "17"
    command = f"{flag.name} {value} --dtype float32"
    if known.refused and not known.is_harmless(value or "true"):
        with pytest.raises(ConfigError) as caught:
            loaded(command)
        assert f"{flag.name}" in str(caught.value)
        assert known.why in str(caught.value)
        assert "unknown" not in str(caught.value)
        return
    if known.setting == "kv_cache_watermark" or known.setting == "gpu_memory_utilization":
        command = command.replace("17", "0.5")
    found = loaded(command)
    assert found.config.dtype == "float32"
    assert bool(found.notes) == (not known.setting and not known.refused)


def test_the_page_of_flags_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "vllm-flags.md"
    assert page.read_text() == flags_page(), "run `make docs`"
    assert all(f"`{flag.name}`" in flags_page() for flag in FLAGS)


# KServe's LLMInferenceService, config/llmisvcconfig/config-llm-template.yaml, with all that its features add.
PRESET = """
    /mnt/models --served-model-name qwen publishers/team/models/qwen --port 8000
    --disable-access-log-for-endpoints /health,/metrics,/ping --shutdown-timeout 45
    --tensor-parallel-size 2 --enable-ssl-refresh --ssl-certfile {certificate} --ssl-keyfile {certificate}
    --collect-detailed-traces all --otlp-traces-endpoint http://collector:4317
    --max-model-len 8192
"""


def test_the_presets_command_line_is_taken_as_it_is(tmp_path: Path) -> None:
    certificate = tmp_path / "tls.pem"
    certificate.touch()
    model = tmp_path / "models"
    model.mkdir()
    command = PRESET.format(certificate=certificate).replace("/mnt/models", str(model))
    found = loaded(command)
    assert found.config.model == str(model)
    assert found.config.model_name == "qwen"
    assert found.config.model_aliases == ("publishers/team/models/qwen",)
    assert found.config.http_port == 8000
    assert found.config.grace_period_seconds == 45
    assert found.config.tensor_parallel_size == 2
    assert found.config.max_model_len == 8192
    assert found.config.disable_access_log_for_endpoints == ("/health", "/metrics", "/ping")
    assert [note.partition(" ")[0] for note in found.notes] == [
        "--enable-ssl-refresh",
    ]
    assert found.config.otlp_traces_endpoint == "http://collector:4317"
    assert found.config.collect_detailed_traces == ("all",)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("-tp 2", {"tensor_parallel_size": 2}),
        ("-tp=2 -pp=3", {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}),
        ("-dp 2", {"data_parallel_size": 2}),
        ("--tensor_parallel_size 2", {"tensor_parallel_size": 2}),
        ("--max-model-len 4k", {"max_model_len": 4000}),
        ("--max-model-len 4K", {"max_model_len": 4096}),
        ("--max-model-len 1.5k", {"max_model_len": 1500}),
        ("--max-model-len auto", {"max_model_len": None}),
        ("--max-model-len -1", {"max_model_len": None}),
        ("--max-num-batched-tokens 8K", {"max_num_batched_tokens": 8192}),
        ("--dtype half", {"dtype": "float16"}),
        ("--dtype float", {"dtype": "float32"}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("--generation-config vllm", {"generation_config": "none"}),
        ("--distributed-executor-backend uni", {"distributed_executor_backend": "auto"}),
        ("--api-key a b --seed 3", {"api_keys": ("a", "b"), "seed": 3}),
        ("--api-key=a", {"api_keys": ("a",)}),
        ("--revision refs/pr/3 --download-dir /models", {"revision": "refs/pr/3", "download_dir": "/models"}),
        ("--device-memory-utilization 0.5", {"gpu_memory_utilization": 0.5}),
        ("--max-num-queued-reqs 7", {"max_num_waiting": 7}),
        ("--log-level DEBUG", {"log_level": "debug"}),
        ('--override-generation-config {"top_k":5}', {"override_generation_config": None}),
        ("--override-generation-config.top_k 5", {"override_generation_config": {"top_k": 5}}),
        ("owner/name", {"model": "owner/name", "model_name": "owner/name", "model_aliases": ()}),
        ("--seed 3 owner/name --enforce-eager", {"model": "owner/name", "enforce_eager": True}),
        ("owner/name --served-model-name a", {"model_name": "a", "model_aliases": ()}),
        ("--model owner/name", {"model": "owner/name", "model_name": "owner/name"}),
        ("", {"http_port": 8000}),
        ("-O3 -O 2", {}),
        ("--runner generate --convert auto --nnodes 1 --max-logprobs 20", {}),
    ],
)
def test_values_are_taken_as_vllm_writes_them(written: str, expected: dict[str, Any]) -> None:
    words = shlex.split(written) if "{" not in written else written.split()
    found = load_as_vllm(words, {})
    if "{" in written:
        assert found.config.override_generation_config == {"top_k": 5}
        return
    assert {name: getattr(found.config, name) for name in expected} == expected


def test_pagoda_keeps_its_own_defaults_under_its_own_name() -> None:
    found = load(["owner/name"], {}, vllm=True).config
    assert (found.http_port, found.model_name, found.model_aliases) == (8080, "name", ("owner/name",))
    assert load(["--model", "owner/name", "--model-name", "x"], {}).config.model_aliases == ()
    assert load([], {}).config.model_aliases == ()


def test_variables_of_vllm_count_where_pagodas_own_are_not_set() -> None:
    assert config("", VLLM_API_KEY="a,b")["api_keys"] == ("a,b",)
    assert config("", VLLM_API_KEY="a", PAGODA_API_KEYS="c,d")["api_keys"] == ("c", "d")
    assert config("--api-key x", VLLM_API_KEY="a")["api_keys"] == ("x",)
    assert config("", VLLM_LOGGING_LEVEL="WARNING")["log_level"] == "warning"
    with pytest.raises(ConfigError, match=r"VLLM_API_KEY .*is empty, which would leave the server open"):
        config("", VLLM_API_KEY="")
    assert config("", PAGODA_HTTP_PORT="9000")["http_port"] == 9000


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("--kv-transfer-config {}x", "--kv-transfer-config={}x: is not supported: the KV cache is neither"),
        ("--kv-transfer-config.kv_connector N", "kv_connector=N: is not supported: the KV cache is neither"),
        ("--lora-target-modules q_proj", "=q_proj: is not supported: an adapter's own layers are taken"),
        ("--lora-modules sql", "must be name=path, or a JSON object such as"),
        ("--nnodes 2", "--nnodes=2: is not supported: ranks of several machines"),
        ("--hf-token secret", "set HF_TOKEN"),
        ("--max-logprobs 21", "at most 20 a token"),
        ("--max-model-len 4x", "max_model_len=4x (command line --max-model-len): must be an integer"),
        ("--port", "--port: needs a value"),
        ("--tensor-paralel-size 2", "unknown option; did you mean --tensor-parallel-size?"),
        ("owner/name other/name", "unexpected"),
        ("--served-model-name", "needs a value"),
        ("--max-logprobs", "needs a value"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(written: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_as_vllm(written.split(), {})
    assert message in str(caught.value).replace(" (command line)", "")


@pytest.mark.parametrize(
    "written",
    [
        [
            "--lora-modules",
            "sql=/a/sql",
            '{"name": "org/chat", "path": "/a/chat", "base_model_name": "m"}',
            "--port",
            "1",
        ],
        [
            "--lora-modules=sql=/a/sql",
            "--lora-modules",
            '{"name": "org/chat", "path": "/a/chat", "base_model_name": "m"}',
        ],
    ],
)
def test_adapters_are_named_as_for_vllm(written: list[str]) -> None:
    config = load_as_vllm(["--enable-lora", "--max-lora-rank", "64", "--max-loras=2", *written], {}).config
    assert config.adapters == (LoraModule("sql", "/a/sql"), LoraModule("org/chat", "/a/chat", "m"))
    assert (config.enable_lora, config.max_lora_rank, config.max_loras, config.num_cpu_loras) == (True, 64, 2, 2)


def test_adapters_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("enable-lora: true\nlora-modules:\n- sql=/a/sql\n- {name: chat, path: /a/chat}\n")
    assert loaded(f"--config {file}").config.adapters == (LoraModule("sql", "/a/sql"), LoraModule("chat", "/a/chat"))


def test_the_vllm_command_is_pagodas() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pagoda.cli.vllm", *words], capture_output=True, text=True, check=False
        )

    version = run("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("pagoda ")
    assert version.stdout.splitlines()[-1].split()[-1] == VLLM_VERSION  # what KServe's preset reads
    refused = run("serve", "owner/name", "--uds", "socket")
    assert (refused.returncode, refused.stdout) == (2, "")
    why = "the server listens on ports; gRPC and REST run side by side"
    assert refused.stderr == f"vllm serve: --uds=socket (command line): is not supported: {why}\n"
    assert run("bench").stderr == "vllm: bench is not a command of Pagoda: use `pagoda bench`\n"


def test_a_file_of_vllm_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: owner/name\nserved-model-name: [qwen, publishers/team/models/qwen]\nport: 9000\ntensor-parallel-size: 2\n"
        "max-model-len: 4k\ndtype: half\nenable-prefix-caching: false\nuvicorn-log-level: info\nenable-chunked-prefill: true\n"
        "trust-remote-code: false\napi-key: [one, two]\nkv-events-config: {enable_kv_cache_events: true}\n"
        "cpu-offload-gb: 0\nhf-overrides: {}\n"
    )
    found = loaded(f"--config {file}")
    config = found.config
    assert (config.model, config.model_name, config.model_aliases) == (
        "owner/name",
        "qwen",
        ("publishers/team/models/qwen",),
    )
    assert (config.http_port, config.tensor_parallel_size, config.max_model_len, config.dtype) == (
        9000,
        2,
        4000,
        "float16",
    )
    assert (config.enable_prefix_caching, config.api_keys) == (False, ("one", "two"))
    assert [note.partition(" ")[0] for note in found.notes] == ["--uvicorn-log-level", "--enable-chunked-prefill"]
    assert loaded(f"--config {file} --port 7000").config.http_port == 7000  # the command line counts more


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("lora-target-modules: [q_proj]", "an adapter's own layers are taken"),
        ("kv-transfer-config: {kv_connector: NixlConnector}", "prefill and decode are not disaggregated"),
        ("tensor-paralel-size: 2", "unknown setting; did you mean tensor_parallel_size?"),
        ("cpu-offload-gb: 4", "weights and KV cache are not offloaded"),
    ],
)
def test_what_a_file_of_vllm_asks_for_and_is_not_there_is_refused(written: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(written)
    with pytest.raises(ConfigError) as caught:
        loaded(f"--config {file}")
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
