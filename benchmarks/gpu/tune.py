"""A tuning table for the GPU here, measured: OUT/tuned/sm_XY.json, and all timings in OUT/tune.json.

    python -m benchmarks.gpu --out DIR --parts tune [--minutes 9]

For every head dimension and element size, decode and prefill, the table's present configuration is measured beside all that
arithmetic does not rule out, by the weighted geometric mean of times over shapes that stand for serving (`tune_space`):

    compile        9 to 27 candidates, 3 to 5 s each, in a process for every core but two: 10 s with 16 cores
    round 1        all of them on one shape; the best third goes on
    round 2        on four shapes, of two ratios of heads; the best three go on
    round 3        on all shapes; the best is checked against a float64 computation, with a window and a soft cap too

That is some 70 timings of 0.1 s an entry, so 20 to 30 s; eighteen entries and the rule for segments are predicted to take 8 to
9 minutes on an H200 with 16 cores, with some 600 compilations. The most valuable come first (128 numbers of bfloat16, decode
then prefill); entries that are not reached keep their values, and the table is written after each, so a run that is cut off
leaves what it has found. A second call with the first one's table in `pagoda_kernels/tuned` goes on from there.

A configuration that wins by less than 1 % does not win: the present one stays. Compilations that spill in decode, or need more
shared memory than there is, are left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.batches import AttentionBatch, batch_on_meta, make_batch
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernels import TOLERANCE
from benchmarks.gpu.tune_space import (
    DECODE_SHAPES,
    PREFILL_SHAPES,
    TINY_SHAPES,
    Entry,
    Shape,
    dtypes,
    entries,
    rule_candidates,
    tile_candidates,
)
from pagoda_kernels import backend
from pagoda_kernels.gpu.precompile import Compiled, KernelPrecompiler, Specialization, recorded_launches
from pagoda_kernels.gpu.tuning import TuningTable, own_table_name, table_in_use, table_of_device, written

# An entry is not begun with less time left, and none is measured with less than the second.
SECONDS_AN_ENTRY, SECONDS_TO_FINISH = 45, 12
# Of each launch: keys and values at least, over several layers, so that the GPU's cache has none of them; and at most.
LEAST_BYTES, MOST_SHARE_OF_MEMORY = 1 << 30, 0.25
LEAST_GAIN = 1.01
# Bytes a thread: one or two values that are kept outside the loop. More is a spill.
MOST_DECODE_STACK = 16
# Of each round but the last: shapes measured by then, and one of how many candidates goes on.
SHAPES_AND_SHARE_BY_ROUND = ((1, 3), (4, 4))
FEWEST_SURVIVORS = 3


class TimeIsUpError(Exception):
    """There is no time to come to a decision."""


class Limits(NamedTuple):
    """Of the GPU at hand: compute capability, shared memory a program may have, memory a batch may take."""

    capability: tuple[int, int]
    shared_bytes: int
    batch_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A whole table that differs from the present one in `change`."""

    table: TuningTable
    change: dict[str, Any]


def run(context: Context) -> dict[str, Any]:
    """Tune entry by entry; the table found so far is on the disk after each."""
    backend.use_backend("triton")
    limits = _limits(context)
    tuner = Tuner(context, table_of_device(context.device), limits)
    every = list(entries(limits.capability))
    for entry in context.choose(every, [Entry("decode", 64, 4), Entry("prefill", 64, 4)]):
        if not context.dry_run and context.seconds_left() < SECONDS_AN_ENTRY:
            break
        tuner.tune(entry)
    return {"results": context.entries, "headline": {"table": str(tuner.path), "gains": tuner.gains}}


def _limits(context: Context) -> Limits:
    if context.device.type != "cuda":
        return Limits((9, 0), 227 << 10, 1 << 30)
    properties = torch.cuda.get_device_properties(context.device)
    free, _ = torch.cuda.mem_get_info()
    shared: int = properties.shared_memory_per_block_optin
    return Limits((properties.major, properties.minor), shared, int(MOST_SHARE_OF_MEMORY * free))


class Tuner:
    """Holds the best table so far. `gains`: of each decision, how many times as fast as before."""

    def __init__(self, context: Context, table: TuningTable, limits: Limits) -> None:
        self.context, self.table, self.limits = context, table, limits
        self.gains: dict[str, float] = {}
        self._note_before = table.note
        name = own_table_name(limits.capability) if context.device.type == "cuda" else table.name
        folder = context.out / "tuned"
        folder.mkdir(exist_ok=True)
        self.path = folder / f"{name}.json"

    def tune(self, entry: Entry) -> None:
        """Decide an entry; after the first of decode, the rule by which contexts are cut too."""
        present = entry.present(self.table)
        tiles = tile_candidates(entry, present, self.limits.capability, self.limits.shared_bytes)
        choices = [Candidate(entry.put(self.table, one), asdict(one)) for one in self.context.choose(tiles, tiles[:3])]
        self._decide(str(entry), entry, choices)
        if entry.kind == "decode" and "segments" not in self.gains:
            rules = rule_candidates(self.table.segments)
            choices = [
                Candidate(replace(self.table, segments=rule), asdict(rule))
                for rule in self.context.choose(rules, rules[:3])
            ]
            self._decide("segments", entry, choices)

    def _decide(self, name: str, entry: Entry, choices: list[Candidate]) -> None:
        """Take the best of `choices`, of which the first is the present one, and write the table."""
        try:
            winner, gain = Search(self.context, name, entry, self.limits).best(choices)
        except TimeIsUpError:
            self.context.keep({"entry": name, "decision": "no time: the present values stay"})
            return
        self.table, self.gains[name] = winner.table, round(gain, 3)
        self.context.keep({"entry": name, "decision": winner.change, "gain": gain})
        self.path.write_text(written(replace(self.table, note=self._note())), encoding="utf-8")

    def _note(self) -> str:
        facts = self.context.environment
        versions = ", ".join(
            f"{name} {facts['versions'][name]}" for name in ("torch", "triton") if name in facts["versions"]
        )
        gains = ", ".join(f"{name} {gain:.2f}" for name, gain in self.gains.items())
        return (
            f"Measured on {facts['device']} with {versions}, CUDA {facts['cuda']}, commit {facts['commit']}, "
            f"{facts['time'][:10]}. "
            f"Times as fast as the table before: {gains}. Of entries not named here: {self._note_before}"
        )


class Search:
    """One decision: candidates fewer from round to round, shapes more."""

    def __init__(self, context: Context, name: str, entry: Entry, limits: Limits) -> None:
        self.context, self.name, self.entry, self.limits = context, name, entry, limits
        self.dtype, self.kv_dtype = dtypes(entry, limits.capability)
        self.head_dim = context.choose(entry.head_dim, 16)
        full = DECODE_SHAPES if entry.kind == "decode" else PREFILL_SHAPES
        shapes: Sequence[Shape] = context.choose(full, TINY_SHAPES[entry.kind])
        self.shapes = [shape for shape in shapes if self._kv_bytes(shape) <= limits.batch_bytes]
        self.seconds: dict[int, dict[Shape, float]] = {}

    def best(self, choices: list[Candidate]) -> tuple[Candidate, float]:
        """The winner and how many times as fast as the first choice, the present one, it is. Raises `TimeIsUpError`."""
        survivors = list(range(len(choices)))
        self.seconds = {index: {} for index in survivors}
        for count, share in SHAPES_AND_SHARE_BY_ROUND:
            survivors = self._compiled(choices, survivors, self.shapes[:count])
            ranked = self._round(choices, survivors, self.shapes[:count])
            survivors = ranked[: max(FEWEST_SURVIVORS, len(ranked) // share)]
        survivors = self._compiled(choices, survivors, self.shapes)
        for index in self._round(choices, survivors, self.shapes):
            gain = self._mean(0, self.shapes) / self._mean(index, self.shapes)
            if index == 0 or not gain >= LEAST_GAIN:
                break
            if self._is_right(choices[index]):
                return choices[index], gain
        return choices[0], 1.0

    def _round(self, choices: list[Candidate], survivors: list[int], shapes: Sequence[Shape]) -> list[int]:
        """Time `survivors`, and the present one, on those of `shapes` that they have not been timed on; the best first."""
        for shape in shapes:
            pending = [index for index in dict.fromkeys((0, *survivors)) if shape not in self.seconds[index]]
            batches = self._batches(shape) if pending else []
            for index in pending:
                self._require_time()
                seconds = self._seconds(choices[index], batches)
                self.seconds[index][shape] = seconds
                self.context.entries.append(
                    {"entry": self.name, **choices[index].change, **asdict(shape), "microseconds": 1e6 * seconds}
                )
        return sorted(survivors, key=lambda index: self._mean(index, shapes))

    def _mean(self, index: int, shapes: Sequence[Shape]) -> float:
        """The weighted geometric mean of seconds; infinite for a candidate that failed on one."""
        logs = [shape.weight * math.log(self.seconds[index][shape]) for shape in shapes]
        return math.exp(sum(logs) / sum(shape.weight for shape in shapes))

    def _seconds(self, choice: Candidate, batches: list[AttentionBatch]) -> float:
        try:
            with table_in_use(choice.table):
                return self.context.seconds_of(lambda: [batch.attend() for batch in batches]) / len(batches)
        except Exception as error:  # of many kinds: too little of something on this GPU
            self.context.entries.append(
                {"entry": self.name, **choice.change, "error": f"{type(error).__name__}: {error}"}
            )
            return math.inf

    def _compiled(self, choices: Sequence[Candidate], survivors: list[int], shapes: Sequence[Shape]) -> list[int]:
        """Compile what `survivors` of `choices` need for `shapes`, in parallel; those that can run here without loss.

        The present one is compiled too, and stays in if it was.
        """
        if self.context.device.type != "cuda":  # where kernels are interpreted
            return survivors
        self._require_time()
        wanted: dict[int, list[Specialization]] = {}
        for index in dict.fromkeys((0, *survivors)):
            with table_in_use(choices[index].table), recorded_launches() as launches:
                for heads, kv_heads in dict.fromkeys((shape.heads, shape.kv_heads) for shape in shapes):
                    row = (shapes[0].query_len, max(shape.seq_len for shape in shapes))
                    batch_on_meta(row, heads, kv_heads, self.head_dim, self.dtype, self.kv_dtype).attend()
            # What is cached is read again too, for the registers that it takes.
            wanted[index] = [replace(one, is_cached=False) for one in launches]
        processes = max(1, len(os.sched_getaffinity(0)) - 2)
        with KernelPrecompiler(
            list({one: None for ones in wanted.values() for one in ones}), processes=processes
        ) as compiling:
            found = compiling.wait()
        fitting = {
            index for index, ones in wanted.items() if all(self._fits(choices[index], found[one]) for one in ones)
        }
        return [index for index in survivors if index in fitting or index == 0]

    def _fits(self, choice: Candidate, compiled: Compiled) -> bool:
        spills = self.entry.kind == "decode" and compiled.stack_bytes > MOST_DECODE_STACK
        if not (compiled.error or spills or compiled.shared_bytes > self.limits.shared_bytes):
            return True
        self.context.entries.append({"entry": self.name, **choice.change, "left_out": asdict(compiled)})
        return False

    def _batches(self, shape: Shape) -> list[AttentionBatch]:
        layers = math.ceil(LEAST_BYTES / self._kv_bytes(shape)) if self.entry.kind == "decode" else 1
        rows = [(shape.query_len, shape.seq_len)] * shape.rows
        return [self._batch(rows, shape, seed) for seed in range(self.context.choose(min(16, layers), 1))]

    def _batch(
        self, rows: list[tuple[int, int]], shape: Shape, seed: int = 0, *, poisoned: bool = False
    ) -> AttentionBatch:
        return make_batch(
            rows,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.context.device,
            kv_dtype=self.kv_dtype,
            poisoned=poisoned,
            seed=seed,
        )

    def _kv_bytes(self, shape: Shape) -> int:
        return 2 * shape.rows * shape.seq_len * shape.kv_heads * self.head_dim * self.entry.element_bytes

    def _is_right(self, choice: Candidate) -> bool:
        """Whether a float64 computation agrees, on ragged rows among poisoned slots; with a window and a soft cap too."""
        self._require_time()
        lengths = self.context.choose((1, 15, 17, 257, 2064, 9000), (1, 17, 40))
        chunks = self.context.choose([(3, 3), (130, 1000), (1, 77), (700, 700)], [(3, 3), (5, 30)])
        rows = [(1, length) for length in lengths] if self.entry.kind == "decode" else chunks
        batch = self._batch(rows, self.shapes[0], poisoned=True)
        for window, soft_cap in ((None, None), (100, 20.0)):
            with table_in_use(choice.table):
                actual = batch.attend(window, soft_cap).double()
            expected = batch.expected(window, soft_cap)
            error = ((actual - expected).norm() / expected.norm()).item()
            if not error <= TOLERANCE[self.dtype]:
                self.context.keep({"entry": self.name, **choice.change, "wrong_by": error})
                return False
        return True

    def _require_time(self) -> None:
        if not self.context.dry_run and self.context.seconds_left() < SECONDS_TO_FINISH:
            raise TimeIsUpError
