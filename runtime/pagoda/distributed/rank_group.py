"""The executor of several ranks, or of one in a process of its own: plans go out to all, results come from one.

    submit ──plan, encoded once──▶ all ranks ──▶ … collectives …
    result ◀──────────────────────  the sampling rank: sampled tokens, by step         any rank: errors

The failure of one rank ends the group: the model's parts are of no use without each other. A step that failed on every rank
before any of them began a collective ends that step only, for then they are still synchronized.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.distributed.rank_kernels import RankKernels
from pagoda.distributed.rank_launcher import RankConnection, RankLauncher
from pagoda.distributed.rank_links import CAUSE_SECONDS, CHECK_SECONDS, RankLinks
from pagoda.distributed.rank_messages import (
    PROTOCOL_VERSION,
    AdapterLoaded,
    CheckCommunication,
    CommunicationChecked,
    InitializeKV,
    JoinGroup,
    KernelsRecorded,
    KVMeasured,
    LoadAdapter,
    LoadProgress,
    LoadWeights,
    MeasureKV,
    Message,
    PhaseDone,
    RankHello,
    RankPrepared,
    RecordKernels,
    ReleaseMemory,
    RunStep,
    StartRank,
    StepDone,
    StepFailed,
    UnloadAdapter,
)
from pagoda.errors import ConfigError, EngineDeadError, PagodaError
from pagoda.execution.executor import (
    AdapterOutcome,
    Executor,
    FailedStep,
    KVBudget,
    RankLoadListener,
    StartupPhases,
    StepHandle,
)
from pagoda.execution.traced_kernel import Kernels
from pagoda.models.config import ModelConfig
from pagoda.parallel.layout import ParallelLayout
from pagoda.parallel.preflight import communication_table
from pagoda.parallel.rank_health import RankHealth
from pagoda.parallel.rank_info import find_mismatches, rank_table
from pagoda.scheduling.plan import NO_SAMPLED_TOKENS, StepPlan, StepResult
from pagoda.scheduling.sampled_tokens_update import SampledTokensTracker
from pagoda.scheduling.step_timeout import stall_bound, tokens_to_wait_for
from pagoda.timers import SuspendSafeTimer
from pagoda.version import __version__

logger = logging.getLogger(__name__)

# From the first rank that failed a step to the last, when it is the same fault on all of them.
_ALIKE_SECONDS = 5.0
_SHUTDOWN_SECONDS = 3.0
# A rank that times out waiting for others reports that itself, and names them.
_OWN_REPORT_SECONDS = 2.0


@dataclass(slots=True)
class _FailedStep:
    """A step that failed on some ranks, or on all; `timer`: since the first of them."""

    step_id: int
    timer: SuspendSafeTimer
    by_rank: dict[int, StepFailed] = field(default_factory=dict)

    @property
    def patience(self) -> float:
        """Seconds in which the others may fail too, or the exit of a rank explain why others could not reach it."""
        is_communication = any(message.is_communication for message in self.by_rank.values())
        return CAUSE_SECONDS if is_communication else _ALIKE_SECONDS


class RankGroup(Executor):
    """The ranks of one model. `launcher` brings them up and is used once.

    Called in this order: `connect`, `load`, `kv_budget`, `initialize_kv_cache`, then steps. Whatever raises a `PagodaError` on
    the way leaves a failed group, all of whose ranks have exited.
    """

    def __init__(
        self,
        config: PagodaConfig,
        model_config: ModelConfig,
        launcher: RankLauncher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._layout = ParallelLayout(
            config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel
        )
        self._launcher = launcher
        self._links: RankLinks | None = None
        self._end_cause: str | None = None
        self._results: dict[int, StepResult] = {}
        self._failures: dict[int, _FailedStep] = {}
        self._in_flight: set[int] = set()
        self._adapters: dict[LoraAdapter, list[str | None]] = {}  # being read: what ranks have said of them
        self._loaded_adapters: list[AdapterOutcome] = []
        self._kernels: RankKernels | None = None
        self._sampled_tokens = SampledTokensTracker() if config.pipeline_parallel_size > 1 else None
        self._deadline = clock() + config.engine_start_timeout_seconds
        # On a GPU a rank only queues a step, so the next one can be sent meanwhile; stages work on different ones.
        on_device = 2 if config.device == "cuda" else 1
        self.max_concurrent_batches = max(on_device, config.pipeline_parallel_size)

    # ---- start-up -------------------------------------------------------------------------------------------------

    @override
    def connect(self, phases: StartupPhases) -> None:
        timeout = self._config.rendezvous_timeout_seconds
        try:
            with phases.enter("launch", f"{self._layout.world_size} rank(s)"):
                connections = self._launcher.launch(self._layout.world_size, timeout, phases.detail)
                self._links = RankLinks(connections, self._launcher.death_of, self._clock)
                self._greet(self._links, timeout)
            with phases.enter("rendezvous"):
                self._meet(self._links, connections, timeout)
            with phases.enter("communication"):
                self._links.send_all(CheckCommunication())
                checked = self._collect(CommunicationChecked, "did not get through the communication check", timeout)
        except PagodaError as error:
            self._fail_group(str(error))
            raise
        for line in communication_table([answer.report for answer in checked]):
            logger.info("%s", line)

    @override
    def load(self, progress: RankLoadListener | None = None) -> None:
        # The progress reported is that of the rank with the smallest share done.
        shares: dict[int, LoadProgress] = {}

        def note(rank: int, message: Message) -> None:
            if isinstance(message, LoadProgress):
                shares[rank] = message
                if progress is not None and len(shares) == self._layout.world_size:
                    slowest = min(shares, key=lambda r: shares[r].bytes_done / max(1, shares[r].bytes_total))
                    share = shares[slowest]
                    progress(f"rank {slowest} of {self._layout.world_size}", share.bytes_done, share.bytes_total)

        self._ask(LoadWeights(), PhaseDone, "did not load the weights", on_other=note)

    @override
    def kv_budget(self, block_size: int) -> KVBudget:
        measured: list[KVMeasured] = self._ask(MeasureKV(block_size), KVMeasured, "did not measure its memory")
        blocks = [answer.available_bytes // answer.block_bytes for answer in measured]
        smallest = blocks.index(min(blocks))
        note = ""
        if len(blocks) > 1:
            listed = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(blocks))
            limit = f"{self._named(smallest)} limits" if min(blocks) < max(blocks) else "no rank limits the others"
            note = f"{limit} (blocks that fit: {listed})"
        return KVBudget(measured[smallest].block_bytes, measured[smallest].available_bytes, note)

    @override
    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        self._ask(InitializeKV(num_blocks, max_model_len), PhaseDone, "did not finish its first step")
        self._alive_links().settle()

    @override
    def release(self, level: int) -> None:
        self._deadline = self._clock() + self._config.engine_start_timeout_seconds
        self._ask(ReleaseMemory(level), PhaseDone, "did not free its memory")

    def _greet(self, links: RankLinks, timeout: float) -> None:
        """Receive the hello of every rank, and check that it runs this version."""
        otherwise = f"did not connect within rendezvous_timeout_seconds={timeout:g}: see its log"
        for rank, hello in enumerate(links.collect(RankHello, deadline=self._by(timeout), otherwise=otherwise)):
            links.note_hello(rank, hello)
            if hello.rank != rank:
                raise EngineDeadError(f"{links.name(rank)} was launched as rank {hello.rank}")
            if (hello.protocol_version, hello.pagoda_version) != (PROTOCOL_VERSION, __version__):
                raise ConfigError(
                    f"{links.name(rank)} runs Pagoda {hello.pagoda_version} (protocol {hello.protocol_version}) and this "
                    f"engine {__version__} (protocol {PROTOCOL_VERSION}): install the same image on every node"
                )

    def _meet(self, links: RankLinks, connections: list[RankConnection], timeout: float) -> None:
        """Configure the ranks, compare what they are, and bring them together at rank 0."""
        fields = self._config.without_secrets()
        hosts = [connection.host for connection in connections]
        links.watch(self._config.rank_heartbeat_timeout_seconds)
        links.send_each(
            [
                StartRank(
                    config=fields,
                    rank=rank,
                    ranks_on_host=hosts.count(connection.host),
                    device_index=connection.device_index,
                    route_to=connection.route_to,
                    uses_ray=self._launcher.uses_ray,
                )
                for rank, connection in enumerate(connections)
            ]
        )
        prepared = self._collect(RankPrepared, "did not take its configuration", timeout)
        ranks = [answer.info for answer in prepared]
        for line in rank_table(ranks):
            logger.info("%s", line)
        if differences := find_mismatches(ranks):
            raise ConfigError("the ranks do not fit together: " + "; ".join(differences))
        links.send_all(JoinGroup(ranks[0].address, prepared[0].port))
        otherwise = f"did not meet the others at {ranks[0].address} (network_interface)"
        self._collect(PhaseDone, otherwise, timeout + _OWN_REPORT_SECONDS)

    def _ask(
        self, command: Any, answer: Any, otherwise: str, on_other: Callable[[int, Message], None] | None = None
    ) -> list[Any]:
        """Send all ranks a command of the start-up and wait for their answers; what goes wrong ends the group."""
        try:
            self._alive_links().send_all(command)
            left = self._deadline - self._clock()
            return self._collect(answer, otherwise, left, "engine_start_timeout_seconds", on_other)
        except PagodaError as error:
            self._fail_group(str(error))
            raise

    def _collect(
        self,
        answer: Any,
        otherwise: str,
        timeout: float,
        setting: str = "rendezvous_timeout_seconds",
        on_other: Callable[[int, Message], None] | None = None,
    ) -> list[Any]:
        text = f"{otherwise} within {setting}={getattr(self._config, setting):g}"
        return self._alive_links().collect(answer, deadline=self._by(timeout), otherwise=text, on_other=on_other)

    def _by(self, timeout: float) -> float:
        return min(self._clock() + timeout, self._deadline)

    # ---- steps ----------------------------------------------------------------------------------------------------

    @override
    def submit(self, plan: StepPlan) -> StepHandle:
        if self._end_cause is not None or self._links is None:
            return FailedStep(EngineDeadError(self._end_cause or "the ranks are not connected"))
        update = NO_SAMPLED_TOKENS if self._sampled_tokens is None else self._sampled_tokens.update_for(plan)
        self._in_flight.add(plan.step_id)
        if plan.token_masks is not None:
            plan.token_masks = plan.token_masks.settled()
        self._links.send_all(RunStep(plan, update))
        return _RankStep(self, plan)

    def wait_for(self, plan: StepPlan) -> StepResult:
        """The result of a plan that was submitted. Raises as `StepHandle.result` does."""
        try:
            result = self._take_result(plan)
        except EngineDeadError as error:
            self._fail_group(str(error))
            raise
        except Exception:  # raised on: the step failed, and what was planned upon it with it
            self._forget_in_flight()
            raise
        self._in_flight.discard(plan.step_id)
        if self._sampled_tokens is not None:
            self._sampled_tokens.record(result)
        return result

    def _take_result(self, plan: StepPlan) -> StepResult:
        bound = stall_bound(tokens_to_wait_for(plan), self._config.collective_timeout_seconds)
        links, timer = self._alive_links(), SuspendSafeTimer(self._clock())
        while plan.step_id not in self._results:
            failure = self._failures.get(plan.step_id)
            if failure is not None and len(failure.by_rank) == self._layout.world_size:
                raise self._common_error(self._failures.pop(plan.step_id))
            if timer.seconds > bound:
                raise EngineDeadError(self._hung(plan, timer.seconds, bound))
            self._note(links.receive(CHECK_SECONDS))
            now = self._clock()
            timer.check(now)
            self._check_failures(now)
        return self._results.pop(plan.step_id)

    def _note(self, received: tuple[int, Message] | None) -> None:
        """Take a message of the time between start-up and the end."""
        if received is None:
            return
        rank, message = received
        if isinstance(message, StepDone):
            if message.result.step_id in self._in_flight:  # else an earlier step failed, and this result is not wanted
                self._results[message.result.step_id] = message.result
        elif isinstance(message, StepFailed):
            failed = _FailedStep(message.step_id, SuspendSafeTimer(self._clock()))
            self._failures.setdefault(message.step_id, failed).by_rank[rank] = message
        elif isinstance(message, AdapterLoaded):
            self._note_adapter(rank, message)
        elif isinstance(message, KernelsRecorded):
            if self._kernels is not None:
                self._kernels.add(message)
        else:
            raise EngineDeadError(f"{self._named(rank)} sent an unexpected {type(message).__name__} during a step")

    def _forget_in_flight(self) -> None:
        """A step failed: the engine plans those after it again, and their results are dropped."""
        for step_id in self._in_flight:
            self._results.pop(step_id, None)
            if self._sampled_tokens is not None:
                self._sampled_tokens.forget(step_id)
        self._in_flight.clear()

    # ---- adapters -------------------------------------------------------------------------------------------------

    @override
    def load_adapter(self, slot: int, adapter: LoraAdapter) -> None:
        if self._links is not None and self._end_cause is None:
            self._adapters[adapter] = []
            self._links.send_all(LoadAdapter(slot, adapter))

    @override
    def unload_adapter(self, slot: int) -> None:
        if self._links is not None and self._end_cause is None:
            self._links.send_all(UnloadAdapter(slot))

    @override
    def take_loaded_adapters(self, timeout: float) -> list[AdapterOutcome]:
        until = self._clock() + timeout
        self.check_health()  # which reads messages
        while not self._loaded_adapters and (left := until - self._clock()) > 0:
            try:
                self._note(self._alive_links().receive(left))
            except PagodaError as error:
                self._fail_group(str(error))
                raise EngineDeadError(str(error)) from error
        outcomes, self._loaded_adapters = self._loaded_adapters, []
        return outcomes

    def _note_adapter(self, rank: int, message: AdapterLoaded) -> None:
        """An adapter is there when all ranks have their share of it."""
        said = self._adapters[message.adapter]
        said.append(message.error and f"{self._named(rank)}: {message.error}")
        if len(said) == self._layout.world_size:
            del self._adapters[message.adapter]
            error = next((each for each in said if each), None)
            self._loaded_adapters.append(AdapterOutcome(message.adapter, error))

    # ---- kernels --------------------------------------------------------------------------------------------------

    @override
    def record_kernels(self) -> Kernels:
        self._kernels = RankKernels(self.tell_ranks, self._layout.world_size)
        return self._kernels

    def tell_ranks(self, command: RecordKernels) -> None:
        """Send a command that has no answer; nothing where the ranks are gone."""
        if self._links is not None and self._end_cause is None:
            self._links.send_all(command)

    # ---- failed steps ---------------------------------------------------------------------------------------------

    def _check_failures(self, now: float) -> None:
        """Raise `EngineDeadError` when a step has failed for some ranks, and the others had time to fail likewise."""
        for failure in list(self._failures.values()):
            if len(failure.by_rank) < self._layout.world_size:
                if failure.timer.check(now) > failure.patience:
                    raise EngineDeadError(self._blame(failure))
            elif failure.step_id not in self._in_flight:
                del self._failures[failure.step_id]
                error = self._common_error(failure)
                if isinstance(error, EngineDeadError):
                    raise error

    def _common_error(self, failure: _FailedStep) -> Exception:
        """Every rank failed: the step's own error if they are still synchronized, else the group has failed."""
        failures = failure.by_rank.values()
        if any(message.is_out_of_step for message in failures):
            return EngineDeadError(self._blame(failure))
        error = failure.by_rank[0].error
        return MemoryError(error) if any(message.is_out_of_memory for message in failures) else RuntimeError(error)

    def _blame(self, failure: _FailedStep) -> str:
        """Some ranks failed a step. The cause is one that failed by itself, else those that the failed ones waited for."""
        step_id = failure.step_id
        for rank, message in failure.by_rank.items():
            if not message.is_communication:
                return f"{self._named(rank)} failed step {step_id}, which all ranks share: {message.error}"
        rank, message = next(iter(failure.by_rank.items()))
        others = [self._named(other) for other in range(self._layout.world_size) if other not in failure.by_rank]
        silent = f"; {', '.join(others)} did not answer" if others else ""
        return (
            f"{self._named(rank)} could not communicate with the other ranks in step {step_id}: {message.error}{silent}"
        )

    def _hung(self, plan: StepPlan, waited: float, bound: float) -> str:
        behind = self._alive_links().furthest_behind()
        who = "all ranks are in it" if len(behind) == self._layout.world_size else "the others wait for "
        if len(behind) < self._layout.world_size:
            who += ", ".join(map(self._named, behind))
        return (
            f"step {plan.step_id} with {plan.total_tokens} tokens was not done after {waited:.1f} s (bound {bound:.1f} s by "
            f"collective_timeout_seconds): {who}"
        )

    # ---- health and end -------------------------------------------------------------------------------------------

    @override
    def check_health(self) -> None:
        # Messages are read here too, so that the exit of an idle rank is noticed.
        if self._end_cause is None and self._links is not None:
            try:
                while (received := self._links.receive(0)) is not None:
                    self._note(received)
            except PagodaError as error:
                self._fail_group(str(error))
        if self._end_cause is not None:
            raise EngineDeadError(self._end_cause)

    @override
    def ranks(self) -> list[RankHealth]:
        return [] if self._links is None else self._links.health()

    @override
    def shutdown(self) -> None:
        self._end("the executor was shut down", _SHUTDOWN_SECONDS)

    def _fail_group(self, cause: str) -> None:
        """The group has failed: all ranks end now, whatever they are doing."""
        if self._end_cause is None:
            logger.error("the ranks failed: %s", cause)
            self._end(cause, 0.0)

    def _end(self, cause: str, patience: float) -> None:
        if self._end_cause is not None:
            return
        self._end_cause = cause
        if self._links is not None:
            self._links.end(cause)
        self._launcher.terminate(patience)
        if self._links is not None:
            self._links.close()

    def _named(self, rank: int) -> str:
        return self._alive_links().name(rank)

    def _alive_links(self) -> RankLinks:
        if self._links is None or self._end_cause is not None:
            raise EngineDeadError(self._end_cause or "the ranks are not connected")
        return self._links


class _RankStep(StepHandle):
    """A step under way on all ranks."""

    def __init__(self, group: RankGroup, plan: StepPlan) -> None:
        self._group = group
        self._plan = plan

    @override
    def result(self) -> StepResult:
        return self._group.wait_for(self._plan)
