"""Prometheus metrics: names (after the prefix), meaning, buckets and labels are vLLM's where vLLM has the metric.

All series live in a registry of their own and are labelled with the `model_name`; other labels take values from fixed
lists, so the number of series does not grow with traffic. What the engine counts itself is read when Prometheus asks
(`engine_collector`), and so is what is counted for every token (`token_collector`); what happens to requests is fed by
`RequestTimer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from pagoda.engine.client.interface import EngineClient
from pagoda.errors import ErrorKind
from pagoda.logs import model_name_var
from pagoda.sampling.output import FinishReason
from pagoda.serving.metrics import vllm_names as vllm
from pagoda.serving.metrics.ended_request import EndListener
from pagoda.serving.metrics.engine_collector import EngineCollector, StepMeter
from pagoda.serving.metrics.token_collector import TokenCollector

SLOS = ("ttft", "tpot")
ABORT_CAUSES = ("client", "deadline", "server")

TIME_TO_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_LATENCY_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# vLLM's 1-2-5 rule, with a fixed end: servers of models with different limits can be added up.
REQUEST_TOKENS_BUCKETS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))

Family = TypeVar("Family", bound=MetricWrapperBase)


class MetricFamilies:
    """The families of a server, which its models share: each is there once, with the series of all models.

    `vllm_names`: metrics that vLLM has are rendered under its names, too.
    """

    def __init__(self, prefix: str, *, vllm_names: bool) -> None:
        self.prefix = prefix
        self.registry = CollectorRegistry()
        self.models: dict[str, Metrics] = {}
        self._families: dict[str, Any] = {}
        self._collectors = _Collectors()
        shows_both = vllm_names and prefix != vllm.PREFIX
        self.rendered = vllm.WithVllmNames(self.registry, prefix) if shows_both else self.registry
        self.registry.register(self._collectors)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def family(self, kind: type[Family], name: str, help: str, *labels: str, **options: Any) -> Family:
        """The family of that name, made when it is asked for first."""
        if name not in self._families:
            every = ["model_name", *labels]
            self._families[name] = kind(self.prefix + name, help, every, registry=self.registry, **options)
        found: Family = self._families[name]
        return found

    def collect_from(self, collector: Collector) -> None:
        """Read `collector` at each scrape; families that several have are shown as one."""
        self._collectors.parts.append(collector)

    def collect_no_more_from(self, collector: Collector) -> None:
        """Leave `collector` out from now on."""
        self._collectors.parts.remove(collector)


class _Collectors(Collector):
    """Collectors of several models as one: a family's name stands once in an exposition."""

    def __init__(self) -> None:
        self.parts: list[Collector] = []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for part in self.parts:
            for family in part.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()


class Metrics:
    """Every metric of one served model. `prefix` comes before each name as it is: `pagoda_`, `vllm:`.

    `families`: those of a server that has other models, too; `prefix` and `vllm_names` are then theirs.

    For one event loop's thread: counting from elsewhere is safe, but `RequestTimer`s are not.
    """

    def __init__(
        self,
        model_name: str,
        prefix: str = "pagoda_",
        *,
        vllm_names: bool = True,
        families: MetricFamilies | None = None,
    ) -> None:
        self.families = families or MetricFamilies(prefix, vllm_names=vllm_names)
        self.model_name = model_name
        self.prefix = self.families.prefix
        self.registry = self.families.registry
        self.families.models[model_name] = self
        self._engine: EngineCollector | None = None
        self._step_meter: StepMeter | None = None
        self.end_listeners: list[EndListener] = []
        """Called with each sequence that ends; there are none unless somebody looks at the server."""

        self.prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self.generated_tokens = TokenCollector(model_name, self.prefix, INTER_TOKEN_LATENCY_BUCKETS)
        self.families.collect_from(self.generated_tokens)
        self.request_success = self._counters(
            "request_success",
            "Count of ended requests by the reason they ended for.",
            "finished_reason",
            tuple(FinishReason),
        )
        self.request_aborts = self._counters(
            "request_aborts", "Count of requests that ended early, by what ended them.", "cause", ABORT_CAUSES
        )
        self.request_errors = self._counters(
            "request_errors", "Count of error answers on all routes by the kind of error.", "kind", tuple(ErrorKind)
        )
        self.request_slo_met = self._counters(
            "request_slo_met", "Count of requests that kept an SLO that they came with.", "slo", SLOS
        )
        self.request_slo_missed = self._counters(
            "request_slo_missed", "Count of requests that missed an SLO that they came with.", "slo", SLOS
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token.", TIME_TO_FIRST_TOKEN_BUCKETS
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "Time from arrival to the end.", REQUEST_LATENCY_BUCKETS
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "Time spent waiting to be scheduled.", REQUEST_LATENCY_BUCKETS
        )
        self.request_inference_time = self._histogram(
            "request_inference_time_seconds", "Time from scheduled to the end.", REQUEST_LATENCY_BUCKETS
        )
        self.request_prefill_time = self._histogram(
            "request_prefill_time_seconds", "Time from scheduled to the first token.", REQUEST_LATENCY_BUCKETS
        )
        self.request_decode_time = self._histogram(
            "request_decode_time_seconds", "Time from the first token to the last.", REQUEST_LATENCY_BUCKETS
        )
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Number of tokens per engine step.", ITERATION_TOKENS_BUCKETS
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", REQUEST_TOKENS_BUCKETS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", REQUEST_TOKENS_BUCKETS
        )
        self.request_params_max_tokens = self._histogram(
            "request_params_max_tokens", "The max_tokens that a request gave.", REQUEST_TOKENS_BUCKETS
        )

    def watch(self, engine: EngineClient, *, max_loras: int = 0) -> None:
        """Report `engine`'s own figures, read at each scrape. Call it once. `max_loras`: see `EngineCollector`."""
        self._engine = EngineCollector(engine, self.model_name, self.prefix, max_loras)
        self.families.collect_from(self._engine)
        self._step_meter = StepMeter(engine, self.iteration_tokens)

    def follow(self, engine: EngineClient) -> None:
        """Report the figures of `engine` in place of that of `watch`; counts go on."""
        self.observe_steps()
        assert self._engine is not None
        self._engine.follow(engine)
        self._step_meter = StepMeter(engine, self.iteration_tokens)

    def unwatch(self) -> None:
        """Report no engine any more."""
        if self._engine is not None:
            self.families.collect_no_more_from(self._engine)

    def report(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Report a gauge, whose `value` is asked at each scrape."""
        self.families.family(Gauge, name, help).labels(self.model_name).set_function(value)

    def observe_steps(self) -> None:
        """Take in the engine's steps since the last call; cheap enough for every chunk."""
        if self._step_meter is not None:
            self._step_meter.observe()

    def count_error(self, kind: ErrorKind) -> None:
        """One error answer was given; call it where errors become answers, once for each.

        It counts for the model that the current task's request asked for; before that is known, for this one.
        """
        self.families.models.get(model_name_var.get(), self).request_errors[kind].inc()

    def count_slo(self, slo: str, seconds: float, wanted: float | None) -> None:
        """A request took so many seconds for what one of `SLOS` bounds; None: it wanted nothing."""
        if wanted is not None:
            (self.request_slo_met if seconds <= wanted else self.request_slo_missed)[slo].inc()

    def value(self, name: str, **labels: str) -> float:
        """The value of one series, by the name of its sample without the prefix; 0 if there is none."""
        labels = {"model_name": self.model_name, **labels}
        return self.registry.get_sample_value(self.prefix + name, labels) or 0.0

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body of `/metrics` and its content type, in the format that the `Accept` header prefers."""
        for metrics in self.families.models.values():
            metrics.observe_steps()
        encode, content_type = choose_encoder(accept)
        return encode(self.families.rendered), content_type

    def _counter(self, name: str, help: str) -> Counter:
        return self.families.family(Counter, name, help).labels(self.model_name)

    def _counters(self, name: str, help: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
        counter = self.families.family(Counter, name, help, label)
        return {value: counter.labels(self.model_name, str(value)) for value in values}

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return self.families.family(Histogram, name, help, buckets=buckets).labels(self.model_name)
