"""The flags of `vllm serve` that are no settings of Pagoda: what becomes of each.

A flag is taken where a setting has its name (`settings_by_name`), mapped to a setting of another name, without effect (logged
once), or refused, because without it a client or an operator would get something else than was asked for. The page
docs/vllm-flags.md is written from here, by `vllm_flags_page`. A test compares the tables with the
flags that vLLM's own parser defines: none is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pagoda.config.names import settings_by_name

VLLM_VERSION = "0.32.0"

Values = Literal["none", "one", "optional", "many"]


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """A flag of `vllm serve`.

    `values`: how many follow it: none (there is a `--no-` form too), one, optional, or many. `setting`: the one that it is
    mapped to; `why`: else the reason that it has no effect or is refused. `harmless`: the values with which a refused flag
    asks for nothing, as vLLM's default does; `--no-NAME` always does.
    """

    name: str
    values: Values
    why: str = ""
    setting: str = ""
    refused: bool = False
    harmless: tuple[str, ...] = ()

    def is_harmless(self, value: str) -> bool:
        """Whether the flag with `value` asks for nothing that is not there."""
        return value.lower() in ("", "none", "null", "false", *self.harmless)


# Flags that are settings under their own names, as vLLM passes values to them.
TAKEN = """
    model tokenizer dtype load-format generation-config trust-remote-code seed max-model-len block-size kv-cache-memory-bytes
    model-impl
    kv-cache-dtype kv-events-config num-gpu-blocks-override gpu-memory-utilization enable-prefix-caching max-num-seqs
    max-num-batched-tokens long-prefill-token-threshold scheduling-policy speculative-config tensor-parallel-size
    enable-lora max-loras max-lora-rank max-cpu-loras lora-modules
    pipeline-parallel-size data-parallel-size distributed-executor-backend host ssl-certfile ssl-keyfile chat-template
    enforce-eager quantization served-model-name config grpc-port log-level revision download-dir override-generation-config
    pooler-config disable-uvicorn-access-log disable-access-log-for-endpoints allowed-origins allowed-methods allowed-headers
    allow-credentials disable-fastapi-docs enable-tokenizer-info-endpoint otlp-traces-endpoint collect-detailed-traces
"""
SHORT = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-q": "quantization",
    "-sc": "speculative-config",
    "-asc": "api-server-count",
    "-ac": "attention-config",
    "-cc": "compilation-config",
    "-dc": "diffusion-config",
    "-dpa": "data-parallel-address",
    "-dpb": "data-parallel-backend",
    "-dpe": "data-parallel-external-lb",
    "-dph": "data-parallel-hybrid-lb",
    "-dpm": "data-parallel-multi-port-external-lb",
    "-dpn": "data-parallel-rank",
    "-dpp": "data-parallel-rpc-port",
    "-dpl": "data-parallel-size-local",
    "-dpr": "data-parallel-start-rank",
    "-dcp": "decode-context-parallel-size",
    "-pcp": "prefill-context-parallel-size",
    "-ep": "enable-expert-parallel",
    "-n": "nnodes",
    "-r": "node-rank",
    "-O": "optimization-level",
}

# In these tables `name` takes one value, `name!` none, `name?` one or none, `name*` several; `name=a|b`: harmless with those,
# beside "", none, null and false.
MAPPED = {
    "http_port": "port",
    "api_keys": "api-key*",
    "grace_period_seconds": "shutdown-timeout",
    "max_num_waiting": "max-num-queued-reqs",
    "kv_cache_watermark": "watermark",
    "gpu_memory_utilization": "device-memory-utilization",
}
WITHOUT_EFFECT = {
    "always done": """
        async-scheduling! enable-chunked-prefill! enable-ssl-refresh! enable-request-id-headers! enable-prompt-tokens-details!
        enable-server-load-tracking! enable-flashinfer-autotune! scheduler-reserve-full-isl! use-tqdm-on-load!
        enable-log-deltas! aggregate-engine-logging! enable-auto-tool-choice! exclude-tools-when-tool-choice-none!""",
    "chosen by the engine, from the device and the model": """
        attention-backend attention-config linear-backend kernel-config ir-op-priority optimization-level performance-mode
        compilation-config cudagraph-capture-sizes* max-cudagraph-capture-size disable-custom-all-reduce! disable-cascade-attn!
        use-fp64-gumbel! enable-batch-sharded-sampling! structured-outputs-config jit-monitor-mode jit-monitor-verbose!
        disable-hybrid-kv-cache-manager! disable-nccl-for-dp-synchronization! prefill-schedule-interval
        long-prefill-token-threshold-adaptive! max-num-scheduled-tokens enable-cumem-allocator! kv-sharing-fast-prefill!
        prefix-match-unit prefix-cache-retention-interval swa-bounded-replay! enable-nccl-comm-suspend!
        prefix-caching-hash-algo max-num-active-seqs""",
    "weight files are mapped and read in parallel": """
        safetensors-load-strategy safetensors-prefetch-num-threads safetensors-prefetch-block-size max-parallel-loading-workers
        pt-load-map-location ignore-patterns*""",
    "cores are chosen by cpu_thread_affinity": "numa-bind! numa-bind-nodes* numa-bind-cpus*",
    "one API process serves all, tokenizers are tokenizer_pool_size": "api-server-count renderer-num-workers",
    "the queue is bounded in requests, by max_num_waiting": "max-num-queued-tokens",
    "how tokens are put into chunks of a stream follows from when they come": "stream-interval",
    "for models with experts": """
        enable-expert-parallel! enable-eplb! eplb-config expert-placement-strategy all2all-backend moe-backend
        enable-ep-weight-filter! enable-dbo! dbo-decode-token-threshold dbo-prefill-token-threshold ubatch-size
        enable-elastic-ep! elastic-ep-max-dp-size dp-sync-interval enable-shm-tensor-arena!""",
    "for state-space and hybrid models": """
        mamba-backend mamba-block-size mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype
        mamba-ssu-algorithm enable-mamba-cache-stochastic-rounding! enable-mamba-shared-prefix-checkpoint! gdn-prefill-backend
        kda-decode-backend kda-prefill-backend sparse-indexer-topk-backend replayssm-buffer-len use-replayssm!
        engram-config""",
    "for images, audio and video, which are refused in a request": """
        allowed-local-media-path allowed-media-domains* limit-mm-per-prompt media-io-kwargs mm-processor-kwargs
        mm-processor-cache-gb mm-processor-cache-type mm-processor-device mm-shm-cache-max-object-size-mb mm-tensor-ipc
        mm-ipc-gpu-memory-gb mm-hasher-algorithm mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path
        mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path mm-encoder-tp-mode mm-encoder-only!
        mm-device-do-normalize! skip-mm-profiling! interleave-mm-strings! enable-mm-embeds! trust-request-mm-kwargs!
        language-model-only! disable-chunked-mm-input! video-pruning-method video-pruning-rate default-mm-loras
        enable-tower-connector-lora! diffusion-config""",
    "for routes that are not there": """
        cohere-format cohere-is-reasoning-model! anthropic-disabled-thinking-effort enable-flash-late-interaction!""",
    "how adapters are kept follows from the model and its ranks": """
        fully-sharded-loras! specialize-active-lora! max-lora-cls-labels enable-mixed-moe-lora-format!
        enable-moe-shared-loras!""",
    "prompts and answers are never logged": "enable-log-requests! enable-log-outputs! max-log-len",
    "log_level and log_format are all there is for logs": """
        uvicorn-log-level logging-config log-config-file log-error-stack! disable-log-stats! enable-logging-iteration-details!
        fail-on-environ-validation!""",
    "metrics are all shown": """
        show-hidden-metrics-for-version kv-cache-metrics! kv-cache-metrics-sample cudagraph-metrics! enable-mfu-metrics!
        per-request-spec-decode-metrics custom-histogram-buckets""",
    "the engine is looked into by `pagoda trace`": """
        enable-layerwise-nvtx-tracing! enable-trace-replay! profiler-config ray-workers-use-nsight!""",
    "/docs needs nothing from outside": "enable-offline-docs!",
    "headers are bounded by max_header_bytes": "h11-max-incomplete-event-size h11-max-header-count",
    "the field is left out of answers": "fingerprint-mode fingerprint-value",
    "for several machines, see nnodes": "master-addr master-port data-parallel-rpc-port data-parallel-address",
    "set collective_timeout_seconds": "distributed-timeout-seconds cpu-distributed-timeout-seconds",
    "for data_parallel_supervisor of several machines": """
        data-parallel-supervisor-port dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s
        dp-supervisor-probe-failure-threshold""",
    "quantized checkpoints that are supported need no permission": "allow-deprecated-quantization!",
    "lengths of KV blocks follow from block_size": "dcp-kv-cache-interleave-size cp-kv-cache-interleave-size",
}
REFUSED = {
    "weights of adapters are kept as they are, in bfloat16 or float32": "lora-dtype=auto|bfloat16|float32",
    "an adapter's own layers are taken": "lora-target-modules*",
    "the KV cache is neither offloaded nor sent to other servers: prefill and decode are not disaggregated": """
        kv-transfer-config ec-transfer-config ec-manager-config""",
    "weights and KV cache are not offloaded": """
        cpu-offload-gb=0 cpu-offload-params* offload-backend=auto offload-group-size=0 offload-num-in-group=1 offload-params*
        offload-prefetch-step=1 kv-offloading-size=0 kv-offloading-backend=native""",
    "ranks of several machines are a Ray cluster: distributed_executor_backend=ray and `pagoda join`": """
        nnodes=1 node-rank=0 headless! data-parallel-rank data-parallel-start-rank data-parallel-size-local
        data-parallel-external-lb! data-parallel-hybrid-lb! data-parallel-multi-port-external-lb! data-parallel-backend=mp""",
    "a context is not divided among ranks": """
        decode-context-parallel-size=1 prefill-context-parallel-size=1 dcp-comm-backend=ag_rs dcp-q-replicate!
        enable-hc-sp!""",
    "set CUDA_VISIBLE_DEVICES": "device-ids",
    "no Python class is loaded into the server": """
        middleware scheduler-cls=vllm.v1.core.sched.scheduler.scheduler worker-cls=auto worker-extension-cls logits-processors*
        io-processor-plugin reasoning-parser-plugin tool-parser-plugin model-class-overrides={}""",
    "tools run at the client, and the end of reasoning is the model's": """
        tool-call-parser reasoning-parser reasoning-config tool-server tool-strict-level=auto""",
    "the chat template decides, and is the server's": """
        chat-template-content-format=auto trust-request-chat-template! default-chat-template-kwargs={}
        response-role=assistant""",
    "set task: embed, classify or score": "runner=auto|generate convert=auto|none",
    "the tokenizer is that of the checkpoint": """
        tokenizer-mode=auto|hf|slow skip-tokenizer-init! tokenizer-revision enable-prompt-embeds!""",
    "the model is one of Pagoda's own": """
        config-format=auto|hf hf-config-path hf-overrides={} model-loader-extra-config={}
        additional-config={} quantization-config""",
    "code of a checkpoint is its tokenizer's only, of the same revision": "code-revision",
    "a token on a command line is seen by everybody on the machine: set HF_TOKEN": "hf-token?",
    "a log-probability is that of the model's logits, at most 20 a token": """
        logprobs-mode=raw_logprobs max-logprobs=0|1|2|3|4|5|6|7|8|9|10|11|12|13|14|15|16|17|18|19|20
        return-sampling-mask! return-tokens-as-token-ids!""",
    "answers are not watermarked": "watermark-config",
    "usage is sent where a request asks for it, timings are in /metrics": """
        enable-force-include-usage! enable-per-request-metrics!""",
    "a silent stream is sent nothing": "sse-keep-alive-interval=0",
    "the routes are not there": "tokens-only! enable-scale-out! enable-return-routed-experts! aux-output-config",
    "the engine does not sleep, and its weights are not changed while it runs": """
        enable-sleep-mode! sleep-mode-offload-cudagraph! sleep-preserve-parameter-names* weight-transfer-config""",
    "the server listens on ports; gRPC and REST run side by side": "uds grpc!",
    "paths are those of the protocols: let the proxy rewrite them": "root-path=/",
    "clients are known by keys, not certificates; ciphers are those of Python": "ssl-ca-certs ssl-cert-reqs=0 ssl-ciphers",
    "a layer's sliding window is part of the model": "disable-sliding-window! kv-cache-dtype-skip-layers*",
    "a rank that fails is restarted with its engine": "enable-fault-tolerance! fault-tolerance-config",
    "set speculative_config": "spec-method spec-model spec-tokens",
}


@cache
def vllm_flags() -> Mapping[str, VllmFlag]:
    """Every flag of `vllm serve` that is no setting, by its name with underscores."""
    found = [
        VllmFlag(name, values, setting=key) for key, text in MAPPED.items() for name, values, _ in read_table(text)
    ]
    found += [
        VllmFlag(name, values, why) for why, text in WITHOUT_EFFECT.items() for name, values, _ in read_table(text)
    ]
    found += [
        VllmFlag(name, values, why, refused=True, harmless=harmless)
        for why, text in REFUSED.items()
        for name, values, harmless in read_table(text)
    ]
    taken = settings_by_name()
    return {flag.name: flag for flag in found if flag.name not in taken}


def read_table(text: str) -> list[tuple[str, Values, tuple[str, ...]]]:
    """Name with underscores, values and harmless ones of each flag in a cell of the tables above."""
    flags: list[tuple[str, Values, tuple[str, ...]]] = []
    for word in text.split():
        written, _, harmless = word.partition("=")
        values: Values = (
            "none" if "!" in written else "optional" if "?" in written else "many" if "*" in written else "one"
        )
        flags.append((written.rstrip("!?*").replace("-", "_"), values, tuple(harmless.split("|")) if harmless else ()))
    return flags


_WORDS = {"dtype": {"half": "float16", "float": "float32"}, "generation_config": {"vllm": "none"}}
_WORDS["model_impl"] = {"vllm": "pagoda"}
_WORDS["distributed_executor_backend"] = {"uni": "auto"}
_WORDS["max_model_len"] = {"-1": "auto"}
_COUNTS = {"max_model_len", "max_num_batched_tokens"}
_MULTIPLIERS = {"k": 1000, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def as_written_for_vllm(key: str, value: str) -> str:
    """The value of the setting `key` as Pagoda spells what vLLM's users write: `half`, `4k` (4000), `4K` (4096), `-1`."""
    if key == "log_level":
        return value.lower()
    value = _WORDS.get(key, {}).get(value, value)
    if key in _COUNTS and value[-1:] in _MULTIPLIERS:
        try:
            return str(int(float(value[:-1]) * _MULTIPLIERS[value[-1]]))
        except (ValueError, OverflowError):
            return value
    return value


def dotted_value(text: str) -> object:
    """A member of a JSON object that is given by itself, `--speculative-config.num_speculative_tokens 3`."""
    try:
        return json.loads(text)
    except ValueError:
        return text
