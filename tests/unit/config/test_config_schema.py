"""The schema itself, and the checks that a Python caller gets without pydantic."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from pagoda.config import PagodaConfig, from_kwargs, schema_json
from pagoda.config.option import GROUPS
from pagoda.config.schema import default_model_name, option_defaults, options, rules
from pagoda.config.values import format_bytes, parse_bytes
from pagoda.errors import ConfigError


def problem_of(**settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        PagodaConfig(**settings)
    return str(caught.value)


def test_the_defaults_are_sound_and_every_setting_is_explained() -> None:
    assert PagodaConfig().http_port == 8080
    for key, info in options().items():
        assert info.help.endswith("."), key
        assert info.group in GROUPS, key
        assert rules().allowed_values(key), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"http_port": 65536}, "http_port=65536: must be an integer of at least 0 and at most 65535"),
        ({"http_port": True}, "http_port=True"),
        ({"http_port": "8080"}, "http_port=8080: must be an integer"),
        ({"gpu_memory_utilization": 0}, "must be a number greater than 0 and at most 1"),
        ({"kv_cache_watermark": 1.0}, "must be a number of at least 0 and less than 1"),
        ({"request_timeout_seconds": float("nan")}, "request_timeout_seconds=nan"),
        ({"request_timeout_seconds": float("inf")}, "request_timeout_seconds=inf"),
        ({"dtype": "int8"}, "dtype=int8: must be one of auto, float32, bfloat16, float16"),
        ({"max_model_len": 0}, "must be an integer of at least 1, or auto"),
        ({"model_name": "a b"}, "model_name=a b: must be a string without spaces"),
        ({"metrics_prefix": "1x"}, "metrics_prefix=1x"),
        ({"api_keys": ["a"]}, "must be a list of strings"),
        ({"api_keys": ("",)}, "must not hold an empty key"),
        ({"enable_prefix_caching": 1}, "must be true or false"),
        ({"block_size": 12}, "must be a power of two"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, "must be at least max_num_seqs=8"),
        ({"ssl_certfile": "cert.pem"}, "ssl_certfile=cert.pem: needs ssl_keyfile too"),
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile=key.pem: needs ssl_certfile too"),
        ({"grpc_port": 8080}, "grpc_port=8080: must differ from http_port"),
        ({"data_parallel_size": 2, "ray_address": "auto"}, "data_parallel_size=2: must be 1 with Ray"),
        ({"data_parallel_size": 2, "distributed_executor_backend": "ray"}, "data_parallel_size=2: must be 1 with Ray"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: must be an integer of at least 1"),
        ({"distributed_executor_backend": "mp", "ray_address": "auto"}, "ray_address=auto: must be none with"),
        ({"ray_address": "head"}, "ray_address=head: must be a string that is auto or HOST:PORT"),
        ({"network_interface": "eth0 eth1"}, "must be a string that is an interface's name"),
        ({"num_scheduler_steps": 4, "pipeline_parallel_size": 2}, "num_scheduler_steps=4: must be 1 with pipeline_par"),
        ({"collective_timeout_seconds": 0}, "must be a number greater than 0"),
        ({"runaway_max_period": 200}, "must be at most half of runaway_min_tokens=256"),
        (
            {"quantization": "fp8"},
            "quantization=fp8: must be one of int8, int4, gptq, awq, compressed-tensors, gguf, dequantize, or none",
        ),
        ({"quantization": "int4", "quantization_group_size": 48}, "must be 32, 64 or 128, or auto"),
        ({"quantization": "int8", "quantization_group_size": 64}, "needs quantization=int4"),
        (
            {"speculative_config": {"method": "medusa"}},
            "method='medusa' is not one of them: it must be one of ngram, suffix, grammar, draft_model, eagle3",
        ),
        (
            {"speculative_config": {"method": "draft_model"}},
            "method draft_model needs model, the directory or the Hugging",
        ),
        (
            {"speculative_config": {"method": "draft_model", "quantization": "fp8"}},
            "quantization='fp8' must be one of int8, int4",
        ),
        (
            {"speculative_config": {"method": "ngram", "quantization": "int4"}},
            "'quantization' is not a key of method ngram",
        ),
    ],
)
def test_construction_refuses_what_cannot_work(settings: dict, message: str) -> None:
    assert message in problem_of(**settings)


def test_all_problems_are_told_at_once() -> None:
    message = problem_of(http_port=-1, dtype="x", quantization="fp8")
    assert message.startswith("3 settings are wrong:")
    assert all(key in message for key in ("http_port=-1", "dtype=x", "quantization=fp8"))


def test_two_free_ports_do_not_collide() -> None:
    assert PagodaConfig(http_port=0, grpc_port=0).grpc_port == 0


def test_secrets_are_in_no_representation_and_no_error() -> None:
    assert "s3cret" not in repr(PagodaConfig(api_keys=("s3cret",)))
    assert "s3cret" not in problem_of(api_keys=["s3cret"])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "demo"),
        ("/mnt/models/", "models"),
        ("org/Qwen3-0.6B", "Qwen3-0.6B"),
        ("./my model", "my-model"),
        ("..", "demo"),
    ],
)
def test_the_model_name_follows_the_model(model: str | None, name: str) -> None:
    assert default_model_name(model) == name
    assert PagodaConfig(model=model).served_model_name == name


def test_python_callers_get_suggestions_aliases_and_sizes() -> None:
    config = from_kwargs({"model": "org/name", "kv_cache_memory_bytes": "2GiB", "api_keys": ["a"]})
    assert (config.model_name, config.kv_cache_memory_bytes, config.api_keys) == ("name", 2 * 2**30, ("a",))
    assert from_kwargs({"model_dir": "org/name"}).model == "org/name"
    with pytest.raises(ConfigError, match=r"max_num_seq .argument.: unknown setting; did you mean max_num_seqs"):
        from_kwargs({"max_num_seq": 1})
    with pytest.raises(ConfigError, match=r"model_dir=b .argument model_dir.: contradicts model=a"):
        from_kwargs({"model": "a", "model_dir": "b"})


def test_python_callers_need_neither_pydantic_nor_yaml_nor_torch() -> None:
    script = """
import sys
from dataclasses import replace
for name in ("pydantic", "yaml", "torch", "numpy"):
    sys.modules[name] = None
from pagoda.config import PagodaConfig, from_kwargs
from pagoda.engine.core.auto import resolve
from pagoda.platform.hardware import cpu_report, memory_report
from pagoda.errors import ConfigError
resolve(from_kwargs({"max_num_seqs": 4}), checkpoint_dtype="float32", cpu=cpu_report())
try:
    PagodaConfig(http_port=-1)
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("http_port=-1: must be an integer")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("1.5KiB", 1536),
        ("2Gi", 2 * 2**30),
        ("2G", 2 * 10**9),
        ("3 mb", 3 * 10**6),
        ("7B", 7),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_read_as_kubernetes_writes_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1PiB", "2 lions", "1iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


def test_sizes_are_printed_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**30)] == ["0 B", "1023 B", "1.50 KiB", "1.00 GiB"]


def test_the_json_schema_is_the_same_schema() -> None:
    schema = schema_json()
    json.dumps(schema)
    assert list(schema["properties"]) == list(options())
    assert schema["additionalProperties"] is False
    for key, node in schema["properties"].items():
        assert node["description"] == options()[key].help
        default = option_defaults()[key]
        assert node["default"] == (list(default) if isinstance(default, tuple) else default)
    assert schema["properties"]["http_port"]["maximum"] == 65535
    assert {"const": "auto"} in schema["properties"]["max_model_len"]["anyOf"]
    assert any(form.get("type") == "string" for form in schema["properties"]["kv_cache_memory_bytes"]["anyOf"])
    assert any(form.get("type") == "string" for form in schema["properties"]["max_body_bytes"]["anyOf"])
    assert schema["properties"]["api_keys"]["writeOnly"] is True


def test_what_a_core_and_its_ranks_get_holds_no_secret_and_is_a_configuration() -> None:
    config = PagodaConfig(api_keys=("s3cret",), api_keys_file="/keys", anonymous_scopes=("read",), max_num_seqs=7)
    fields = config.without_secrets()
    assert "s3cret" not in repr(fields)
    assert set(options()) - set(fields) == {"api_keys", "api_keys_file", "anonymous_scopes"}
    open_to_all = replace(config, api_keys=(), api_keys_file=None, anonymous_scopes=())
    assert PagodaConfig.of_fields(json.loads(json.dumps(fields))) == open_to_all
