"""What travels between the engine core, which drives, and its ranks.

driver ──▶ rank                      rank ──▶ driver
                                     RankHello              first, before any command
StartRank                            RankPrepared           configuration taken, machine looked at
JoinGroup                            PhaseDone              met the other ranks
CheckCommunication                   PhaseDone              a collective gave the right numbers
LoadWeights                          LoadProgress …, PhaseDone
MeasureKV                            KVMeasured
InitializeKV                         PhaseDone
ReleaseMemory                        PhaseDone              then LoadWeights and InitializeKV again, before any step
RunStep …                            StepDone               from the sampling rank
                                     StepFailed             from any rank
RecordKernels                        KernelsRecorded …      about once a second, until told to stop
Heartbeat …                          RankHeartbeat …        whatever else goes on
EndRank                              RankFailed             in place of an answer; the rank then exits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagoda.adapters import LoraAdapter
from pagoda.errors import ErrorKind
from pagoda.execution.traced_kernel import TracedKernel
from pagoda.parallel.preflight import CommunicationReport
from pagoda.parallel.rank_info import RankInfo
from pagoda.scheduling.plan import NO_SAMPLED_TOKENS, SampledTokensUpdate, StepPlan, StepResult

PROTOCOL_VERSION = 5
"""Of these messages. Ranks of another one are refused by name before anything else of theirs is read."""


@dataclass(frozen=True, slots=True)
class RankHello:
    """The rank's number, as its launcher gave it, and its versions. The fields never change their meaning."""

    rank: int
    protocol_version: int
    pagoda_version: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRank:
    """The resolved configuration without secrets, and the rank's place on its machine.

    `ranks_on_host` share its cores and memory; `device_index` is the rank's GPU there. `route_to`: see `choose_interface`.
    """

    config: dict[str, Any]
    rank: int
    ranks_on_host: int
    device_index: int
    route_to: str | None
    uses_ray: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPrepared:
    """The configuration was taken. `port`: where rank 0 listens on `info.address`, for all to meet; 0 from the others.

    `threads`: compute threads of the rank.
    """

    info: RankInfo
    port: int
    threads: int


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """Meet the other ranks at this address."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class CheckCommunication:
    """Run a few collectives and report."""


@dataclass(frozen=True, slots=True)
class CommunicationChecked:
    """What the rank has measured."""

    report: CommunicationReport


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Set up the device, load this rank's share."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Bytes of this rank's share."""

    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class MeasureKV:
    """Measure the memory that there is for KV blocks of `block_size` tokens."""

    block_size: int


@dataclass(frozen=True, slots=True)
class KVMeasured:
    """Bytes of one block in the layers of this rank, and bytes for all."""

    block_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class InitializeKV:
    """Allocate the KV cache and run a first step; see `Executor.initialize_kv_cache`."""

    num_blocks: int
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class ReleaseMemory:
    """Free weights and KV cache; see `Executor.release`."""

    level: int


@dataclass(frozen=True, slots=True)
class PhaseDone:
    """The start-up phase is over."""

    phase: str


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run a plan, after writing the tokens that earlier steps sampled."""

    plan: StepPlan
    update: SampledTokensUpdate = NO_SAMPLED_TOKENS


@dataclass(frozen=True, slots=True)
class StepDone:
    """What the sampling rank has sampled."""

    result: StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The step raised on this rank. `is_communication`: because other ranks could not be reached.

    `is_out_of_step`: some collective of this step was run before, so that this rank goes on only if all others stopped there.
    """

    step_id: int
    error: str
    is_out_of_memory: bool
    is_communication: bool
    is_out_of_step: bool


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Read this rank's share of an adapter for a slot, beside the steps, and put it there between two of them."""

    slot: int
    adapter: LoraAdapter


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """The adapter is in its slot on this rank, or why it is not."""

    adapter: LoraAdapter
    error: str | None = None


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Empty the slot of an adapter."""

    slot: int


@dataclass(frozen=True, slots=True)
class RecordKernels:
    """Record what torch runs from now on, at most `most` kernels a second; 0: no longer."""

    most: int


@dataclass(frozen=True, slots=True)
class KernelsRecorded:
    """What ran on this rank, by its own monotonic clock, which is `epoch` seconds behind the time of day.

    `num_lost`: more kernels that are not in it.
    """

    kernels: list[TracedKernel]
    num_lost: int
    epoch: float


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Of the driver."""


@dataclass(frozen=True, slots=True)
class RankHeartbeat:
    """Sent by a thread of its own, however long a step takes; so many steps and collectives the rank has run."""

    num_steps: int
    num_operations: int


@dataclass(frozen=True, slots=True)
class EndRank:
    """End, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class RankFailed:
    """The rank cannot go on, and why; it ends right after this. `is_communication`: it could not reach other ranks."""

    kind: ErrorKind
    message: str
    is_communication: bool


KINDS = (
    RankHello,
    StartRank,
    RankPrepared,
    JoinGroup,
    CheckCommunication,
    CommunicationChecked,
    LoadWeights,
    LoadProgress,
    MeasureKV,
    KVMeasured,
    InitializeKV,
    ReleaseMemory,
    PhaseDone,
    RunStep,
    StepDone,
    StepFailed,
    LoadAdapter,
    AdapterLoaded,
    UnloadAdapter,
    RecordKernels,
    KernelsRecorded,
    Heartbeat,
    RankHeartbeat,
    EndRank,
    RankFailed,
)

Command = (
    StartRank
    | JoinGroup
    | CheckCommunication
    | LoadWeights
    | MeasureKV
    | InitializeKV
    | ReleaseMemory
    | RunStep
    | LoadAdapter
    | UnloadAdapter
    | RecordKernels
    | EndRank
)
Answer = (
    RankHello
    | RankPrepared
    | CommunicationChecked
    | LoadProgress
    | KVMeasured
    | PhaseDone
    | StepDone
    | StepFailed
    | AdapterLoaded
    | KernelsRecorded
    | RankFailed
)
Message = Command | Answer | Heartbeat | RankHeartbeat
