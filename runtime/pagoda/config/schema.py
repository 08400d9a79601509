"""The one schema: every setting of Pagoda, with its type, default, bounds and help text.

Everything that uses the settings reads them from here: the command line and its `--help`, files, environment variables, the
checks, the JSON schema for the Helm chart, `pagoda doctor`, docs/configuration.md. Needs the standard library only, so
the engine and `pagoda probe` can use it on a bare machine.

`None` means "chosen when the engine starts" where `OptionInfo.auto` says so, and "off" or "not given" elsewhere; text
sources write `auto` and `none`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pagoda.config.kv_events import KVEventsConfig
from pagoda.config.option import OptionInfo, option, option_of
from pagoda.config.rules import Rules, raise_problems
from pagoda.config.speculation import SpeculativeConfig
from pagoda.platform.cpu_sets import CPU_SETS_PATTERN

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PagodaConfig:
    """Every setting. Construction validates: `ConfigError` names each wrong field, its value and what is allowed.

    Sizes are bytes, times seconds, lengths tokens. After `pagoda.config.load` (and so everywhere in the server)
    `model_name` is set; constructed by hand without one it is derived in the same way by `served_model_name`.
    """

    # Model
    model: str | None = option(
        None,
        "model",
        "Checkpoint: a directory in Hugging Face format, or a Hugging Face id. None: the built-in demo model.",
        path="checkpoint",
        aliases=("model_dir",),
    )
    model_name: str | None = option(
        None,
        "model",
        "Name of the model in requests and metrics. Default: the directory's name, or `demo` when no model is given.",
        pattern=r"\S+",
        pattern_help="without spaces",
        aliases=("served_model_name",),
    )
    model_aliases: tuple[str, ...] = option(
        (),
        "model",
        "Further names of the model in requests; /v1/models lists them, and --served-model-name NAME ALIAS … gives them, too. "
        "The id of a model of the Hugging Face hub is one by itself where no model_name is given.",
    )
    revision: str | None = option(
        None,
        "model",
        "Branch, tag or commit of a model of the Hugging Face hub; None: main.",
        pattern=r"[\w][\w./-]*",
        pattern_help="that is a branch, a tag or a commit",
    )
    download_dir: str | None = option(
        None, "model", "Where models of the Hugging Face hub are kept; None: its own cache (HF_HUB_CACHE)."
    )
    tokenizer: str | None = option(
        None, "model", "Directory of the tokenizer, where it is not the model's own.", path="directory"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "model", "Type of weights and activations; auto follows the checkpoint and what the device does well."
    )
    quantization: Literal["int8", "int4", "gptq", "awq", "compressed-tensors"] | None = option(
        None,
        "model",
        "Bits of the weights, rounded when they are loaded: int8, one scale for each output, or int4, in groups. None: as the "
        "checkpoint is; quantized ones are recognized, and naming their method (gptq, awq, compressed-tensors) asserts it.",
    )
    quantization_group_size: int | None = option(
        None,
        "model",
        "Inputs that share a scale with quantization=int4: 32, 64 or 128; auto: 64 where that divides the layers' sizes, "
        "else 32.",
        ge=32,
        le=128,
        auto=True,
    )
    load_format: Literal["auto", "safetensors", "dummy"] = option(
        "auto",
        "model",
        "Where weights come from: safetensors files (auto), or random numbers of the right shape (dummy).",
    )
    generation_config: Literal["auto", "none"] = option(
        "auto", "model", "Take sampling defaults and end tokens from the checkpoint's generation_config.json, or not."
    )
    override_generation_config: Mapping[str, Any] | None = option(
        None,
        "model",
        'Values in place of those of generation_config.json, as a JSON object: {"temperature": 0.6}. Taken with '
        "generation_config=none, too.",
    )
    default_max_tokens: int | None = option(
        None,
        "model",
        "max_tokens of a request that gives none; None: max_new_tokens of the checkpoint's generation_config.json, else "
        "whatever fits below max_model_len.",
        ge=1,
    )
    trust_remote_code: bool = option(False, "model", "Let the checkpoint's tokenizer run Python code of its own.")
    seed: int = option(0, "model", "Seed of dummy weights and of requests that give no seed of their own.", ge=0)

    # Device
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device", "Where the model runs; auto: cuda if there is one."
    )
    threads: int | None = option(
        None, "device", "CPU threads of the engine; auto: the physical cores this container may use.", ge=1, auto=True
    )
    cpu_thread_affinity: str = option(
        "auto",
        "device",
        "Logical cores that compute threads are bound to: none, or a list for each rank of this machine, such as 0-3|4-7. "
        "Auto: one of each physical core, other ones for each rank and replica, where logical cores are left over and there "
        "is no CPU quota.",
        pattern=rf"auto|none|{CPU_SETS_PATTERN}",
        pattern_help="that is auto, none, or a list of cores such as 0-3,8 for each rank, with | between",
    )
    cpu_kernels: Literal["auto", "compiled", "reference"] = option(
        "auto",
        "device",
        "Kernels on a CPU: compiled C++, or torch's own operations (reference). Auto: compiled, torch's own where they are "
        "not installed and cannot be built.",
    )

    enforce_eager: bool = option(
        False, "device", "On a GPU: launch every operation of every step separately, without CUDA graphs."
    )

    # KV cache
    max_model_len: int | None = option(
        None,
        "kv",
        "Longest sequence, prompt and output together; auto: the model's own limit, or less if the KV cache holds less.",
        ge=1,
        unit="tokens",
        auto=True,
    )
    block_size: int = option(16, "kv", "Tokens in a KV block; a power of two.", ge=1, le=256, unit="tokens")
    kv_cache_memory_bytes: int | None = option(
        None,
        "kv",
        "Memory of the KV cache; auto: a share of what the weights leave free.",
        ge=1,
        unit="bytes",
        auto=True,
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = option(
        "auto",
        "kv",
        "Type of keys and values in the KV cache; auto: the model's. fp8 (that is fp8_e4m3; GPUs of capability 8.9 and later) "
        "and fp8_e5m2 (8.0 and later) are half as large as bfloat16 and half the traffic, but rounded; their scales are the "
        "checkpoint's k_scale and v_scale, else 1.",
    )
    num_gpu_blocks_override: int | None = option(
        None, "kv", "Exact number of KV blocks on any device, block 0 included, which holds no tokens.", ge=2
    )
    gpu_memory_utilization: float = option(
        0.9, "kv", "Share of the GPU's memory that weights, activations and KV cache may take together.", gt=0, le=1
    )
    enable_prefix_caching: bool = option(True, "kv", "Reuse the KV blocks of equal prompt beginnings.")
    kv_events_config: Mapping[str, Any] | None = option(
        None,
        "kv",
        "Publish changes of the prefix cache over ZeroMQ, for routers that send requests to cached prefixes: a JSON object "
        'with vLLM\'s keys, such as {"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}. Events hold the token ids '
        "of prompts, and ZeroMQ has no authentication: let only the router reach the port. None: off.",
    )

    # Scheduler
    max_num_seqs: int | None = option(
        None, "scheduler", "Most sequences in one step; auto: by device and KV cache.", ge=1, le=4096, auto=True
    )
    max_num_batched_tokens: int | None = option(
        None,
        "scheduler",
        "Most tokens in one step; longer prompts are computed in chunks. Auto: by device.",
        ge=1,
        unit="tokens",
        auto=True,
    )
    long_prefill_token_threshold: int | None = option(
        None,
        "scheduler",
        "Most tokens of one prompt in a step; 0: only max_num_batched_tokens counts. Auto: beside requests that generate, as "
        "many tokens of prompts as make their step up to 1.75 times as long, by measured times; without any no limit.",
        ge=0,
        unit="tokens",
        auto=True,
    )
    scheduling_policy: Literal["fcfs", "priority"] = option(
        "fcfs",
        "scheduler",
        "Order of one tenant's waiting requests: by arrival, or by their priority (lower first), then by arrival. Tenants (of "
        "API keys) share the engine by their weights, whatever priorities their requests have.",
    )
    max_num_waiting: int = option(
        1024,
        "scheduler",
        "Most requests that wait; one more is answered 429, but from a tenant with less than an equal part of them.",
        ge=1,
    )
    kv_cache_watermark: float = option(
        0.02, "scheduler", "Share of KV blocks kept free when a waiting request is let in.", ge=0, lt=1
    )
    max_preemptions: int = option(
        4, "scheduler", "Times a request may be preempted before it is protected from it.", ge=0
    )
    num_scheduler_steps: int = option(
        1, "scheduler", "Model steps on one plan while a batch only decodes; new requests wait as long.", ge=1, le=64
    )

    # Speculative decoding
    speculative_config: Mapping[str, Any] | None = option(
        None,
        "speculation",
        "Speculative decoding, as a JSON object with vLLM's keys: method (ngram, suffix, draft_model), num_speculative_tokens "
        "(the most drafts of a sequence in a step), and those of the method. None: off.",
    )

    # Parallelism
    tensor_parallel_size: int = option(1, "parallel", "Ranks that share every layer, each with its heads.", ge=1)
    pipeline_parallel_size: int = option(1, "parallel", "Stages, each with its part of the layers.", ge=1)
    data_parallel_size: int = option(
        1, "parallel", "Replicas of the engine on this machine, behind one endpoint.", ge=1
    )
    distributed_executor_backend: Literal["auto", "mp", "ray"] = option(
        "auto",
        "parallel",
        "Where ranks run: processes of this machine (mp), or actors of a Ray cluster (ray). Auto: ray where ray_address is "
        "given, mp for more than one rank, and no process but the engine's for one.",
    )
    ray_address: str | None = option(
        None,
        "parallel",
        "The Ray cluster: `auto` for the one this machine belongs to, or HOST:PORT of its head. None: one is started here.",
        pattern=r"auto|\S+:\d+",
        pattern_help="that is auto or HOST:PORT",
    )
    ray_num_cpus: int | None = option(
        None,
        "parallel",
        "Ranks without a GPU that fit this machine, as head that is started here or by pagoda join. None: its cores.",
        ge=1,
    )
    ray_first_port: int | None = option(
        None,
        "parallel",
        "First of the 100 ports that Ray takes on this machine besides the head's 6379: node manager, object manager, and its "
        "other processes. None: any that are free.",
        ge=1024,
        le=65435,
    )
    network_interface: str | None = option(
        None,
        "parallel",
        "Network interface of the traffic between ranks, such as eth0; None: the one on the route to the engine.",
        pattern=r"[^\s/]+",
        pattern_help="that is an interface's name",
    )
    rendezvous_timeout_seconds: float = option(
        120.0,
        "parallel",
        "Longest time for each of: all ranks are started, connected, checked.",
        gt=0,
        unit="seconds",
    )
    collective_timeout_seconds: float = option(
        20.0,
        "parallel",
        "Timeout of collectives in a step of up to 512 tokens (longer steps: in proportion). Below "
        "engine_stall_timeout_seconds the error names the rank.",
        gt=0,
        unit="seconds",
    )
    rank_heartbeat_timeout_seconds: float = option(
        10.0,
        "parallel",
        "Longest time without a heartbeat from a rank, or from the engine to its ranks, before it counts as failed.",
        gt=0,
        unit="seconds",
    )

    # Server
    host: str = option("0.0.0.0", "server", "Address to listen on.", pattern=r"\S+", pattern_help="an address")
    http_port: int = option(8080, "server", "Port of REST and OpenAI routes; 0: any free one.", ge=0, le=65535)
    grpc_port: int = option(8081, "server", "Port of gRPC; 0: any free one.", ge=0, le=65535)
    api_keys: tuple[str, ...] = option(
        (),
        "server",
        "Keys of which a client must send one, each itself or as `sha256:` and its digest; with neither these nor "
        "api_keys_file no key is asked for. They may infer, and nothing else.",
        secret=True,
        guards=True,
    )
    api_keys_file: str | None = option(
        None,
        "server",
        "File of API keys, or directory of such files, as a Secret is mounted: one key a line, or YAML or JSON records with "
        "scopes, tenant and limits. Read again when it changes.",
        path="file or directory",
        guards=True,
    )
    anonymous_scopes: tuple[str, ...] = option(
        (),
        "server",
        "What is allowed without a key where there are keys: some of infer, read (metrics and details of health) and admin.",
    )
    ssl_certfile: str | None = option(
        None, "server", "PEM file of the certificate chain; together with ssl_keyfile.", path="file"
    )
    ssl_keyfile: str | None = option(
        None, "server", "PEM file of the private key; together with ssl_certfile.", path="file"
    )

    allowed_origins: tuple[str, ...] = option(
        (),
        "server",
        "Origins (`https://app.example.com`, or `*`) whose pages may ask this server in a browser (CORS); none: only its own.",
    )
    allowed_methods: tuple[str, ...] = option(("*",), "server", "Methods that pages of allowed_origins may use.")
    allowed_headers: tuple[str, ...] = option(("*",), "server", "Headers that pages of allowed_origins may send.")
    allow_credentials: bool = option(False, "server", "Whether pages of allowed_origins may send cookies.")
    disable_fastapi_docs: bool = option(False, "server", "Without /docs and /openapi.json, which describe the routes.")
    enable_tokenizer_info_endpoint: bool = option(
        False, "server", "With /tokenizer_info, which shows special tokens and chat templates to keys with `infer`."
    )

    # Limits and deadlines
    max_body_bytes: int = option(32 * 2**20, "limits", "Largest REST request body.", ge=1024, unit="bytes")
    max_header_bytes: int = option(
        64 * 2**10,
        "limits",
        "Largest REST request head, and most trailers behind a chunked body.",
        ge=1024,
        unit="bytes",
        aliases=("h11_max_incomplete_event_size",),
    )
    max_header_count: int = option(
        256, "limits", "Most headers of a REST request.", ge=16, aliases=("h11_max_header_count",)
    )
    max_grpc_message_bytes: int = option(32 * 2**20, "limits", "Largest gRPC message.", ge=1024, unit="bytes")
    max_connections: int = option(
        8192,
        "limits",
        "Most connections at once, to each of the two ports. REST: where all are taken, the one that waits longest for a "
        "request is closed for a new one; where none waits, a new one is answered 503.",
        ge=1,
        aliases=("limit_concurrency",),
    )
    max_connections_per_peer: int | None = option(
        None,
        "limits",
        "Most REST connections of one client address (IPv6: of one /64); a proxy is one. None: half of max_connections.",
        ge=1,
        aliases=("limit_conn",),
    )
    keep_alive_timeout_seconds: float = option(
        65.0,
        "limits",
        "Longest time that a REST connection may wait for a request; longer than the 60 s of the usual proxies, so that it is "
        "they who close it.",
        gt=0,
        unit="seconds",
        aliases=("timeout_keep_alive", "keepalive_timeout"),
    )
    header_timeout_seconds: float = option(
        30.0,
        "limits",
        "Longest time that the head of a REST request may take, and a TLS handshake; then 408.",
        gt=0,
        unit="seconds",
        aliases=("client_header_timeout",),
    )
    body_timeout_seconds: float = option(
        60.0,
        "limits",
        "Longest time without a byte of a request's body, and for the whole of it at less than 1 KiB a second; then 408, in "
        "gRPC DEADLINE_EXCEEDED.",
        gt=0,
        unit="seconds",
        aliases=("client_body_timeout",),
    )
    send_timeout_seconds: float = option(
        60.0,
        "limits",
        "Longest time in which a client may read nothing of a response that is there; then its request is aborted. A stream "
        "that has nothing to send is not concerned.",
        gt=0,
        unit="seconds",
        aliases=("send_timeout",),
    )
    request_timeout_seconds: float | None = option(
        None, "limits", "Longest time a request may take in all; None: no limit but the client's.", gt=0, unit="seconds"
    )
    max_request_seconds: float | None = option(
        None,
        "limits",
        "Time from arrival after which a request ends with what it has (finish reason `length`); None: no such limit.",
        gt=0,
        unit="seconds",
    )
    runaway_detection: Literal["off", "warn", "stop"] = option(
        "warn",
        "limits",
        "Repetition detection, on an output that repeats itself: off, log and count it, or stop the request.",
    )
    runaway_max_period: int = option(64, "limits", "Longest period that counts as repetition.", ge=1, unit="tokens")
    runaway_min_tokens: int = option(
        256, "limits", "Length of output that must repeat one period throughout.", ge=2, unit="tokens"
    )
    grace_period_seconds: float = option(
        30.0, "limits", "Drain: time that running requests have to finish after SIGTERM.", ge=0, unit="seconds"
    )
    engine_start_timeout_seconds: float = option(
        1800.0, "limits", "Longest time from start to ready; then the server exits.", gt=0, unit="seconds"
    )
    engine_stall_timeout_seconds: float = option(
        30.0,
        "limits",
        "Longest time without a heartbeat from the engine: idle, or in a step of up to 512 tokens (longer steps: in "
        "proportion). Then it counts as stuck and is killed.",
        gt=0,
        unit="seconds",
    )
    on_engine_failure: Literal["restart", "exit"] = option(
        "restart", "limits", "When the engine fails: restart it in place, or exit and leave the restart to Kubernetes."
    )
    max_engine_restarts: int = option(
        3, "limits", "Restarts in a row, with exponential backoff, before the server exits all the same.", ge=0
    )

    # Tokenizer and chat
    tokenizer_pool_size: int = option(2, "text", "Workers that tokenize.", ge=1, le=256)
    tokenizer_pool_type: Literal["thread", "process"] = option("thread", "text", "What a tokenizer worker is.")
    tokenizer_start_timeout_seconds: float = option(
        60.0, "text", "Longest time until the tokenizer workers are up.", gt=0, unit="seconds"
    )
    tokenizer_max_num_waiting: int = option(
        1024,
        "text",
        "Most texts that wait for a tokenizer worker; one more is answered 429, but from a tenant with less than an equal "
        "part of them.",
        ge=1,
    )
    tokenizer_timeout_seconds: float = option(
        30.0, "text", "Longest time one text may take to tokenize.", gt=0, unit="seconds"
    )
    structured_outputs_timeout_seconds: float = option(
        5.0,
        "text",
        "Longest time that compiling the grammar of a structured output may take; then 400.",
        gt=0,
        unit="seconds",
    )
    chat_template: str | None = option(
        None, "text", "File with a Jinja chat template, in place of the tokenizer's own.", path="file"
    )

    response_store_bytes: int = option(
        64 << 20,
        "text",
        "Memory for responses that `previous_response_id` may name, for an hour at most; 0: none is kept.",
        ge=0,
        unit="bytes",
    )
    tool_call_parser: str = option(
        "auto",
        "text",
        "Format of the model's tool calls, by vLLM's names (hermes, qwen3_coder, llama3_json, mistral, …); auto: as the "
        "checkpoint's files show; off: tools are refused.",
    )
    reasoning_parser: str = option(
        "auto",
        "text",
        "Format of the model's reasoning, by vLLM's names (qwen3, deepseek_r1, openai_gptoss, …); auto: as the checkpoint's "
        "files show; off: it stays in the content.",
    )

    # Logs and metrics
    metrics_prefix: str = option(
        "pagoda_",
        "observability",
        "Prefix of metric names; `vllm:` gives the names that dashboards made for vLLM read.",
        pattern=r"[a-zA-Z_:][a-zA-Z0-9_:]*",
        pattern_help="of letters, digits, `_` and `:`, with no digit first",
    )
    vllm_metric_names: bool = option(
        True,
        "observability",
        "Show metrics that vLLM has under its names (`vllm:…`), too, for endpoint pickers and dashboards that read those.",
    )
    fault_injection: str | None = option(
        None,
        "observability",
        "Fault injection, for tests: POINT[@REQUEST_PREFIX][#N]=ACTION, with commas between.",
    )
    disable_uvicorn_access_log: bool = option(False, "observability", "Log no line for each REST request.")
    disable_access_log_for_endpoints: tuple[str, ...] = option(
        (),
        "observability",
        "Paths whose REST requests are not logged, with commas between; those of probes and metrics that succeed never are.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "observability", "Least level logged.")
    log_format: Literal["text", "json"] = option("text", "observability", "Log lines for people, or one JSON each.")

    def __post_init__(self) -> None:
        raise_problems(rules().value_problems({name: getattr(self, name) for name in options()}))

    @property
    def served_model_name(self) -> str:
        """`model_name`, or the last part of the model's path or id, or `demo` without a model."""
        return self.model_name or default_model_name(self.model)

    @property
    def kv_events(self) -> KVEventsConfig:
        """`kv_events_config`, parsed; off by default."""
        return KVEventsConfig.parse(self.kv_events_config or {})

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, parsed."""
        return None if self.speculative_config is None else SpeculativeConfig.parse(self.speculative_config)

    def without_secrets(self) -> dict[str, Any]:
        """Every setting by its name but who may call the server, which an engine core and its ranks need not know."""
        return {
            name: value
            for name, value in asdict(self).items()
            if not options()[name].secret and name not in _ACCESS_SETTINGS
        }

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> PagodaConfig:
        """What `without_secrets` gave, after a way on which tuples have become lists."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


_ACCESS_SETTINGS = frozenset({"api_keys", "api_keys_file", "anonymous_scopes"})


def default_model_name(model: str | None) -> str:
    """The name of a model that was given none: the last part of its path or Hugging Face id, without spaces."""
    parts = [part for part in (model or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "-".join(parts[-1].split()) or "demo" if parts else "demo"


def is_hub_id(model: str) -> bool:
    """Whether a model is named as on the Hugging Face hub, owner/name, and is no directory here."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).is_dir()


@cache
def options() -> dict[str, OptionInfo]:
    """Every setting's `OptionInfo` by its name, in the order of the schema."""
    return {f.name: option_of(f) for f in fields(PagodaConfig)}


@cache
def option_types() -> dict[str, Any]:
    """Every setting's type by its name."""
    return get_type_hints(PagodaConfig)


@cache
def option_defaults() -> dict[str, Any]:
    """Every setting's default by its name."""
    return {f.name: f.default for f in fields(PagodaConfig)}


@cache
def rules() -> Rules:
    """What every setting must be, and what must hold between them."""
    return Rules(option_types(), options(), option_defaults())
