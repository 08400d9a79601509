"""Where settings come from: order, spelling, and errors that name key, value, source and what is allowed."""

import json
from pathlib import Path

import pytest

from pagoda.config import load
from pagoda.config.command_line import options_help
from pagoda.config.environment import is_from_kubernetes
from pagoda.config.schema import options
from pagoda.errors import ConfigError


def problem_of(arguments: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(arguments, environ or {})
    return str(caught.value)


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_nothing_given_means_defaults_and_a_derived_name() -> None:
    loaded = load([], {})
    assert loaded.config.model_name == "demo"
    assert loaded.sources.pop("model_name") == "derived"
    assert set(loaded.sources.values()) == {"default"}
    assert list(loaded.sources) == [key for key in options() if key != "model_name"]


def test_command_line_beats_file_beats_environment_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path / "pagoda.yaml", "max_num_seqs: 2\nblock-size: 8\n")
    environ = {"PAGODA_MAX_NUM_SEQS": "3", "PAGODA_BLOCK_SIZE": "32", "PAGODA_SEED": "3"}
    loaded = load(["--max-num-seqs", "1", "--config", path], environ)
    config, sources = loaded.config, loaded.sources
    assert (config.max_num_seqs, sources["max_num_seqs"]) == (1, "command line --max-num-seqs")
    assert (config.block_size, sources["block_size"]) == (8, f"file {path}")
    assert (config.seed, sources["seed"]) == (3, "environment PAGODA_SEED")
    assert (config.http_port, sources["http_port"]) == (8080, "default")


def test_a_wrong_value_that_is_overridden_does_not_matter() -> None:
    assert load(["--seed=1"], {"PAGODA_SEED": "x"}).config.seed == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-model-len", "128"],
        ["--max_model_len", "128"],
        ["--max-model-len=128"],
        ["--max_model_len=128"],
        ["--max-model-len", "64", "--max_model_len=128"],
    ],
)
def test_dashes_and_underscores_are_the_same_and_the_later_counts(arguments: list[str]) -> None:
    assert load(arguments, {}).config.max_model_len == 128


def test_kserve_arguments_work(tmp_path: Path) -> None:
    config = load(["--model_name=llm", f"--model_dir={tmp_path}", "--http_port", "9000"], {}).config
    assert (config.model, config.model_name, config.http_port) == (str(tmp_path), "llm", 9000)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--enable-prefix-caching"], True),
        (["--no-enable-prefix-caching"], False),
        (["--no_enable_prefix_caching"], False),
        (["--enable-prefix-caching=false"], False),
        (["--enable-prefix-caching", "false"], False),
        (["--enable-prefix-caching=yes"], True),
        (["--no-enable-prefix-caching", "--enable-prefix-caching"], True),
    ],
)
def test_booleans(arguments: list[str], expected: bool) -> None:
    assert load(arguments, {}).config.enable_prefix_caching is expected


def test_lists_sizes_and_words() -> None:
    config = load(
        ["--api-keys", "a,b", "--api-keys", '["c,d"]', "--max-body-bytes", "2MiB", "--max-model-len=auto"],
        {"PAGODA_REQUEST_TIMEOUT_SECONDS": "1.5", "PAGODA_DEFAULT_MAX_TOKENS": "none"},
    ).config
    assert config.api_keys == ("a", "b", "c,d")
    assert config.max_body_bytes == 2 * 2**20
    assert config.max_model_len is None
    assert config.request_timeout_seconds == 1.5
    assert config.default_max_tokens is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-seq=2"], "--max-num-seq (command line): unknown option; did you mean --max-num-seqs?"),
        (["--qqq"], "--qqq (command line): unknown option"),
        (["--no-such", "4"], "--no-such (command line): unknown option"),
        (["./model"], "./model (command line): unexpected; every setting has a name, as in --model DIR"),
        (["--seed"], "--seed (command line): needs a value"),
        (["--seed", "--dtype=auto"], "--seed (command line): needs a value"),
        (["--no-enable-prefix-caching=true"], "takes no value"),
        (
            ["--http-port=x"],
            "http_port=x (command line --http-port): must be an integer of at least 0 and at most 65535",
        ),
        (["--http-port", "-1"], "http_port=-1 (command line --http-port)"),
        (["--http-port=8080.5"], "http_port=8080.5"),
        (["--max-body-bytes=big"], "max_body_bytes=big (command line --max-body-bytes): must be an integer"),
        (["--max-body-bytes=1B"], "of at least 1024, or a size such as 512MiB"),
        (["--enable-prefix-caching=maybe"], "enable_prefix_caching=maybe"),
        (["--dtype=float8"], "must be one of auto, float32, bfloat16, float16"),
        (["--kv-cache-watermark=nan"], "kv_cache_watermark=nan"),
        (["--speculative-config={"], "speculative_config={ (command line --speculative-config): must be a JSON object"),
        (["--model=/does/not/exist"], "model=/does/not/exist (command line --model): there is no such directory"),
        (["--chat-template=/no"], "chat_template=/no (command line --chat-template): there is no such file"),
        (["--grpc-port=8080"], "grpc_port=8080 (command line --grpc-port): must differ from http_port"),
        (
            ["--data_parallel_size=2", "--ray_address=auto"],
            "data_parallel_size=2 (command line --data_parallel_size): must be 1 with Ray",
        ),
        (["--model=a", "--model_dir=b"], "model_dir=b (command line --model_dir): contradicts model=a"),
        (["--config=/does/not/exist"], "--config=/does/not/exist: cannot be read"),
    ],
)
def test_errors_of_the_command_line(arguments: list[str], message: str) -> None:
    assert message in problem_of(arguments)


def test_two_names_of_a_setting_may_agree_or_come_from_different_sources(tmp_path: Path) -> None:
    assert load([f"--model={tmp_path}", f"--model_dir={tmp_path}"], {}).config.model == str(tmp_path)
    assert load(["--model_dir=a"], {"PAGODA_MODEL": "b"}).config.model == "a"


def test_problems_of_all_sources_come_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "pagoda.yaml", "dtype: float8\nmax_modle_len: 1\n")
    message = problem_of(["--config", path, "--seed=x", "--foo"], {"PAGODA_HTTP_PRT": "1", "PAGODA_BLOCK_SIZE": "12"})
    assert message.startswith("6 settings are wrong:")
    for part in (
        f"dtype=float8 (file {path})",
        f"max_modle_len (file {path}): unknown setting; did you mean max_model_len?",
        "seed=x (command line --seed)",
        "--foo",
        "PAGODA_HTTP_PRT (environment): unknown setting; did you mean PAGODA_HTTP_PORT?",
        "block_size=12 (environment PAGODA_BLOCK_SIZE): must be a power of two",
    ):
        assert part in message


def test_secrets_appear_in_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "pagoda.yaml", "api_keys: {hidden1: hidden1}\n")
    assert "hidden" not in problem_of(
        ["--api-keys", "[hidden2", "--api-keys", "x", "hidden3"], {"PAGODA_API_KEYS": "[hidden4"}
    )
    assert "hidden" not in problem_of(["--config", path])
    assert "hidden" not in problem_of([], {"PAGODA_API_KEYS": '["hidden5"'})
    assert "hidden" not in problem_of(["--api-keys", "hidden6,"])
    assert "hidden" not in repr(load(["--api-keys", "hidden7"], {}))


def test_variables_that_kubernetes_makes_for_services_are_ignored() -> None:
    environ = {
        "PAGODA_PORT": "tcp://10.0.0.1:80",
        "PAGODA_SERVICE_HOST": "10.0.0.1",
        "PAGODA_SERVICE_PORT": "80",
        "PAGODA_SERVICE_PORT_HTTP1": "80",
        "PAGODA_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "PAGODA_PORT_8080_TCP_ADDR": "10.0.0.1",
        "PAGODA_PORT_8080_TCP_PROTO": "tcp",
        "PAGODA_PORT_8080_TCP_PORT": "8080",
        # Services named pagoda-head, pagoda-http and pagoda-max-model-len
        "PAGODA_HEAD_SERVICE_HOST": "10.0.0.2",
        "PAGODA_HEAD_PORT_6379_TCP": "tcp://10.0.0.2:6379",
        "PAGODA_HTTP_PORT": "tcp://10.0.0.3:80",
        "PAGODA_HTTP_PORT_80_TCP_PROTO": "tcp",
        "PAGODA_MAX_MODEL_LEN_PORT": "udp://10.0.0.4:53",
        # and what is not ours
        "PAGODAX": "1",
        "PATH": "/bin",
    }
    assert all(is_from_kubernetes(name, value) for name, value in environ.items() if name.startswith("PAGODA_"))
    assert load([], environ).config == load([], {}).config


def test_the_key_of_commands_that_ask_a_server_is_no_setting_of_one() -> None:
    assert load([], {"PAGODA_ADMIN_KEY": "a-key"}).config == load([], {}).config


def test_other_variables_with_our_prefix_are_errors() -> None:
    assert "PAGODA_PORT (environment): unknown setting" in problem_of([], {"PAGODA_PORT": "8080"})
    assert "did you mean PAGODA_MODEL_NAME?" in problem_of([], {"PAGODA_MODEL_NAMES": "x"})
    assert load([], {"PAGODA_HTTP_PORT": "9000"}).config.http_port == 9000


def test_an_empty_variable_is_not_given() -> None:
    loaded = load([], {"PAGODA_MAX_MODEL_LEN": ""})
    assert loaded.sources["max_model_len"] == "default"


@pytest.mark.parametrize("text", ["", " ", ",", "a,,b", "[]", "a b", "schlüssel", "sha256:abc", "a, a"])
def test_keys_that_are_none_leave_no_server_open(tmp_path: Path, text: str) -> None:
    assert "api_keys" in problem_of([], {"PAGODA_API_KEYS": text}).lower()
    assert "api_keys" in problem_of([f"--api-keys={text}"])
    file = write(tmp_path / "p.json", json.dumps({"api_keys": text}))
    assert "api_keys" in problem_of([f"--config={file}"])


def test_neither_does_an_empty_list_nor_an_empty_name_of_a_file(tmp_path: Path) -> None:
    empty = write(tmp_path / "p.json", json.dumps({"api_keys": []}))
    assert "api_keys" in problem_of([f"--config={empty}"])
    for arguments, environ in ((["--api-keys-file="], {}), ([], {"PAGODA_API_KEYS_FILE": ""})):
        assert "is empty, which would leave the server open" in problem_of(arguments, environ)
    assert "no such file or directory" in problem_of([f"--api-keys-file={tmp_path / 'none'}"])


def test_whitespace_around_keys_is_no_part_of_them() -> None:
    assert load([], {"PAGODA_API_KEYS": " a ,\tb\n"}).config.api_keys == ("a", "b")


@pytest.mark.parametrize("scopes", ["everything", "read,everything", "read"])
def test_anonymous_scopes_are_scopes_and_need_keys(scopes: str) -> None:
    assert "anonymous_scopes" in problem_of([f"--anonymous-scopes={scopes}"])


@pytest.mark.parametrize("name", ["pagoda.yaml", "pagoda.json"])
def test_files_in_yaml_and_json(tmp_path: Path, name: str) -> None:
    settings = {
        "max-model-len": None,
        "seed": 7,
        "api_keys": ["a", "b"],
        "max_body_bytes": "1MiB",
        "grace_period_seconds": 5,
    }
    path = write(tmp_path / name, json.dumps(settings))
    for loaded in (load(["--config", path], {}), load([], {"PAGODA_CONFIG": path})):
        config = loaded.config
        assert (config.max_model_len, config.seed, config.api_keys) == (None, 7, ("a", "b"))
        assert (config.max_body_bytes, config.grace_period_seconds) == (2**20, 5.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "seed: '7'\nhttp_port: true\n", "http_port=True (file"),
        ("a.yaml", "enable_prefix_caching: 1\n", "enable_prefix_caching=1 (file"),
        ("a.yaml", "model_name: 123\n", "model_name=123 (file"),
        ("a.yaml", "seed: null\n", "seed=None (file"),
        ("a.yaml", "seed: 1\nseed: 2\n", "seed is given twice"),
        ("a.yaml", "max-model-len: 1\nmax_model_len: 2\n", "max_model_len is given twice"),
        ("a.yaml", "model: a\nmodel_dir: b\n", "model_dir=b (file"),
        ("a.yaml", "- seed\n", "must hold a mapping"),
        ("a.yaml", "seed: [", "is not YAML"),
        ("a.json", '{"seed": 1, "seed": 2}', "seed is given twice"),
        ("a.json", "{", "is not JSON"),
    ],
)
def test_errors_of_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    assert message in problem_of(["--config", write(tmp_path / name, content)])


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    assert load(["--config", write(tmp_path / "a.yaml", "# nothing\n")], {}).config == load([], {}).config


def test_help_lists_every_setting_once() -> None:
    text = options_help()
    for key in options():
        dashed = key.replace("_", "-")
        assert text.count(f"  --{dashed} ") + text.count(f"  --[no-]{dashed}\n") == 1, key
