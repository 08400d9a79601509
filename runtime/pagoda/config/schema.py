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
from pagoda.config.lora import LoraModule, parse_lora_module
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
        "Checkpoint: a directory in Hugging Face format, a GGUF file, or a Hugging Face id (for GGUF owner/name:Q4_K_M). "
        "None: the built-in demo model.",
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
    task: Literal["auto", "generate", "embed", "classify", "score"] = option(
        "auto",
        "model",
        "What the model is served for: generate text; embed: vectors of texts; classify: probabilities of labels; score: how "
        "well two texts belong together, for reranking (of a language model the probability of one token: Qwen3-Reranker). "
        "Auto: by the checkpoint: a classifier's head, an encoder or modules.json, else generate.",
    )
    pooler_config: Mapping[str, Any] | None = option(
        None,
        "model",
        "How hidden states become a vector, where it is other than the checkpoint says, as a JSON object with vLLM's keys: "
        "pooling_type (CLS, MEAN, LAST, ...), normalize, use_activation, matryoshka_dimensions, classifier_from_token: "
        '{"pooling_type": "CLS", "normalize": true}.',
    )
    rerank_template: str | None = option(
        None,
        "model",
        "Prompt of a language model that scores, with {query}, {document} and {instruction} in it; None: Qwen3-Reranker's.",
        live="text",
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
    weight_cache_dir: str = option(
        "auto",
        "model",
        "Where an engine on a CPU leaves its weights as they are packed for the kernels, for its next starts and wake-ups to "
        "map: a directory; auto: .pagoda beside the checkpoint, or where that cannot be written, pagoda/weights in "
        "XDG_CACHE_HOME; none: nowhere. Weights below 64 MiB are packed each time.",
    )
    weight_cache_max_bytes: int = option(
        16 * 2**30,
        "model",
        "How much packed weights in that directory may take in all; a larger model's are not left there, and what was not "
        "used for longest goes first. Nor is anything written where less than twice its size is free.",
        ge=1,
        unit="bytes",
    )
    tokenizer: str | None = option(
        None, "model", "Directory of the tokenizer, where it is not the model's own.", path="directory"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "model", "Type of weights and activations; auto follows the checkpoint and what the device does well."
    )
    quantization: Literal["int8", "int4", "gptq", "awq", "compressed-tensors", "gguf", "dequantize"] | None = option(
        None,
        "model",
        "Bits of the weights, rounded when they are loaded: int8, one scale for each output, or int4, in groups. None: as the "
        "checkpoint is; quantized ones are recognized, and naming their method (gptq, awq, compressed-tensors, gguf) asserts "
        "it; gguf takes the GGUF file of a directory that holds other weights, too. dequantize: the layers of a GGUF file as "
        "floats of dtype, as a GPU needs them; int8 and int4 round those again.",
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
        "Where weights come from: the checkpoint's files (auto), or random numbers of the right shape (dummy).",
    )
    model_impl: Literal["auto", "pagoda", "transformers"] = option(
        "auto",
        "model",
        "Whose code the model runs: that of a family of Pagoda (pagoda), or that of the transformers library on Pagoda's "
        "paged attention (transformers), slower, but for nearly every decoder. auto: pagoda where there is such a family.",
    )
    generation_config: Literal["auto", "none"] = option(
        "auto",
        "model",
        "Take sampling defaults and end tokens from the checkpoint's generation_config.json, or not.",
        live="text",
    )
    override_generation_config: Mapping[str, Any] | None = option(
        None,
        "model",
        'Values in place of those of generation_config.json, as a JSON object: {"temperature": 0.6}. Taken with '
        "generation_config=none, too.",
        live="text",
    )
    default_max_tokens: int | None = option(
        None,
        "model",
        "max_tokens of a request that gives none; None: max_new_tokens of the checkpoint's generation_config.json, else "
        "whatever fits below max_model_len.",
        ge=1,
        live="text",
    )
    trust_remote_code: bool = option(False, "model", "Let the checkpoint's tokenizer run Python code of its own.")
    seed: int = option(0, "model", "Seed of dummy weights and of requests that give no seed of their own.", ge=0)

    # Several models
    models: Mapping[str, Any] | None = option(
        None,
        "models",
        "Several models behind one server: an object from a model's name to its settings (any that are not the server's own), "
        'such as {"chat": {"model": "/models/qwen"}, "embedder": {"model": "/models/minilm", "task": "embed"}}. What an '
        "entry leaves out is as configured for the server. A request that names no model is for the first one.",
    )
    model_dir_root: str | None = option(
        None,
        "models",
        "Directory of models: each checkpoint directory and GGUF file directly in it is served under its name.",
        path="directory",
    )
    load_models: tuple[str, ...] = option(
        (),
        "models",
        "Of several models those that are loaded at start, without which the server is not ready; none given: all, with "
        "load_on_demand none.",
    )
    load_on_demand: bool = option(
        False,
        "models",
        "Of several models, load one when the first request for it comes, which waits for it; idle ones make room.",
    )
    max_loaded_models: int | None = option(
        None,
        "models",
        "Of several models the most that are loaded at once; auto: all, with load_on_demand 4. One more than there are models "
        "keeps room for a new version of one.",
        ge=1,
        auto=True,
    )
    idle_unload_seconds: float | None = option(
        None,
        "models",
        "Of several models, unload one that was loaded on demand and has had no request for so long; None: only to make room.",
        gt=0,
        unit="seconds",
    )
    models_memory_bytes: int | None = option(
        None,
        "models",
        "Memory that several models may take together on a CPU: weights, KV caches, processes; auto: 90 % of what is free at "
        "start.",
        ge=1,
        unit="bytes",
        auto=True,
    )

    # Device
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device", "Where the model runs; auto: cuda if there is one."
    )
    threads: int | None = option(
        None, "device", "CPU threads of the engine; auto: the physical cores this container may use.", ge=1, auto=True
    )
    engine_memory_bytes: int | None = option(
        None,
        "device",
        "On a CPU the most memory that the engine may take: weights, KV cache and its process. None: what is free, or, with "
        "several models, each one's part of models_memory_bytes.",
        ge=1,
        unit="bytes",
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
        "Memory of the KV cache; auto: on a CPU what max_num_seqs sequences of 2048 tokens take, or one of max_model_len, at "
        "most half of what the weights leave free; on a GPU all that is left of gpu_memory_utilization. A CPU takes a first "
        "share of it before it is ready and the rest while it serves.",
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
        'with vLLM\'s keys, such as {"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}; ${POD_IP} in '
        "an endpoint or the topic is that variable of the environment. Events hold the token ids "
        "of prompts, and ZeroMQ has no authentication: let only the router reach the port. None: off.",
    )

    # Scheduler
    max_num_seqs: int | None = option(
        None,
        "scheduler",
        "Most sequences in one step; auto: by device and KV cache.",
        ge=1,
        le=4096,
        auto=True,
        live="engine",
    )
    max_num_batched_tokens: int | None = option(
        None,
        "scheduler",
        "Most tokens in one step; longer prompts are computed in chunks. Auto: by device.",
        ge=1,
        unit="tokens",
        auto=True,
        live="engine",
    )
    long_prefill_token_threshold: int | None = option(
        None,
        "scheduler",
        "Most tokens of one prompt in a step; 0: only max_num_batched_tokens counts. Auto: beside requests that generate, as "
        "many tokens of prompts as make their step up to 1.75 times as long, by measured times; without any no limit.",
        ge=0,
        unit="tokens",
        auto=True,
        live="engine",
    )
    target_itl_ms: float | None = option(
        None,
        "scheduler",
        "Milliseconds between two tokens of a request that generates, which 99 of 100 steps keep to while prompts are "
        "computed: chunks of prompts are as long as measured times allow, and long enough to make a step a tenth longer. "
        "None: see long_prefill_token_threshold.",
        gt=0,
        live="engine",
    )
    scheduling_policy: Literal["fcfs", "priority"] = option(
        "fcfs",
        "scheduler",
        "Order of one tenant's waiting requests: by arrival, or by their priority (lower first), then by when their first "
        "token is due (x-llm-d-slo-ttft-ms; without it after 60 s). Tenants (of API keys) share the engine by their weights, "
        "and requests of different x-llm-d-inference-fairness-id a tenant's part equally, whatever their priorities.",
    )
    inference_objectives: Mapping[str, Any] | None = option(
        None,
        "scheduler",
        "Priorities of the objectives that a gateway names in the header x-llm-d-inference-objective, as InferenceObjectives "
        'have them: a JSON object such as {"chat": 10, "batch": -10}, higher is served first, 0 for one that is not in it. '
        "Needs scheduling_policy=priority. None: the header changes nothing.",
        of_server=True,
    )
    max_num_waiting: int = option(
        1024,
        "scheduler",
        "Most requests that wait; one more is answered 429, but from a tenant with less than an equal part of them.",
        ge=1,
        live="engine",
    )
    kv_cache_watermark: float = option(
        0.02, "scheduler", "Share of KV blocks kept free when a waiting request is let in.", ge=0, lt=1
    )
    max_preemptions: int = option(
        4, "scheduler", "Times a request may be preempted before it is protected from it.", ge=0, live="engine"
    )
    num_scheduler_steps: int = option(
        1, "scheduler", "Model steps on one plan while a batch only decodes; new requests wait as long.", ge=1, le=64
    )

    # Speculative decoding
    speculative_config: Mapping[str, Any] | None = option(
        None,
        "speculation",
        "Speculative decoding, as a JSON object with vLLM's keys: method (ngram, suffix, grammar, draft_model, eagle3, mtp), "
        "num_speculative_tokens (the most drafts of a sequence in a step), and those of the method. None: off.",
        live="engine",
    )

    # Adapters
    enable_lora: bool = option(
        False,
        "adapters",
        "Serve LoRA adapters of the model, in PEFT's format: a request names one in the place of the model.",
    )
    max_loras: int = option(8, "adapters", "Most adapters whose requests run in one step.", ge=1, le=1024)
    max_lora_rank: int = option(16, "adapters", "Greatest rank of an adapter.", ge=1, le=1024)
    max_cpu_loras: int | None = option(
        None,
        "adapters",
        "Most adapters in memory, which is kept free for them; others are read again when asked for. None: max_loras.",
        ge=1,
        le=65536,
    )
    lora_modules: tuple[str, ...] = option(
        (),
        "adapters",
        'Adapters that are served, each name=path or {"name": …, "path": …}; one that does not fit ends the start.',
        live="adapters",
    )
    lora_dir: str | None = option(
        None,
        "adapters",
        "Directory that says which adapters are served, watched while the server runs: each subdirectory is one by its name, "
        "and a .json file lists others as objects with name and path. None: none.",
        path="directory",
    )

    # Parallelism
    tensor_parallel_size: int = option(1, "parallel", "Ranks that share every layer, each with its heads.", ge=1)
    pipeline_parallel_size: int = option(1, "parallel", "Stages, each with its part of the layers.", ge=1)
    enable_expert_parallel: bool = option(
        False,
        "parallel",
        "Ranks that share a layer have some of its experts each, whole, instead of a part of every expert.",
    )
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
    ui: bool = option(True, "server", "With /ui, a web page that talks to the models and shows the engines at work.")
    enable_tokenizer_info_endpoint: bool = option(
        False, "server", "With /tokenizer_info, which shows special tokens and chat templates to keys with `infer`."
    )

    # Limits and deadlines
    max_body_bytes: int = option(
        32 * 2**20, "limits", "Largest REST request body.", ge=1024, unit="bytes", of_server=True, live="server"
    )
    max_header_bytes: int = option(
        64 * 2**10,
        "limits",
        "Largest REST request head, and most trailers behind a chunked body.",
        ge=1024,
        unit="bytes",
        aliases=("h11_max_incomplete_event_size",),
        of_server=True,
    )
    max_header_count: int = option(
        256, "limits", "Most headers of a REST request.", ge=16, aliases=("h11_max_header_count",), of_server=True
    )
    max_grpc_message_bytes: int = option(
        32 * 2**20, "limits", "Largest gRPC message.", ge=1024, unit="bytes", of_server=True
    )
    max_inflight_body_bytes: int | None = option(
        None,
        "limits",
        "Most bytes of REST bodies and gRPC messages (over 64 KiB each) that are received and decoded at a time, of all "
        "clients; an API key may hold as much as is free. Beyond: 429, in gRPC RESOURCE_EXHAUSTED. None: 16 of the largest "
        "that max_body_bytes and max_grpc_message_bytes allow.",
        ge=1024,
        unit="bytes",
        of_server=True,
    )
    max_connections: int = option(
        8192,
        "limits",
        "Most connections at once, to each of the two ports. Where all are taken, the one that waits longest for a request is "
        "closed for a new one; where none waits, a new one is closed, over REST with a 503.",
        ge=1,
        aliases=("limit_concurrency",),
        of_server=True,
    )
    max_connections_per_peer: int | None = option(
        None,
        "limits",
        "Most connections to each port of one client address (IPv6: of one /64). A proxy or NAT gateway is one: raise this to "
        "max_connections where all clients come through it. None: half of max_connections.",
        ge=1,
        aliases=("limit_conn",),
        of_server=True,
    )
    keep_alive_timeout_seconds: float = option(
        65.0,
        "limits",
        "Longest time that a REST connection may wait for a request; longer than the 60 s of the usual proxies, so that it is "
        "they who close it.",
        gt=0,
        unit="seconds",
        aliases=("timeout_keep_alive", "keepalive_timeout"),
        of_server=True,
    )
    header_timeout_seconds: float = option(
        30.0,
        "limits",
        "Longest time that the head of a REST request may take, and a TLS handshake; then 408.",
        gt=0,
        unit="seconds",
        aliases=("client_header_timeout",),
        of_server=True,
    )
    body_timeout_seconds: float = option(
        60.0,
        "limits",
        "Longest time without a byte of a request's body, and for the whole of it at less than 1 KiB a second; then 408, in "
        "gRPC DEADLINE_EXCEEDED.",
        gt=0,
        unit="seconds",
        aliases=("client_body_timeout",),
        of_server=True,
    )
    send_timeout_seconds: float = option(
        60.0,
        "limits",
        "Longest time in which a client may read nothing of a response that is there; then its request is aborted. A stream "
        "that has nothing to send is not concerned.",
        gt=0,
        unit="seconds",
        aliases=("send_timeout",),
        of_server=True,
    )
    request_timeout_seconds: float | None = option(
        None,
        "limits",
        "Longest time a request may take in all; None: no limit but the client's.",
        gt=0,
        unit="seconds",
        live="server",
    )
    max_request_seconds: float | None = option(
        None,
        "limits",
        "Time from arrival after which a request ends with what it has (finish reason `length`); None: no such limit.",
        gt=0,
        unit="seconds",
        live="engine",
    )
    runaway_detection: Literal["off", "warn", "stop"] = option(
        "warn",
        "limits",
        "Repetition detection, on an output that repeats itself: off, log and count it, or stop the request.",
        live="engine",
    )
    runaway_max_period: int = option(
        64, "limits", "Longest period that counts as repetition.", ge=1, unit="tokens", live="engine"
    )
    runaway_min_tokens: int = option(
        256, "limits", "Length of output that must repeat one period throughout.", ge=2, unit="tokens", live="engine"
    )
    grace_period_seconds: float = option(
        30.0,
        "limits",
        "Drain: time that running requests have to finish after SIGTERM.",
        ge=0,
        unit="seconds",
        of_server=True,
        live="server",
    )
    drain: bool = option(
        False,
        "limits",
        "Take no requests while it is on: not ready, requests are answered 503, those that run go on. With several models "
        "each may be drained by itself.",
        live="server",
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

    max_request_replays: int = option(
        1,
        "limits",
        "How often a request goes on in another engine, behind the tokens that were sent, when the one that runs it "
        "fails; one that was killed from outside does not count. 0: a request fails with its engine.",
        ge=0,
        live="server",
    )

    spare_process_seconds: float | None = option(
        30.0,
        "limits",
        "How long an engine has been ready when the process of the next one is started, which has imported everything "
        "when the engine fails, and takes about 0.3 GiB; none for no such process.",
        ge=0,
        unit="seconds",
    )

    idle_sleep_seconds: float | None = option(
        None,
        "limits",
        "Put the engine to sleep when it has had no request for so long: it gives back weights and KV cache, its process "
        "stays. None: only /sleep does.",
        gt=0,
        unit="seconds",
        live="server",
    )
    wake_on_request: bool = option(
        True,
        "limits",
        "A request wakes a sleeping engine, which therefore counts as ready; else only /wake_up does, and it does not.",
        live="server",
    )

    # Tokenizer and chat
    tokenizer_pool_size: int = option(2, "text", "Workers that tokenize.", ge=1, le=256, live="text")
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
        live="text",
    )
    tokenizer_timeout_seconds: float = option(
        30.0, "text", "Longest time one text may take to tokenize.", gt=0, unit="seconds", live="text"
    )
    structured_outputs_timeout_seconds: float = option(
        5.0,
        "text",
        "Longest time that compiling the grammar of a structured output may take; then 400.",
        gt=0,
        unit="seconds",
        live="text",
    )
    chat_template: str | None = option(
        None, "text", "File with a Jinja chat template, in place of the tokenizer's own.", path="file", live="text"
    )

    response_store_bytes: int = option(
        64 << 20,
        "text",
        "Memory for responses that `previous_response_id` may name, for an hour at most; 0: none is kept.",
        ge=0,
        unit="bytes",
        of_server=True,
    )
    tool_call_parser: str = option(
        "auto",
        "text",
        "Format of the model's tool calls, by vLLM's names (hermes, qwen3_coder, llama3_json, mistral, …); auto: as the "
        "checkpoint's files show; off: tools are refused.",
        live="text",
    )
    reasoning_parser: str = option(
        "auto",
        "text",
        "Format of the model's reasoning, by vLLM's names (qwen3, deepseek_r1, openai_gptoss, …); auto: as the checkpoint's "
        "files show; off: it stays in the content.",
        live="text",
    )

    # Logs, metrics and traces
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
    otlp_traces_endpoint: str | None = option(
        None,
        "observability",
        "OTLP collector that traces of requests are sent to, `http://collector:4317` (gRPC) or "
        "`http://collector:4318/v1/traces` (HTTP); OpenTelemetry's variables (OTEL_…) hold. None: no traces. Needs the extra "
        "`otel`.",
        pattern=r"(https?://)?[^\s/@]+(/\S*)?",
        pattern_help="like http://collector:4317",
    )
    collect_detailed_traces: tuple[Literal["model", "worker", "all"], ...] = option(
        (),
        "observability",
        "Have the engine's steps in the traces of requests: model, worker or all, which are the same here. Steps are recorded "
        "all the time then.",
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
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "observability", "Least level logged.", live="server"
    )
    log_format: Literal["text", "json"] = option("text", "observability", "Log lines for people, or one JSON each.")

    def __post_init__(self) -> None:
        raise_problems(rules().value_problems({name: getattr(self, name) for name in options()}))

    @property
    def served_model_name(self) -> str:
        """`model_name`, or the last part of the model's path or id, or `demo` without a model."""
        return self.model_name or default_model_name(self.model)

    @property
    def model_description(self) -> str:
        """The model and where it is from, for people."""
        if self.model is None:
            return f"{self.served_model_name}, the built-in demo model (--model takes your own)"
        return f"{self.served_model_name} ({self.model})"

    @property
    def kv_events(self) -> KVEventsConfig:
        """`kv_events_config`, parsed; off by default."""
        return KVEventsConfig.parse(self.kv_events_config or {})

    @property
    def num_cpu_loras(self) -> int:
        """`max_cpu_loras`, or what it is by default."""
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras

    @property
    def adapters(self) -> tuple[LoraModule, ...]:
        """`lora_modules`, parsed."""
        return tuple(map(parse_lora_module, self.lora_modules))

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
    """The name of a model that was given none: the last part of its path or Hugging Face id, without spaces and `.gguf`."""
    parts = [part for part in (model or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "-".join(parts[-1].removesuffix(".gguf").split()) or "demo" if parts else "demo"


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
