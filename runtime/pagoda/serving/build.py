"""Builds what all protocols of a server share, its models among it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.interface import EngineClient
from pagoda.serving.auth.api_keys import ApiKeys
from pagoda.serving.context import ServingContext
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.generation import GenerationRunner, Job, RequestObserver
from pagoda.serving.health import Health, ModelHealth, ServerHealth
from pagoda.serving.inference_headers import inference_headers_var
from pagoda.serving.metrics.prometheus import MetricFamilies, Metrics
from pagoda.serving.metrics.request_meter import RequestMeter
from pagoda.serving.metrics.request_timer import Slos
from pagoda.serving.model_budget import ServerBudget, share_out
from pagoda.serving.models import ModelRegistry, ServedModel
from pagoda.serving.rate_limits import RateLimiter
from pagoda.serving.repository import ModelRepository
from pagoda.serving.request_memory import RequestMemory
from pagoda.serving.request_turns import RequestTurns
from pagoda.serving.tracing.seam import Tracing
from pagoda.serving.tracing.setup import make_tracing

INFLIGHT_BODIES = 16
"""Of the largest size, that are received and decoded at a time; see `max_inflight_body_bytes`."""


MakeEngine = Callable[[PagodaConfig, str], EngineClient]
"""Makes the engine of other settings, by a name for the log."""


def make_context(
    config: PagodaConfig,
    client: EngineClient,
    keys: ApiKeys | None = None,
    make_engine: MakeEngine | None = None,
) -> ServingContext:
    """What all protocols of a server of one model share; the generator is attached once the checkpoint is there.

    `make_engine`: for versions that are loaded later; without it there are none.
    """
    return _context(config, {config.served_model_name: config}, [client], keys, None, make_engine)


def make_context_of_several(
    config: PagodaConfig,
    models: Mapping[str, PagodaConfig],
    clients: Sequence[EngineClient],
    keys: ApiKeys | None = None,
    budget: ServerBudget | None = None,
    make_engine: MakeEngine | None = None,
) -> ServingContext:
    """The same of a server of several models, one client for each; `budget`: of the machine, where it is known already."""
    return _context(config, models, clients, keys, budget or share_out(config, models), make_engine)


def _context(
    config: PagodaConfig,
    configs: Mapping[str, PagodaConfig],
    clients: Sequence[EngineClient],
    keys: ApiKeys | None,
    budget: ServerBudget | None,
    make_engine: MakeEngine | None,
) -> ServingContext:
    keys = ApiKeys.from_config(config) if keys is None else keys
    families = MetricFamilies(config.metrics_prefix, vllm_names=config.vllm_metric_names)
    rate_limits = RateLimiter()
    tracing = make_tracing(config)
    models = []
    for (name, one), client in zip(configs.items(), clients, strict=True):
        models.append(make_model(one, client, Metrics(name, families=families), rate_limits, tracing))
        watch_engine(models[-1])
    # What is counted for the server itself has the label of its first model, where it has one at the start.
    metrics = models[0].metrics if models else Metrics("", families=families)
    report_keys(metrics, keys)

    registry = ModelRegistry(models, names_model=budget is not None)
    repository = ModelRepository(
        registry,
        budget,
        factory=make_engine and _Factory(make_engine, families, rate_limits, tracing),
        load_on_demand=config.load_on_demand,
        idle_unload_seconds=config.idle_unload_seconds,
        spare_process_seconds=config.spare_process_seconds,
    )
    health: Health
    if budget is not None:
        health = several = ServerHealth([(model.name, model.health) for model in models], repository.must_be_there)
        repository.server_health = several
    else:
        health = models[0].health
    return ServingContext(
        config=config,
        models=registry,
        repository=repository,
        health=health,
        metrics=metrics,
        keys=keys,
        decoding=DecodingThreads(RequestMemory(_inflight_body_bytes(config))),
        turns=RequestTurns(),
        rate_limits=rate_limits,
        tracing=tracing,
    )


class _Factory:
    """Makes models and versions that come while the server runs; see `ModelFactory`."""

    def __init__(
        self, make_engine: MakeEngine, families: MetricFamilies, rate_limits: RateLimiter, tracing: Tracing
    ) -> None:
        self._make_engine = make_engine
        self._families = families
        self._rate_limits = rate_limits
        self._tracing = tracing

    def model(self, config: PagodaConfig) -> ServedModel:
        name = config.served_model_name
        metrics = self._families.models.get(name) or Metrics(name, families=self._families)
        client = self._make_engine(config, f"engine of {name}")
        model = make_model(config, client, metrics, self._rate_limits, self._tracing)
        watch_engine(model)
        return model

    def version(self, before: ServedModel, config: PagodaConfig, version: str) -> ServedModel:
        client = self._make_engine(config, f"engine of {before.name}, version {version}")
        return make_model(config, client, before.metrics, self._rate_limits, self._tracing, version)


def watch_engine(model: ServedModel) -> None:
    """Have the metrics of the model's name show its engine."""
    config = model.config
    model.metrics.watch(model.client, max_loras=config.max_loras if config.enable_lora else 0)


def make_model(
    config: PagodaConfig,
    client: EngineClient,
    metrics: Metrics,
    rate_limits: RateLimiter,
    tracing: Tracing,
    version: str = "1",
) -> ServedModel:
    """A served model, before its engine has started. `metrics`: those of its name."""
    health = ModelHealth(client)
    health.wakes_on_request = config.wake_on_request
    client.health.drain(config.drain)
    tracing.watch(client)
    name = config.served_model_name

    def observe(job: Job, arrival_time: float) -> RequestObserver:
        meter = RequestMeter(metrics, job.params, arrival_time, slos=_slos(), request_id=job.request_id)
        return tracing.observer(name, job, arrival_time, meter)

    runner = GenerationRunner(
        None,
        health,
        request_timeout_seconds=config.request_timeout_seconds,
        observe=observe,
        rate_limits=rate_limits,
    )
    return ServedModel(config, client, runner, health, metrics, version)


def _slos() -> Slos:
    headers = inference_headers_var.get()
    return Slos(headers.ttft_slo, headers.tpot_slo)


def report_keys(metrics: Metrics, keys: ApiKeys) -> None:
    """Show how many keys are in force, and whether their file could be read again."""
    metrics.report("api_keys", "Number of API keys in force.", lambda: len(keys))
    if (file := keys.file) is None:
        return
    metrics.report(
        "api_keys_last_reload_successful", "Whether api_keys_file could be used the last time.", lambda: file.is_current
    )
    metrics.report(
        "api_keys_last_reload_success_timestamp_seconds",
        "When the keys in force were last seen in api_keys_file.",
        lambda: file.last_success,
    )


def _inflight_body_bytes(config: PagodaConfig) -> int:
    largest = max(config.max_body_bytes, config.max_grpc_message_bytes)
    return config.max_inflight_body_bytes or INFLIGHT_BODIES * largest
