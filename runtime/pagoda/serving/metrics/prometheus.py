"""Prometheus metrics: names (after the prefix), meaning, buckets and labels are vLLM's where vLLM has the metric.

All series live in a registry of their own and have the one label value `model_name`; other labels take values from fixed
lists, so the number of series does not grow with traffic. What the engine counts itself is read when Prometheus asks
(`engine_collector`), and so is what is counted for every token (`token_collector`); what happens to requests is fed by
`RequestTimer`.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder

from pagoda.engine.client.client import EngineClient
from pagoda.errors import ErrorKind
from pagoda.sampling.output import FinishReason
from pagoda.serving.metrics import vllm_names as vllm
from pagoda.serving.metrics.engine_collector import EngineCollector, StepMeter
from pagoda.serving.metrics.token_collector import TokenCollector

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


class Metrics:
    """Every metric of one served model. `prefix` comes before each name as it is: `pagoda_`, `vllm:`.

    `vllm_names`: metrics that vLLM has are rendered under its names, too.

    For one event loop's thread: counting from elsewhere is safe, but `RequestTimer`s are not.
    """

    def __init__(self, model_name: str, prefix: str = "pagoda_", *, vllm_names: bool = True) -> None:
        self.model_name = model_name
        self.prefix = prefix
        self.registry = CollectorRegistry()
        shows_both = vllm_names and prefix != vllm.PREFIX
        self._rendered = vllm.WithVllmNames(self.registry, prefix) if shows_both else self.registry
        self._step_meter: StepMeter | None = None
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        self.prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self.generated_tokens = TokenCollector(model_name, prefix, INTER_TOKEN_LATENCY_BUCKETS)
        self.registry.register(self.generated_tokens)
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
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token.", TIME_TO_FIRST_TOKEN_BUCKETS
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "Time from arrival to the end.", REQUEST_LATENCY_BUCKETS
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "Time spent waiting to be scheduled.", REQUEST_LATENCY_BUCKETS
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

    def watch(self, engine: EngineClient) -> None:
        """Report `engine`'s own figures, read at each scrape. Call it once."""
        self.registry.register(EngineCollector(engine, self.model_name, self.prefix))
        self._step_meter = StepMeter(engine, self.iteration_tokens)

    def report(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Report a gauge, whose `value` is asked at each scrape."""
        gauge = Gauge(self.prefix + name, help, ["model_name"], registry=self.registry)
        gauge.labels(self.model_name).set_function(value)

    def observe_steps(self) -> None:
        """Take in the engine's steps since the last call; cheap enough for every chunk."""
        if self._step_meter is not None:
            self._step_meter.observe()

    def count_error(self, kind: ErrorKind) -> None:
        """One error answer was given; call it where errors become answers, once for each."""
        self.request_errors[kind].inc()

    def value(self, name: str, **labels: str) -> float:
        """The value of one series, by the name of its sample without the prefix; 0 if there is none."""
        labels = {"model_name": self.model_name, **labels}
        return self.registry.get_sample_value(self.prefix + name, labels) or 0.0

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body of `/metrics` and its content type, in the format that the `Accept` header prefers."""
        self.observe_steps()
        encode, content_type = choose_encoder(accept)
        return encode(self._rendered), content_type

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(self.prefix + name, help, ["model_name"], registry=self.registry).labels(self.model_name)

    def _counters(self, name: str, help: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
        counter = Counter(self.prefix + name, help, ["model_name", label], registry=self.registry)
        return {value: counter.labels(self.model_name, str(value)) for value in values}

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(self.prefix + name, help, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self.model_name)
