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

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.auto import ResolvedSettings, resolve
from pagoda.engine.core.executors import create_executor
from pagoda.engine.core.kv_sizing import KVFit, fit_max_model_len
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.messages import EngineReady
from pagoda.errors import ConfigError
from pagoda.execution.executor import Executor
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.models.config import ModelConfig
from pagoda.models.sharding import check_layout
from pagoda.parallel.layout import ParallelLayout
from pagoda.platform.hardware import cpu_report, gpu_reports
from pagoda.scheduling.cache_events import CacheEventLog, CacheEvents, CacheEventSink
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
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
        directory = checkpoint_directory(config.model, config.revision, config.download_dir)
        model_config = ModelConfig.from_directory(directory, generation=config.generation_config == "auto")
        check_layout(model_config, ParallelLayout(config.tensor_parallel_size, config.pipeline_parallel_size))
        config = _with_draft_model(config, model_config)
    with phases.enter("hardware"):
        settings = resolve(config, checkpoint_dtype=model_config.dtype, cpu=cpu_report(), gpus=gpu_reports())
        for choice in settings.choices:
            logger.info("%s", choice)
        config = _resolved(config, settings, str(directory))
        executor = create_executor(config, model_config)
    events, sink = CacheEvents(), CacheEventSink()
    vocab_size = model_config.vocab_size
    structured = StructuredOutputs(
        lambda: GrammarVocabulary.from_directory(checkpoint_directory(config.tokenizer or str(directory)), vocab_size),
        vocab_size,
    )
    try:
        if config.kv_events.is_on:
            events, sink = _publish_kv_events(config, settings.device)
        fit = _bring_up(executor, config, model_config, phases)
        structured.wait_until_loaded()
    except BaseException:  # re-raised; its ranks may be processes, also on other machines
        structured.shutdown()
        executor.shutdown()
        sink.close()
        raise
    scheduler = _make_scheduler(config, settings, model_config, fit, events)
    ready = EngineReady(
        max_model_len=fit.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        num_blocks=fit.num_blocks,
        block_size=config.block_size,
        vocab_size=model_config.vocab_size,
        device=settings.device,
        num_speculative_tokens=scheduler.limits.num_speculative_tokens,
        kv_equation=fit.equation,
        phase_seconds=phases.seconds,
    )
    logger.info("engine ready after %s", ", ".join(f"{name} {taken:.2f} s" for name, taken in phases.seconds.items()))
    return EngineCore(scheduler, executor, ready, sink, structured)


def _publish_kv_events(config: PagodaConfig, device: str) -> tuple[CacheEvents, CacheEventSink]:
    """What the KV cache tells its changes, and what sends them."""
    # Where nothing is published, neither ZeroMQ nor msgspec need be installed.
    from pagoda.engine.core.kv_events import KVEventPublisher

    log = CacheEventLog(config.block_size)
    return log, KVEventPublisher(config.kv_events, log, block_size=config.block_size, device=device)


def _bring_up(executor: Executor, config: PagodaConfig, model_config: ModelConfig, phases: _StartupPhases) -> KVFit:
    """Start the ranks and run their first step; returns the size of the KV cache."""
    executor.connect(phases)
    with phases.enter("weights", str(config.model)):
        executor.load(phases.weights_progress)
    with phases.enter("kv"):
        budget = executor.kv_budget(config.block_size)
        fit = fit_max_model_len(
            block_bytes=budget.block_bytes,
            available_bytes=budget.available_bytes,
            block_size=config.block_size,
            model_max_len=model_config.max_context_length,
            max_model_len=config.max_model_len,
            num_blocks_override=config.num_gpu_blocks_override,
        )
        if budget.note:
            fit = fit._replace(equation=f"{fit.equation}; {budget.note}")
        logger.info("%s", fit.equation)
    with phases.enter("warm-up"):
        executor.initialize_kv_cache(fit.num_blocks, fit.max_model_len)
    return fit


def _with_draft_model(config: PagodaConfig, model_config: ModelConfig) -> PagodaConfig:
    """The configuration with the draft model's directory, if it has one. Raises `ConfigError` where it does not fit."""
    speculation = config.speculation
    if speculation is None or speculation.model is None:
        return config
    directory = checkpoint_directory(speculation.model)
    draft_config = ModelConfig.from_directory(directory)
    if draft_config.vocab_size != model_config.vocab_size:
        raise ConfigError(
            f"speculative_config: the draft model {speculation.model} has a vocabulary of {draft_config.vocab_size} tokens, "
            f"the model one of {model_config.vocab_size}: they must have the same tokenizer"
        )
    return replace(config, speculative_config={**(config.speculative_config or {}), "model": str(directory)})


def _resolved(config: PagodaConfig, settings: ResolvedSettings, directory: str) -> PagodaConfig:
    values = {choice.key: choice.value for choice in settings.choices}
    if config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        values["threads"] = config.threads  # each rank chooses by its own machine, and by how many share it
    return replace(config, model=directory, **values)


def _make_scheduler(
    config: PagodaConfig,
    settings: ResolvedSettings,
    model_config: ModelConfig,
    fit: KVFit,
    events: CacheEvents,
) -> Scheduler:
    windows = set(model_config.layer_windows)
    kv = KVCacheManager(
        fit.num_blocks,
        config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        # A block may be freed only when it is outside the window of every layer.
        sliding_window=None if None in windows else max(window for window in windows if window is not None),
        watermark=config.kv_cache_watermark,
        events=events,
    )
    limits = SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=fit.max_model_len,
        max_num_waiting=config.max_num_waiting,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        max_preemptions=config.max_preemptions,
        policy=config.scheduling_policy,
        num_scheduler_steps=config.num_scheduler_steps,
        num_speculative_tokens=config.speculation.num_speculative_tokens if config.speculation is not None else 0,
        pipeline_parallel_size=config.pipeline_parallel_size,
        max_request_seconds=config.max_request_seconds,
        repetition_detection=config.runaway_detection,
        repetition_max_period=config.runaway_max_period,
        repetition_min_tokens=config.runaway_min_tokens,
    )
    return Scheduler(limits, kv, lookahead=make_lookahead(config.speculation, limits, kv))


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
        self.seconds[name] = time.monotonic() - started

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
