"""From a configuration to a core that can take requests: a sequence of named, timed phases.

    config → hardware → [ launch → rendezvous → communication → ] weights → kv → warm-up → ready
                        with more than one rank

Each phase is reported when it is entered: in the log, in `/health` and by the startup probe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.config.speculation import MODEL_METHODS, SpeculativeConfig
from pagoda.engine.core.auto import ResolvedSettings, kv_cache_element_bytes, resolve
from pagoda.engine.core.calibration import calibrate
from pagoda.engine.core.executors import create_executor
from pagoda.engine.core.kv_sizing import KVFit, check_model_limit, fit_max_model_len, fitting_block_size
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.messages import EngineReady
from pagoda.errors import CheckpointError, ConfigError
from pagoda.execution.executor import Executor
from pagoda.models.checkpoint_files import read_json_object
from pagoda.models.checkpoint_source import checkpoint_directory, demo_head
from pagoda.models.config import CONFIG_FILE, ModelConfig, check_model_device
from pagoda.models.eagle3_config import Eagle3Config, is_eagle3
from pagoda.models.encoders.config import EncoderConfig
from pagoda.models.mtp_config import read_mtp_config
from pagoda.models.pooling_config import PoolerConfig, check_pooling, read_model, read_pooler
from pagoda.models.quantization.schemes import check_device, choose_quantization
from pagoda.models.recurrent_settings import check_recurrent_settings
from pagoda.models.sharding import check_layout
from pagoda.models.transformers_settings import check_transformers_settings
from pagoda.models.weight_size import ELEMENT_BYTES, expected_weight_bytes
from pagoda.parallel.layout import ParallelLayout
from pagoda.platform.choice import Choice
from pagoda.platform.hardware import cpu_report, gpu_reports
from pagoda.scheduling.cache_events import CacheEventLog, CacheEvents, CacheEventSink
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.pooling_scheduler import EncoderScheduler, PoolingScheduler
from pagoda.scheduling.scheduler import Scheduler
from pagoda.speculation.build import make_lookahead
from pagoda.structured.outputs import StructuredOutputs
from pagoda.structured.vocabulary import GrammarVocabulary

logger = logging.getLogger(__name__)

PhaseListener = Callable[[str, str], None]


def start_core(config: PagodaConfig, on_phase: PhaseListener | None = None) -> EngineCore:
    """Bring an engine up in this process. Raises `ConfigError` or `CheckpointError` saying what to change."""
    phases = _StartupPhases(on_phase)
    faults.install(config.fault_injection)
    with phases.enter("config"):
        directory = checkpoint_directory(
            config.model, config.revision, config.download_dir, gguf=config.quantization == "gguf"
        )
        model_config = read_model(
            directory,
            generation=config.generation_config == "auto",
            task=config.task,
            model_impl=config.model_impl,
        )
        pooler = read_pooler(config, directory, model_config)
        if pooler is not None:
            check_pooling(config, model_config)
        if isinstance(model_config, ModelConfig):
            check_transformers_settings(config, model_config)
            if model_config.transformers is not None:
                why = "Pagoda has no family for it" if config.model_impl == "auto" else "model_impl=transformers"
                logger.info(
                    "%s runs through transformers, on Pagoda's paged attention (%s)", model_config.architecture, why
                )
            check_layout(
                model_config,
                ParallelLayout(
                    config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel
                ),
            )
            check_recurrent_settings(config, model_config)
            config = _with_draft_model(config, model_config, directory)
    with phases.enter("hardware"):
        whole_prompts = (
            longest_encoded(config, model_config, pooler) if isinstance(model_config, EncoderConfig) else None
        )
        gpus = gpu_reports()
        settings = resolve(
            config,
            checkpoint_dtype=model_config.dtype,
            cpu=cpu_report(),
            gpus=gpus,
            whole_prompts=whole_prompts,
        )
        for choice in settings.choices:
            logger.info("%s", choice)
        config = _resolved(config, settings, str(directory))
        _check_adapters(config)
        _check_rounded_draft_model(config)
        if isinstance(model_config, ModelConfig):
            check_model_device(model_config, config.device, min((gpu.capability for gpu in gpus), default=None))
            config = _with_block_size(config, model_config)
        executor = create_executor(config, model_config)
    events, sink = CacheEvents(), CacheEventSink()
    vocab_size = model_config.vocab_size
    structured: StructuredOutputs | None = None
    if pooler is None:
        structured = StructuredOutputs(
            lambda: GrammarVocabulary.from_directory(
                checkpoint_directory(config.tokenizer or str(directory)), vocab_size
            ),
            vocab_size,
        )
    try:
        if config.kv_events.is_on:
            assert isinstance(model_config, ModelConfig), "an encoder has no KV cache"
            events, sink = _publish_kv_events(config, model_config, settings.device)
        if isinstance(model_config, ModelConfig):
            fit = _bring_up(executor, config, model_config, phases)
        else:
            assert whole_prompts is not None
            fit = _bring_up_encoder(executor, config, whole_prompts, phases)
        scheduler = _make_scheduler(config, settings, model_config, fit, events, pooler)
        if (
            isinstance(model_config, ModelConfig)
            and config.speculation is not None
            and config.speculation.model is not None
        ):
            with phases.enter("warm-up", "what drafts cost"):
                num_groups = len(model_config.kv_groups(config.block_size, config.max_model_len))
                calibrate(
                    lambda plan: executor.submit(plan).result(),
                    scheduler,
                    block_size=config.block_size,
                    num_groups=num_groups,
                )
    except BaseException:  # re-raised; its ranks may be processes, also on other machines
        if structured is not None:
            structured.shutdown()
        executor.shutdown()
        sink.close()
        raise
    ready = EngineReady(
        max_model_len=fit.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        num_blocks=fit.num_blocks,
        block_size=config.block_size,
        vocab_size=model_config.vocab_size,
        device=settings.device,
        dtype=settings.dtype,
        num_speculative_tokens=scheduler.limits.num_speculative_tokens,
        pooling_tasks=() if pooler is None else pooler.tasks,
        output_size=0 if pooler is None else pooler.size,
        labels=() if pooler is None else pooler.labels,
        kv_equation=fit.equation,
        phase_seconds=phases.seconds,
        **_sizes(config, settings, model_config),
    )
    logger.info("engine ready after %s", ", ".join(f"{name} {taken:.2f} s" for name, taken in phases.seconds.items()))
    return EngineCore(scheduler, executor, ready, sink, structured)


def _sizes(
    config: PagodaConfig, settings: ResolvedSettings, model_config: ModelConfig | EncoderConfig
) -> dict[str, int]:
    """What a step reads and computes, as far as the model's configuration tells, for `EngineReady`."""
    if not isinstance(model_config, ModelConfig) or model_config.transformers is not None:
        return {}
    quantization = choose_quantization(
        config.quantization,
        config.quantization_group_size,
        model_config.quantization,
        model_config.linear_input_sizes,
    )
    is_packed = settings.device == "cpu" and config.cpu_kernels != "reference" and settings.dtype != "float16"
    weight_bytes = expected_weight_bytes(model_config, settings.dtype, quantization, packed=is_packed)
    element_bytes = kv_cache_element_bytes(config.kv_cache_dtype, ELEMENT_BYTES[settings.dtype])
    return {
        "num_parameters": model_config.num_parameters_per_token(),
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": model_config.kv_bytes_per_token(element_bytes),
    }


def _publish_kv_events(
    config: PagodaConfig, model_config: ModelConfig, device: str
) -> tuple[CacheEvents, CacheEventSink]:
    """What the KV cache tells its changes, and what sends them."""
    # Where nothing is published, neither ZeroMQ nor msgspec need be installed.
    from pagoda.engine.core.kv_events import KVEventPublisher

    log = CacheEventLog(config.block_size)
    rules = model_config.kv_groups(config.block_size, config.max_model_len).rules
    return log, KVEventPublisher(config.kv_events, log, block_size=config.block_size, device=device, rules=rules)


def _bring_up(executor: Executor, config: PagodaConfig, model_config: ModelConfig, phases: _StartupPhases) -> KVFit:
    """Start the ranks and run their first step; returns the size of the KV cache."""
    executor.connect(phases)
    with phases.enter("weights", str(config.model)):
        executor.load(phases.weights_progress)
    with phases.enter("kv"):
        budget = executor.kv_budget(config.block_size)
        groups = model_config.kv_groups(config.block_size, config.max_model_len)
        fit = fit_max_model_len(
            block_bytes=budget.block_bytes,
            available_bytes=budget.available_bytes,
            block_size=config.block_size,
            model_max_len=model_config.max_context_length,
            max_model_len=config.max_model_len,
            num_blocks_override=config.num_gpu_blocks_override,
            rules=groups.rules,
            max_step_tokens=max_step_tokens(config),
            one_group_factor=groups.one_group_factor(config.block_size),
            state_bytes=groups.state_bytes(),
        )
        if budget.note:
            fit = fit._replace(equation=f"{fit.equation}; {budget.note}")
        logger.info("%s", fit.equation)
    with phases.enter("warm-up"):
        executor.initialize_kv_cache(fit.num_blocks, fit.max_model_len)
    return fit


def _bring_up_encoder(executor: Executor, config: PagodaConfig, max_model_len: int, phases: _StartupPhases) -> KVFit:
    """The same of an encoder, which has no KV cache: the phase `kv` is left out."""
    executor.connect(phases)
    with phases.enter("weights", str(config.model)):
        executor.load(phases.weights_progress)
    fit = KVFit(0, max_model_len, f"no KV cache: an encoder; max_model_len = {max_model_len}")
    logger.info("%s", fit.equation)
    with phases.enter("warm-up"):
        executor.initialize_kv_cache(fit.num_blocks, fit.max_model_len)
    return fit


def longest_encoded(config: PagodaConfig, model: EncoderConfig, pooler: PoolerConfig | None) -> int:
    """Tokens of the longest text of an encoder: as configured, else what its files say. Raises `ConfigError`."""
    if config.max_model_len is not None:
        check_model_limit(config.max_model_len, model.max_context_length)
        return config.max_model_len
    asked = pooler.max_seq_length if pooler is not None else None
    return min(model.max_context_length, asked or model.max_context_length)


def _with_draft_model(config: PagodaConfig, model_config: ModelConfig, own_directory: str | Path) -> PagodaConfig:
    """The configuration with the draft model's directory, if it has one. Raises `ConfigError` where it does not fit."""
    speculation = config.speculation
    if speculation is None or speculation.method not in MODEL_METHODS:
        return config
    if speculation.method == "mtp":
        return _with_mtp_layer(config, speculation, model_config, Path(own_directory))
    is_itself = speculation.method == "draft_model" and speculation.model is None
    if speculation.model is None and config.model is not None and not is_itself:
        raise ConfigError(
            "speculative_config: method eagle3 needs model, the directory or the Hugging Face id of a head; only the built-in "
            "demo model has one of its own"
        )
    if is_itself:
        directory = Path(own_directory)
    else:
        directory = demo_head() if speculation.model is None else checkpoint_directory(speculation.model)
    is_head = is_eagle3(read_json_object(directory, CONFIG_FILE))
    given = dict(config.speculative_config or {})
    if is_head and "method" not in given:  # as in vLLM, its configuration says so
        given["method"] = "eagle3"
        config = replace(config, speculative_config=given)
    elif is_head and speculation.method != "eagle3":
        raise ConfigError(
            f"speculative_config: {speculation.model} is an EAGLE-3 head: method must be eagle3, not {speculation.method}"
        )
    if is_head or speculation.method == "eagle3":
        misfit = Eagle3Config.from_directory(directory).misfit(model_config)
        if misfit is not None:
            raise ConfigError(f"speculative_config: the EAGLE-3 head {speculation.model} {misfit}")
    else:
        draft_config = ModelConfig.from_directory(directory)
        if draft_config.has_recurrent_layers:
            raise ConfigError(
                f"speculative_config: the draft model {directory} has recurrent layers, whose state cannot go back behind a "
                "draft that is refused; use one without"
            )
        if draft_config.vocab_size != model_config.vocab_size:
            raise ConfigError(
                f"speculative_config: the draft model {speculation.model} has a vocabulary of {draft_config.vocab_size} "
                f"tokens, the model one of {model_config.vocab_size}: they must have the same tokenizer"
            )
    return replace(config, speculative_config={**given, "model": str(directory)})


def _with_mtp_layer(
    config: PagodaConfig, speculation: SpeculativeConfig, model_config: ModelConfig, directory: Path
) -> PagodaConfig:
    if speculation.model is not None and Path(checkpoint_directory(speculation.model)) != directory:
        raise ConfigError(
            f"speculative_config: the MTP layer is in the checkpoint of the model itself, {directory}; leave model out"
        )
    try:
        read_mtp_config(directory, model_config)
    except CheckpointError as error:
        raise ConfigError(f"speculative_config: method mtp: {error}") from error
    return replace(config, speculative_config={**(config.speculative_config or {}), "model": str(directory)})


def _resolved(config: PagodaConfig, settings: ResolvedSettings, directory: str) -> PagodaConfig:
    values = {choice.key: choice.value for choice in settings.choices}
    if config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        values["threads"] = config.threads  # each rank chooses by its own machine, and by how many share it
    return replace(config, model=directory, **values)


def _with_block_size(config: PagodaConfig, model_config: ModelConfig) -> PagodaConfig:
    """The configuration with blocks of as many tokens as the model's recurrent layers ask for, if it has any."""
    groups = model_config.kv_groups(config.block_size, config.max_model_len)
    element_bytes = kv_cache_element_bytes(config.kv_cache_dtype, ELEMENT_BYTES[config.dtype])
    block_size = fitting_block_size(config.block_size, groups, config.tensor_parallel_size, element_bytes)
    if block_size != config.block_size:
        choice = Choice("block_size", block_size, "keys and values of so many tokens are as large as a recurrent state")
        logger.info("%s", choice)
    return replace(config, block_size=block_size)


def _check_adapters(config: PagodaConfig) -> None:
    """Raise `ConfigError` where there are no kernels for adapters; device and dtype are resolved."""
    if config.enable_lora and config.device == "cpu" and config.dtype == "float16":
        raise ConfigError(
            "enable_lora: adapters are served on a CPU in float32 and bfloat16, not in float16; set dtype"
        )


def max_step_tokens(config: PagodaConfig) -> int:
    """By how many tokens a plan may move one request forward, with the drafts for its next step; auto values are resolved."""
    assert config.max_num_batched_tokens is not None
    num_drafts = 0 if config.speculation is None else 1 + config.speculation.num_speculative_tokens
    return max(config.max_num_batched_tokens, config.num_scheduler_steps) + num_drafts


def _make_scheduler(
    config: PagodaConfig,
    settings: ResolvedSettings,
    model_config: ModelConfig | EncoderConfig,
    fit: KVFit,
    events: CacheEvents,
    pooler: PoolerConfig | None,
) -> Scheduler:
    if isinstance(model_config, EncoderConfig):
        # No group of layers keeps anything: every request has the blocks that it needs, none.
        no_cache = KVCacheManager(2, config.block_size, groups=(), enable_prefix_caching=False)
        return EncoderScheduler(_scheduler_limits(config, settings, fit), no_cache)
    kv = KVCacheManager(
        fit.num_blocks,
        config.block_size,
        groups=model_config.kv_groups(config.block_size, config.max_model_len).rules,
        max_step_tokens=max_step_tokens(config),
        # Where other tokens than the last are pooled, all of them must be computed.
        enable_prefix_caching=config.enable_prefix_caching and (pooler is None or not pooler.needs_every_token),
        watermark=config.kv_cache_watermark,
        events=events,
    )
    limits = _scheduler_limits(config, settings, fit)
    if pooler is not None:
        return PoolingScheduler(limits, kv)
    return Scheduler(limits, kv, lookahead=make_lookahead(config.speculation, limits, kv))


def _scheduler_limits(config: PagodaConfig, settings: ResolvedSettings, fit: KVFit) -> SchedulerLimits:
    return SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=fit.max_model_len,
        max_num_waiting=config.max_num_waiting,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        target_itl_ms=config.target_itl_ms,
        max_preemptions=config.max_preemptions,
        policy=config.scheduling_policy,
        num_scheduler_steps=config.num_scheduler_steps,
        num_speculative_tokens=config.speculation.num_speculative_tokens if config.speculation is not None else 0,
        pipeline_parallel_size=config.pipeline_parallel_size,
        max_request_seconds=config.max_request_seconds,
        repetition_detection=config.runaway_detection,
        repetition_max_period=config.runaway_max_period,
        repetition_min_tokens=config.runaway_min_tokens,
        max_loras=config.max_loras if config.enable_lora else 0,
        max_cpu_loras=config.num_cpu_loras if config.enable_lora else 0,
    )


class _StartupPhases:
    """Reports each phase when it is entered and keeps the seconds it took."""

    def __init__(self, listener: PhaseListener | None) -> None:
        self._listener = listener
        self._name = ""
        self._last_detail = ""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def enter(self, name: str, detail: str = "") -> Iterator[None]:
        started = time.monotonic()
        self._name, self._last_detail = name, detail
        self._report()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def detail(self, text: str) -> None:
        """Report the detail of the present phase where it has changed."""
        if text != self._last_detail:
            self._last_detail = text
            self._report()

    def weights_progress(self, rank: str, bytes_done: int, bytes_total: int) -> None:
        """Report each whole percent of the weights; `rank` is the slowest, where there are several."""
        percent = f"{100 * bytes_done // max(1, bytes_total)} %"
        self.detail(f"{rank}, {percent}" if rank else percent)

    def _report(self) -> None:
        if self._listener is not None:
            self._listener(self._name, self._last_detail)


def _check_rounded_draft_model(config: PagodaConfig) -> None:
    """Raise `ConfigError` where a draft model's weights cannot be rounded as asked for; device and dtype are resolved."""
    speculation = config.speculation
    if speculation is None or speculation.quantization is None or speculation.model is None:
        return
    draft = ModelConfig.from_directory(speculation.model)
    try:
        quantization = choose_quantization(speculation.quantization, None, draft.quantization, draft.linear_input_sizes)
        assert quantization is not None
        check_device(quantization, config.device, config.dtype)
    except ConfigError as error:
        raise ConfigError(f"speculative_config: the draft model: {error}") from None
