"""What a server does, as figures of a few seconds: between two looks at it."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.monitoring.samples import Histogram, Samples, rate
from pagoda.monitoring.server import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """Of one model. Rates are a second; times are seconds; shares 0 to 1. None: not known, or nothing happened.

    `step_seconds`: of the last step; `tokens_a_step`: its prompt and output tokens. `ttft`, `itl`: median and 99th percentile.
    `acceptance_length`: tokens of a sequence a step in which it had drafts.
    """

    name: str
    state: str
    running: float
    waiting: float
    kv_usage: float
    requests: float | None = None
    output_tokens: float | None = None
    prompt_tokens: float | None = None
    steps: float | None = None
    step_seconds: float | None = None
    tokens_a_step: float | None = None
    preemptions: float | None = None
    hit_share: float | None = None
    ttft: tuple[float, float] | None = None
    itl: tuple[float, float] | None = None
    acceptance_share: float | None = None
    acceptance_length: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A replica or a rank: its name, whether it is up, and what else there is to say."""

    name: str
    model: str
    is_up: bool
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of a server. `error_rates`: error answers a second by kind; `seconds`: over which rates were taken.

    `not_shown`: why the server shows only the states; empty where it shows all.
    """

    state: str
    stage: str
    detail: str
    cause: str | None
    models: list[ModelFigures]
    parts: list[Part]
    error_rates: dict[str, float]
    seconds: float
    not_shown: str = ""


def figures(now: Snapshot, then: Snapshot | None) -> Figures:
    """Rates and latencies since `then`; without it only what is true at once."""
    seconds = now.time - then.time if then is not None else 0.0
    before = then.samples if then is not None else None
    names = list(now.models)
    models = [_model(name, now, before, seconds) for name in names]
    errors: dict[str, float] = {}
    if now.samples is not None and before is not None and seconds > 0:
        earlier = before.by("request_errors_total", "kind")
        for kind, count in now.samples.by("request_errors_total", "kind").items():
            if (grown := count - earlier.get(kind, 0.0)) > 0:
                errors[kind] = grown / seconds
    health = now.health
    return Figures(
        state=health["state"],
        stage=health.get("stage", ""),
        detail=health.get("detail", ""),
        cause=health.get("cause"),
        models=models,
        parts=[part for name, one in now.models.items() for part in _parts(name, one)],
        error_rates=errors,
        seconds=seconds,
        not_shown=now.refusals.get("/metrics", ""),
    )


def _model(name: str, now: Snapshot, before: Samples | None, seconds: float) -> ModelFigures:
    health, samples = now.models[name], now.samples
    state = health["state"]
    if samples is None:  # without the scope `read`
        return ModelFigures(
            name=name,
            state=state,
            running=health.get("running", 0),
            waiting=health.get("waiting", 0),
            kv_usage=health.get("kv_cache_usage", 0.0),
        )

    def value(metric: str) -> float:
        return samples.value(metric, model_name=name) or 0.0

    def grown(metric: str) -> float | None:
        then = before.value(metric, model_name=name) if before is not None else None
        return rate(samples.value(metric, model_name=name), then, seconds)

    def of(metric: str) -> Histogram | None:
        found = samples.histogram(metric, model_name=name)
        then = before.histogram(metric, model_name=name) if before is not None else None
        return found.minus(then) if found is not None else None

    steps = of("iteration_tokens_total")
    queries, hits = grown("prefix_cache_queries_total"), grown("prefix_cache_hits_total")
    drafts, drafted, accepted = (
        grown(f"spec_decode_num_{what}_total") for what in ("drafts", "draft_tokens", "accepted_tokens")
    )
    return ModelFigures(
        name=name,
        state=state,
        running=value("num_requests_running"),
        waiting=value("num_requests_waiting"),
        kv_usage=value("kv_cache_usage_perc"),
        requests=grown("request_success_total"),
        output_tokens=grown("generation_tokens_total"),
        prompt_tokens=grown("prompt_tokens_total"),
        steps=steps.count / seconds if steps is not None and seconds > 0 else None,
        step_seconds=samples.value("engine_step_seconds", model_name=name),
        tokens_a_step=steps.mean if steps is not None else None,
        preemptions=grown("num_preemptions_total"),
        hit_share=hits / queries if queries and hits is not None else None,
        ttft=_middle_and_tail(of("time_to_first_token_seconds")),
        itl=_middle_and_tail(of("inter_token_latency_seconds")),
        acceptance_share=accepted / drafted if drafted and accepted is not None else None,
        acceptance_length=1 + accepted / drafts if drafts and accepted is not None else None,
    )


def _middle_and_tail(histogram: Histogram | None) -> tuple[float, float] | None:
    if histogram is None:
        return None
    middle, tail = histogram.quantile(0.5), histogram.quantile(0.99)
    return None if middle is None or tail is None else (middle, tail)


def _parts(model: str, health: dict[str, object]) -> list[Part]:
    found = []
    replicas, ranks = health.get("replicas"), health.get("ranks")
    for one in replicas if isinstance(replicas, list) else []:
        note = f"{one['state']}, {one['running']} running, {one['waiting']} waiting, KV {one['kv_cache_usage']:.0%}"
        is_up = one["state"] in ("ready", "degraded")
        note += f": {one['cause']}" if one.get("cause") and not is_up else ""
        found.append(Part(name=f"replica {one['replica']}", model=model, is_up=is_up, note=note))
    for one in ranks if isinstance(ranks, list) else []:
        note = (
            f"{one['host']}, pid {one['pid']}, step {one['step']}, heartbeat {one['seconds_since_heartbeat']:.1f} s ago"
        )
        found.append(Part(name=f"rank {one['rank']}", model=model, is_up=bool(one["up"]), note=note))
    return found
