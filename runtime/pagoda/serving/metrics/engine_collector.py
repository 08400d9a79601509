"""The engine's own figures, read from its last report when Prometheus asks: costs nothing per step."""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pagoda.engine.client.interface import EngineClient
from pagoda.engine.health import NOT_LOADED, SERVING, EngineState
from pagoda.engine.messages import EngineStats

# An engine that is not there runs nothing: its last report must not be shown as the present.
STATES_WITHOUT_REQUESTS = (EngineState.STARTING, EngineState.DEAD, EngineState.UNLOADED, EngineState.SLEEPING)
_ENDED_ON_PURPOSE = (*NOT_LOADED, EngineState.SLEEPING)
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # vLLM's, by level


class EngineCollector(Collector):
    """Gauges and counts of one engine, under the names and labels of `Metrics`; of several replicas the sums, and each."""

    def __init__(self, engine: EngineClient, model_name: str, prefix: str, max_loras: int = 0) -> None:
        """`max_loras`: adapters that may run together; 0: it is served without."""
        self._max_loras = max_loras
        self._engine = engine
        self._model_name = model_name
        self._prefix = prefix
        # One count for each core: a core that is restarted counts from 0 again, and the others go on.
        self._parts = [_Part(part) for part in engine.replicas or [engine]]
        self._transitions: Counter[tuple[str, str]] = Counter()  # of engines that others have taken the place of
        self._num_replays = 0

    def follow(self, engine: EngineClient) -> None:
        """Report the figures of `engine`, which has had no requests; counts go on from those of the one before."""
        self._transitions += self._engine.health.transitions
        self._num_replays += self._engine.num_replays
        self._engine = engine
        parts = engine.replicas or [engine]
        for known, part in zip(self._parts, parts, strict=False):
            known.follow(part)
        self._parts += [_Part(part) for part in parts[len(self._parts) :]]

    def collect(self) -> Iterator[Metric]:
        """One family for each figure, as of now."""
        stats, state = self._engine.stats, self._engine.health.shown_state
        idle = state in STATES_WITHOUT_REQUESTS
        yield self._gauge(
            "num_requests_running", "Number of requests in model execution batches.", 0 if idle else stats.num_running
        )
        yield self._gauge(
            "num_requests_waiting", "Number of requests waiting to be processed.", 0 if idle else stats.num_waiting
        )
        yield self._gauge(
            "kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", 0.0 if idle else stats.kv_cache_usage
        )
        yield self._count(
            "prefix_cache_queries",
            "Prefix cache queries, in queried tokens.",
            sum(part.queries() for part in self._parts),
        )
        yield self._count(
            "prefix_cache_hits", "Prefix cache hits, in cached tokens.", sum(part.hits() for part in self._parts)
        )
        misses = CounterMetricFamily(
            self._prefix + "prefix_cache_misses",
            "Tokens that were not in the prefix cache, by reason.",
            labels=["model_name", "reason"],
        )
        for reason in stats.prefix_cache_misses:
            misses.add_metric([self._model_name, reason], sum(part.misses(reason) for part in self._parts))
        yield misses
        yield self._gauge("engine_step_seconds", "How long the engine's last step took.", stats.step_seconds)
        yield self._count("num_preemptions", "Number of preemptions.", sum(part.preemptions() for part in self._parts))
        yield self._count(
            "runaways",
            "Number of outputs found to repeat themselves without end.",
            sum(part.runaways() for part in self._parts),
        )
        yield from self._expert_load(stats)
        yield from self._cache_config()
        yield from self._adapters(stats, idle)
        yield from self._speculation(stats)
        yield from self._health(state)
        yield from self._rank_health()
        if self._engine.replicas:
            yield from self._replicas()

    def _expert_load(self, stats: EngineStats) -> Iterator[Metric]:
        """Of a mixture of experts, once it was measured."""
        load = stats.expert_load
        if load is None:
            return
        yield self._gauge("moe_expert_imbalance", "Rows of the busiest expert by the average one's.", load.imbalance)
        yield self._gauge("moe_expert_imbalance_worst", "The same, of the worst layer.", load.worst_imbalance)
        yield self._gauge("moe_experts_idle", "Share of experts that no row chose.", load.idle_share)
        yield self._gauge("moe_rank_imbalance", "Rows of the busiest rank by the average one's.", load.rank_imbalance)

    def _cache_config(self) -> Iterator[Metric]:
        """Size and number of KV blocks, from which llm-d's prefix scorer learns what a replica can hold."""
        ready = self._engine.ready
        if ready is None:
            return
        values = {"block_size": str(ready.block_size), "num_gpu_blocks": str(ready.num_blocks)}
        family = GaugeMetricFamily(
            self._prefix + "cache_config_info", "1; KV blocks are in the labels.", labels=["model_name", *values]
        )
        family.add_metric([self._model_name, *values.values()], 1)
        yield family

    def _adapters(self, stats: EngineStats, idle: bool) -> Iterator[Metric]:
        """Which adapters run and wait, as llm-d's endpoint picker reads it; nothing without adapters."""
        if not self._max_loras:
            return
        values = {
            "max_lora": str(self._max_loras),
            "waiting_lora_adapters": "" if idle else ",".join(stats.waiting_adapters),
            "running_lora_adapters": "" if idle else ",".join(stats.running_adapters),
        }
        family = GaugeMetricFamily(
            self._prefix + "lora_requests_info",
            "Time of this report; adapters with requests are in the labels.",
            labels=["model_name", *values],
        )
        family.add_metric([self._model_name, *values.values()], time.time())
        yield family

    def _speculation(self, stats: EngineStats) -> Iterator[Metric]:
        """Of an engine with speculative decoding, from its first report on."""
        if not stats.num_spec_accepted_tokens_per_pos:
            return
        figures: list[tuple[str, str, Callable[[_Part], int]]] = [
            ("spec_decode_num_drafts", "Number of spec decoding drafts.", _Part.drafts),
            ("spec_decode_num_draft_tokens", "Number of draft tokens.", _Part.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Number of accepted tokens.", _Part.accepted_tokens),
        ]
        for name, help, figure in figures:
            yield self._count(name, help, sum(map(figure, self._parts)))
        family = CounterMetricFamily(
            f"{self._prefix}spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens per draft position.",
            labels=["model_name", "position"],
        )
        for position in range(len(stats.num_spec_accepted_tokens_per_pos)):
            count = sum(part.accepted_tokens_at(position) for part in self._parts)
            family.add_metric([self._model_name, str(position)], count)
        yield family

    def _replicas(self) -> Iterator[Metric]:
        """A series a replica."""
        figures: list[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Callable[[_Part], float]]] = [
            (GaugeMetricFamily, "up", "1 for a replica that takes requests.", lambda part: part.is_up),
            (GaugeMetricFamily, "num_requests_running", "Its running requests.", lambda part: part.stats.num_running),
            (GaugeMetricFamily, "num_requests_waiting", "Its waiting requests.", lambda part: part.stats.num_waiting),
            (GaugeMetricFamily, "kv_cache_usage_perc", "Its KV-cache usage.", lambda part: part.stats.kv_cache_usage),
            (CounterMetricFamily, "prefix_cache_queries", "Its prefix cache queries, in tokens.", _Part.queries),
            (CounterMetricFamily, "prefix_cache_hits", "Its prefix cache hits, in tokens.", _Part.hits),
            (CounterMetricFamily, "restarts", "Times it failed and was restarted.", _Part.restarts),
        ]
        for family_type, name, help, figure in figures:
            family = family_type(f"{self._prefix}replica_{name}", help, labels=["model_name", "replica"])
            for index, part in enumerate(self._parts):
                family.add_metric([self._model_name, str(index)], figure(part))
            yield family

    def _health(self, state: EngineState) -> Iterator[Metric]:
        """The state, its transitions, and the age of the last heartbeat."""
        transitions = self._transitions + Counter(self._engine.health.transitions)
        restarts = sum(part.restarts() for part in self._parts)
        yield self._count("engine_restarts", "Times the engine failed and was restarted.", restarts)
        yield self._count(
            "request_replays",
            "Times a request went on in another engine than failed.",
            self._num_replays + self._engine.num_replays,
        )
        states = GaugeMetricFamily(
            self._prefix + "engine_state",
            "1 for the state the engine is in, 0 for others.",
            labels=["model_name", "state"],
        )
        for name in EngineState:
            states.add_metric([self._model_name, name.value], float(name == state))
        yield states
        sleep = GaugeMetricFamily(
            self._prefix + "engine_sleep_state",
            "1 for the sleep state of the engine, 0 for others: awake, or level 1 or 2.",
            labels=["model_name", "sleep_state"],
        )
        for level, sleep_state in enumerate(_SLEEP_STATES):
            sleep.add_metric([self._model_name, sleep_state], float(level == self._engine.sleep_level))
        yield sleep
        moves = CounterMetricFamily(
            self._prefix + "engine_state_transitions",
            "Times the engine went from one state to another.",
            labels=["model_name", "from", "to"],
        )
        for origin, target in itertools.permutations([state.value for state in EngineState], 2):
            moves.add_metric([self._model_name, origin, target], transitions.get((origin, target), 0))
        yield moves
        progress = self._engine.heartbeat
        age = time.monotonic() - progress.time if progress is not None and progress.is_up else 0.0
        yield self._gauge(
            "engine_seconds_since_progress", "Age of the engine's last heartbeat; 0 while there is none.", age
        )

    def _rank_health(self) -> Iterator[Metric]:
        """A series a rank and nothing for an engine that has no processes for them."""
        labels = ["model_name", "rank", "host"]
        up = GaugeMetricFamily(self._prefix + "rank_up", "1 for a rank that is up, 0 for a failed one.", labels=labels)
        age = GaugeMetricFamily(
            self._prefix + "rank_seconds_since_heartbeat", "Age of a rank's last heartbeat.", labels=labels
        )
        now = time.monotonic()
        for rank in self._engine.ranks:
            values = [self._model_name, str(rank.rank), rank.host]
            up.add_metric(values, float(rank.is_up))
            age.add_metric(values, now - rank.last_heartbeat)
        if self._engine.ranks:
            yield from (up, age)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _count(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


class StepMeter:
    """Puts the number of tokens of each engine step into a histogram.

    Reports of several steps may have come in between two calls; those steps share their tokens evenly, so that count and
    sum stay exact.
    """

    def __init__(self, engine: EngineClient, histogram: Histogram) -> None:
        self._parts = [_StepMeter(part, histogram) for part in engine.replicas or [engine]]

    def observe(self) -> None:
        """Take in what happened since the last call; a glance at one number of each core where nothing did."""
        for part in self._parts:
            if part.engine.stats.step != part.step:
                part.observe()


class _StepMeter:
    """The steps of one core."""

    def __init__(self, engine: EngineClient, histogram: Histogram) -> None:
        self.engine = engine
        self.step = 0
        self._histogram = histogram
        self._num_tokens = 0

    def observe(self) -> None:
        stats = self.engine.stats
        if stats.step < self.step:  # a core that was restarted counts from 0 again
            self.step = self._num_tokens = 0
        num_steps, num_tokens = stats.step - self.step, stats.num_scheduled_tokens - self._num_tokens
        for _ in range(num_steps):
            self._histogram.observe(num_tokens / num_steps)
        self.step, self._num_tokens = stats.step, stats.num_scheduled_tokens


class _Part:
    """The counts of one core, rising over its restarts."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._queries = _Total()
        self._hits = _Total()
        self._misses: defaultdict[str, _Total] = defaultdict(_Total)
        self._preemptions = _Total()
        self._runaways = _Total()
        self._drafts = _Total()
        self._draft_tokens = _Total()
        self._accepted_tokens = _Total()
        self._accepted_tokens_per_position: defaultdict[int, _Total] = defaultdict(_Total)
        self._restarts = 0  # of engines before

    def follow(self, engine: EngineClient) -> None:
        """Count those of `engine`, from 0, on top."""
        self._restarts = self.restarts()
        self._observe()
        self._engine = engine
        self._observe()

    def _observe(self) -> None:
        for figure in (self.queries, self.hits, self.preemptions, self.runaways):
            figure()
        for figure in (self.drafts, self.draft_tokens, self.accepted_tokens):
            figure()
        for reason in {*self._misses, *self.stats.prefix_cache_misses}:
            self.misses(reason)
        for position in {*self._accepted_tokens_per_position, *range(len(self.stats.num_spec_accepted_tokens_per_pos))}:
            self.accepted_tokens_at(position)

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    @property
    def is_up(self) -> bool:
        return self._engine.health.state in SERVING

    def queries(self) -> int:
        return self._queries(self.stats.prefix_cache_queries)

    def hits(self) -> int:
        return self._hits(self.stats.prefix_cache_hits)

    def misses(self, reason: str) -> int:
        return self._misses[reason](self.stats.prefix_cache_misses.get(reason, 0))

    def preemptions(self) -> int:
        return self._preemptions(self.stats.num_preemptions)

    def runaways(self) -> int:
        return self._runaways(self.stats.num_repetitions)

    def drafts(self) -> int:
        return self._drafts(self.stats.num_spec_drafts)

    def draft_tokens(self) -> int:
        return self._draft_tokens(self.stats.num_spec_draft_tokens)

    def accepted_tokens(self) -> int:
        return self._accepted_tokens(self.stats.num_spec_accepted_tokens)

    def accepted_tokens_at(self, position: int) -> int:
        counts = self.stats.num_spec_accepted_tokens_per_pos
        return self._accepted_tokens_per_position[position](counts[position] if position < len(counts) else 0)

    def restarts(self) -> int:
        transitions = self._engine.health.transitions
        return self._restarts + sum(
            times
            for (origin, to), times in transitions.items()
            if to == EngineState.STARTING and origin not in _ENDED_ON_PURPOSE
        )


class _Total:
    """Keeps a sum rising over restarts of the core, whose own count then begins again at 0."""

    def __init__(self) -> None:
        self._before = 0
        self._last = 0

    def __call__(self, count: int) -> int:
        if count < self._last:
            self._before += self._last
        self._last = count
        return self._before + count
