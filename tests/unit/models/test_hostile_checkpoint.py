"""A checkpoint that anyone may have made: each fault is one sentence, soon, and nothing outside of the directory is read."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.errors import CheckpointError
from pagoda.models import checkpoint_files
from pagoda.models.checkpoint_files import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    MAX_NUMBER_DIGITS,
    checkpoint_file,
    read_file,
    read_json_object,
)
from pagoda.models.config import ModelConfig
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.loading.checkpoint import MAX_HEADER_BYTES, stored_tensors
from pagoda.models.loading.loader import check_weights
from pagoda.models.weight_files import weight_files

SECRET = "what the checkpoint must not get at"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dummy_checkpoint(tmp_path_factory.mktemp("sound") / "checkpoint", DummySpec(num_layers=1))


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    """A sound checkpoint to spoil, beside a file that is none of its business."""
    (tmp_path / "secret.json").write_text(json.dumps({"secret": SECRET}))
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    """Fails where Python takes more than `most` bytes meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def refused(call: Any, *arguments: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        call(*arguments)
    message = str(caught.value)
    assert SECRET not in message
    assert len(message) < 1000
    assert "\n" not in message


def set_values(checkpoint: Path, file: str = "config.json", **values: Any) -> None:
    path = checkpoint / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- which files are read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.json", "a/../../secret.json", "/etc/passwd", "", ".", "a\0b", "x" * 300, "\ud800"]
)
def test_names_that_leave_the_directory_or_are_none_are_refused(checkpoint: Path, name: str) -> None:
    refused(checkpoint_file, checkpoint, name, match="named relative to its directory|it must be a regular file")


@pytest.mark.parametrize("target", ["../secret.json", "/etc/passwd", "inner/../../secret.json"])
def test_links_that_leave_the_directory_are_refused(checkpoint: Path, target: str) -> None:
    (checkpoint / "inner").mkdir()
    (checkpoint / "link.json").symlink_to(target)
    refused(read_json_object, checkpoint, "link.json", match="link.json is a link to .*outside of the checkpoint")


def test_a_directory_that_is_a_link_out_is_refused(checkpoint: Path) -> None:
    (checkpoint / "inner").symlink_to(checkpoint.parent)
    refused(read_json_object, checkpoint, "inner/secret.json", match="outside of the checkpoint")


def test_links_inside_a_directory_that_is_itself_a_link_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    """As volumes of ConfigMaps and Secrets have them, and a model that an init container left behind a link."""
    (checkpoint / "..2026_01").mkdir()
    (checkpoint / "config.json").rename(checkpoint / "..2026_01" / "config.json")
    (checkpoint / "..data").symlink_to("..2026_01")
    (checkpoint / "config.json").symlink_to("..data/config.json")
    (tmp_path / "models").symlink_to(checkpoint)
    assert ModelConfig.from_directory(tmp_path / "models").num_layers == 1


def test_a_snapshot_of_the_hubs_cache_has_its_blobs_and_no_more(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert check_weights(ModelConfig.from_directory(snapshot), None, snapshot)
    (repository / "refs").write_text("{}")
    (snapshot / "other.json").symlink_to("../../refs")
    refused(read_json_object, snapshot, "other.json", match="outside of the checkpoint")


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a socket", "a device"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
@pytest.mark.timeout(60)
def test_only_regular_files_are_opened(checkpoint: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint / name
    path.unlink()
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        monkeypatch.chdir(checkpoint)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    else:
        # Nobody but root can make one, so a link must do.
        monkeypatch.setattr(checkpoint_files, "_is_inside", lambda path, root: True)
        path.symlink_to("/dev/zero")

    def load() -> None:
        check_weights(ModelConfig.from_directory(checkpoint), None, checkpoint)

    refused(load, match=f"{name} is {kind}: it must be a regular file")


def test_a_file_beyond_its_bound_is_not_read(checkpoint: Path) -> None:
    with (checkpoint / "config.json").open("r+b") as file:
        file.truncate(3 << 30)  # a sparse file takes no room
    with little_memory(1 << 20):
        refused(ModelConfig.from_directory, checkpoint, match=f"3221225472 bytes; at most {MAX_JSON_BYTES} are allowed")
        refused(read_file, checkpoint, "config.json", 100, match="at most 100 are allowed")


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "../../../../../etc/passwd", "inner/../../x"])
def test_an_index_cannot_name_files_elsewhere(checkpoint: Path, name: str) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(weight_files, checkpoint, match="must be named relative to its directory")


def test_an_index_of_missing_files_names_a_few_of_them(checkpoint: Path) -> None:
    index = {"weight_map": {str(number): "x" * 200 + str(number) for number in range(1000)}}
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names files that do not exist: .* and 992 more") as caught:
        weight_files(checkpoint)
    assert len(str(caught.value)) < 3000


# ---- JSON --------------------------------------------------------------------------------------------------------------

BAD_JSON = {
    "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "deep lists": ('{"a":' + "[" * 100_000, "nested too deeply"),
    "a level too deep": (
        '{"a":' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}",
        f"at most {MAX_JSON_DEPTH} levels",
    ),
    "many values": ('{"a":[' + "0," * MAX_JSON_VALUES + "0]}", f"at most {MAX_JSON_VALUES} are allowed"),
    "many empty objects": ('{"a":[' + "{}," * MAX_JSON_VALUES + "0]}", f"at most {MAX_JSON_VALUES} are allowed"),
    "digits that Python refuses": ('{"a":' + "1" * 5000 + "}", "a number of 5000 digits; at most 400"),
    "more digits": ('{"a":-' + "1" * 1_000_000 + "}", "a number of 1000001 digits"),
    "digits of a fraction": ('{"a":0.' + "1" * 1_000_000 + "}", "a number of 1000002 digits"),
    "a key twice": ('{"a":1,"b":{"c":1,"c":2}}', "the key 'c' twice"),
    "half a pair": ('{"a":"\\ud800"}', "not valid Unicode"),
    "half a pair as a key": ('{"\\udc00":1}', "not valid Unicode"),
    "no UTF-8": (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
    "nothing": ("", "not valid JSON"),
    "zeros": (b"\0" * 100, "not valid JSON"),
    "a list": ("[]", "must hold a JSON object, found list"),
    "a control character": ('{"a":"\n"}', "not valid JSON"),
}


@pytest.mark.parametrize(("content", "match"), BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.timeout(60)
def test_json_beyond_the_bounds_is_refused_with_what_they_are(tmp_path: Path, content: str | bytes, match: str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(data)
    with little_memory(4 * len(data) + (4 << 20)):
        refused(read_json_object, tmp_path, "config.json", match=match)


def test_json_within_the_bounds_is_read(tmp_path: Path) -> None:
    values = {"a": "[" * 100, "n": 10 ** (MAX_NUMBER_DIGITS - 1), "x": [1.5, -3, None, True, "塔 🙂"], "d": {"e": {}}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_json_object(tmp_path, "config.json") == values
    (tmp_path / "config.json").write_text('{"a": NaN, "b": -Infinity}')
    assert read_json_object(tmp_path, "config.json")["b"] == float("-inf")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**30, "re:(", -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_parameters", "rope_scaling", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("attention_bias", "tie_word_embeddings", "hidden_act", "dtype", "torch_dtype", "quantization_config"),
    *("eos_token_id", "original_max_position_embeddings"),
]
ROPE_KEYS = [
    *("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale"),
    *("original_max_position_embeddings", "attention_factor"),
]
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "dynamic", "llama3", "yarn", "default"])},
    optional=dict.fromkeys(ROPE_KEYS, JSON_VALUES),
)
WEIGHTS = st.dictionaries(
    st.sampled_from(["num_bits", "type", "strategy", "group_size", "symmetric", "format"]), JSON_VALUES, max_size=4
)
QUANTIZATION = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["gptq", "awq", "compressed-tensors"])},
    optional=dict.fromkeys(("bits", "group_size", "version", "zero_point", "lm_head", "ignore", "format"), JSON_VALUES)
    | {
        "config_groups": st.dictionaries(st.text(max_size=3), st.just({}) | st.fixed_dictionaries({"weights": WEIGHTS}))
    },
)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON_VALUES | ROPE | QUANTIZATION, max_size=4),
    generation=st.dictionaries(
        st.sampled_from(["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample", "eos_token_id"]),
        JSON_VALUES,
        max_size=3,
    ),
    architecture=st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
)
def test_any_configuration_is_read_or_refused_in_a_sentence(
    changes: dict[str, Any], generation: dict[str, Any], architecture: str
) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    config = {"architectures": [architecture], **sizes, "num_attention_heads": 32, **changes}
    try:
        model = ModelConfig.from_dicts(config, generation)
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 1000
    else:
        assert 0 < model.max_context_length < 1 << 31
        assert 0 < model.num_parameters() < 1 << 63


BAD_NUMBERS = [0, -1, 10**12, 10**30, 1.5, 64.0, 1e400, float("nan"), True, "64", [64], {"a": 1}]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
)
def test_dimensions_that_no_model_has_are_refused_by_name(checkpoint: Path, key: str, value: Any) -> None:
    set_values(checkpoint, **{key: value})
    refused(
        ModelConfig.from_directory, checkpoint, match=f"config.json: {key} must be an integer of at least 1 and at most"
    )


NONSENSE = {
    "top_p": [1.5, -1, float("nan"), "0.9"],
    "temperature": [-1, 1e9, float("inf"), True],
    "top_k": [-5, 2.5, 1 << 40],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0, 1000],
    "do_sample": ["yes", 1],
    "eos_token_id": [-2, 1.5, "x", [[1]], [1] * 5000, 1 << 40, True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NONSENSE.items() for value in values])
def test_generation_defaults_that_no_request_could_ask_for_are_refused(checkpoint: Path, key: str, value: Any) -> None:
    set_values(checkpoint, "generation_config.json", **{key: value})
    refused(ModelConfig.from_directory, checkpoint, match=f"generation_config.json: {key} must be")


BAD_QUANTIZATION: dict[str, tuple[dict[str, Any], str]] = {
    "groups of 2^40": ({"quant_method": "gptq", "bits": 4, "group_size": 1 << 40}, "group_size must be an integer"),
    "no bits": ({"quant_method": "awq", "bits": float("nan"), "group_size": 32}, "bits must be an integer"),
    "many groups": (
        {"quant_method": "compressed-tensors", "config_groups": {str(number): {} for number in range(1000)}},
        "config_groups must be an object with at least 1 and at most 256 groups",
    ),
    "a pattern that takes for ever": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "a": {"targets": ["re:(?:a|b|ab|[a-z._0-9]|[a-z_.0-9]{2})*[!?]"], "weights": {"num_bits": 4}}
            },
        },
        "regular expressions for layers take longer than 2 s",
    ),
    "a nested pattern": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"targets": ["re:" + "(" * 500 + ")" * 500], "weights": {"num_bits": 4}}},
        },
        "no regular expression",
    ),
    "long patterns": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["x" * 5000]},
        "up to",
    ),
}


@pytest.mark.parametrize(("quantization", "match"), BAD_QUANTIZATION.values(), ids=BAD_QUANTIZATION.keys())
@pytest.mark.timeout(60)
def test_quantization_that_cannot_be_is_refused(checkpoint: Path, quantization: dict[str, Any], match: str) -> None:
    set_values(checkpoint, quantization_config=quantization)
    refused(ModelConfig.from_directory, checkpoint, match=match)


# ---- weights -----------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, header: bytes, *, length: int | None = None, data: bytes = b"") -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def one_tensor(**fields: Any) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}).encode()


LIES: dict[str, dict[str, Any]] = {
    "a header of 2^60 bytes": {"header": one_tensor(), "length": 1 << 60},
    "a header of 2^64 - 1 bytes": {"header": one_tensor(), "length": (1 << 64) - 1},
    "a header longer than the file": {"header": one_tensor(), "length": 1000},
    "a header cut off": {"header": one_tensor()[:-5], "data": bytes(8)},
    "no header": {"header": b""},
    "no object": {"header": b"[]"},
    "no UTF-8": {"header": b'{"\xff": 1}'},
    "deep metadata": {"header": b'{"__metadata__":' + b'{"a":' * 10_000},
    "an unknown type": {"header": one_tensor(dtype="F1024"), "data": bytes(8)},
    "a shape of 2^62": {"header": one_tensor(shape=[1 << 62, 1 << 62]), "data": bytes(8)},
    "a negative shape": {"header": one_tensor(shape=[-2]), "data": bytes(8)},
    "a shape that is a fraction": {"header": one_tensor(shape=[2.5]), "data": bytes(8)},
    "a shape of other size": {"header": one_tensor(shape=[3]), "data": bytes(8)},
    "a tensor beyond the file": {"header": one_tensor(data_offsets=[0, 8]), "data": bytes(4)},
    "a tensor far beyond the file": {
        "header": one_tensor(shape=[1 << 40], data_offsets=[0, 1 << 42]),
        "data": bytes(8),
    },
    "offsets that run backwards": {"header": one_tensor(data_offsets=[8, 0]), "data": bytes(8)},
    "a gap": {"header": one_tensor(data_offsets=[8, 16]), "data": bytes(16)},
    "more data than tensors": {"header": one_tensor(), "data": bytes(100)},
    "overlapping tensors": {
        "header": json.dumps(
            {
                name: {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]}
                for name, start in (("x", 0), ("y", 4))
            }
        ).encode(),
        "data": bytes(12),
    },
    "a tensor twice": {
        "header": one_tensor()[:-1] + b"," + one_tensor(data_offsets=[8, 16])[1:],
        "data": bytes(16),
    },
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_headers_that_lie_are_refused(tmp_path: Path, lie: dict[str, Any]) -> None:
    write_safetensors(tmp_path / "model.safetensors", **lie)
    with little_memory(1 << 20):
        refused(stored_tensors, weight_files(tmp_path), match="model.safetensors is not a whole safetensors file")


def test_a_header_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", b"", length=MAX_HEADER_BYTES + 1)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 30)
    refused(stored_tensors, weight_files(tmp_path), match=f"at most {MAX_HEADER_BYTES} are allowed")


def test_names_and_shapes_from_a_header_are_shortened_in_errors(checkpoint: Path) -> None:
    header = {"x" * 100_000 + "\n": {"dtype": "F32", "shape": [1] * 10_000, "data_offsets": [0, 4]}}
    write_safetensors(checkpoint / "model.safetensors", json.dumps(header).encode(), data=bytes(4))
    with pytest.raises(CheckpointError, match=r"tensors of the model are missing.*1 tensors are unknown") as caught:
        check_weights(ModelConfig.from_directory(checkpoint), None, checkpoint)
    assert len(str(caught.value)) < 3000
    assert "\n" not in str(caught.value)


def test_a_configuration_larger_than_the_weights_takes_no_memory(checkpoint: Path) -> None:
    """64 TiB of weights are described; the process may take 4 GiB more than it has."""
    set_values(checkpoint, hidden_size=1 << 18, intermediate_size=1 << 20, num_hidden_layers=64, vocab_size=1 << 24)
    program = (
        "import resource, sys\n"
        "from pagoda.config.schema import PagodaConfig\n"
        "from pagoda.engine.core.startup import start_core\n"
        "from pagoda.errors import CheckpointError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)\n"
        "try:\n    start_core(PagodaConfig(model=sys.argv[1], threads=1))\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint)], capture_output=True, text=True, timeout=120
    )
    assert "has shape [512, 64], config.json makes it" in ended.stdout or "are missing" in ended.stdout, ended.stderr
    assert ended.returncode == 0
