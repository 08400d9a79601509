"""One model in one class of weights: its engines loaded side by side, and the rows run over them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CalledProcessError

from harness.checkpoints import MODELS, checkpoint, converted
from harness.engine import EngineSettings
from harness.measure import Case
from harness.pairing import Rounds, run_rounds
from harness.process import Worker, WorkerFailedError
from harness.results import OWN, Results
from harness.rows import (
    KV_TOKENS,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    ONLINE_FIGURES,
    ONLINE_SHARE,
    UNCACHED,
    capacity_case,
    online_case,
    rows,
)

KV_ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "int8": 2}
WITHOUT_ARRIVALS = ("transformers",)
SLOWEST_LOAD = 20.0
"""Times slower than the best at which a load is not repeated."""
BYTES_PER_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the command line asked for. `slowest`: how many times slower than the best a peer may be and still be paired."""

    engines: tuple[str, ...]
    row_names: tuple[str, ...]
    pairs: int
    quick: bool
    slowest: float
    threads: int
    cores: list[int]
    logs: Path


class Session(AbstractContextManager["Session"]):
    """Use as a context: it ends every worker."""

    def __init__(self, model: str, weights: str, plan: Plan, results: Results) -> None:
        self._model = model
        self._weights = weights
        self._plan = plan
        self._results = results
        self._workers: dict[str, Worker] = {}

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.end()

    def run(self) -> None:
        """Load every engine, run every row, and say what each engine took."""
        wanted = self._plan.row_names
        if "load" in wanted:
            self._load_row()
        engines = [*self._plan.engines, *([UNCACHED] if "shared-prefix" in wanted else [])]
        for engine in engines:
            self._start(engine)
        for name, row in rows(quick=self._plan.quick).items():
            if name in wanted:
                names = [engine for engine in self._workers if engine != UNCACHED or name == "shared-prefix"]
                rounds = self._rounds(names, row.case, row.figure, higher_is_better=row.higher_is_better)
                self._add(name, row.figure, row.unit, rounds, higher_is_better=row.higher_is_better)
        if "online" in wanted:
            self._online_rows()
        if "memory" in wanted:
            self._memory_row()

    def prepare(self) -> None:
        """Make checkpoints and conversions and load each engine once, which fills the caches of those that compile."""
        for engine in self._plan.engines:
            self._start(engine)

    def _settings(self, engine: str) -> EngineSettings:
        shape = MODELS[self._model]
        elements = 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"]
        return EngineSettings(
            model=str(checkpoint(self._model)),
            converted=converted(self._model, engine, self._weights),
            weights=self._weights,
            threads=self._plan.threads,
            max_num_seqs=MAX_NUM_SEQS,
            max_model_len=MAX_MODEL_LEN,
            kv_tokens=KV_TOKENS,
            kv_token_bytes=elements * KV_ELEMENT_BYTES[self._weights],
            prefix_caching=engine != UNCACHED,
        )

    def _start(self, engine: str) -> None:
        key = f"{self._model} {self._weights} {engine}"
        try:
            worker = self._loaded(engine)
        except (WorkerFailedError, CalledProcessError, OSError) as error:
            said = error.stderr[-500:] if isinstance(error, CalledProcessError) and error.stderr else str(error)
            self._results.add_engine(key, {"not here": said})
            print(f"{key}: not here: {said}", flush=True)
            return
        self._workers[engine] = worker
        self._results.add_engine(key, {"load_seconds": round(worker.load_seconds, 2), **worker.versions})
        print(f"{key}: loaded in {worker.load_seconds:.1f} s", flush=True)

    def _loaded(self, engine: str) -> Worker:
        log = self._plan.logs / f"{self._model}-{self._weights}-{engine}.log"
        worker = Worker(engine, self._settings(engine), self._plan.cores, log)
        worker.wait_until_ready()
        return worker

    def _load_row(self) -> None:
        """Every engine loaded and ended in turn, with nothing else loaded. The warm-up loads fill the page cache."""

        def run(engine: str, _: int) -> dict[str, float]:
            try:
                worker = self._loaded(engine)
            except (CalledProcessError, OSError) as error:
                raise WorkerFailedError(str(error)) from error
            worker.end()
            return {"load_seconds": worker.load_seconds}

        rounds = run_rounds(
            self._plan.engines,
            run,
            self._plan.pairs,
            figure="load_seconds",
            higher_is_better=False,
            slowest=SLOWEST_LOAD,
            keep=(OWN, UNCACHED),
        )
        self._add("load", "load_seconds", "s", rounds, higher_is_better=False)

    def _rounds(self, engines: list[str], case: Case, figure: str, *, higher_is_better: bool) -> Rounds:
        return self._run_rounds(
            engines, lambda number: self._seeded(case, number), figure, higher_is_better=higher_is_better
        )

    def _run_rounds(
        self, engines: list[str], case_of: Callable[[int], Case], figure: str, *, higher_is_better: bool
    ) -> Rounds:
        return run_rounds(
            engines,
            lambda engine, number: self._workers[engine].run(case_of(number)),
            self._plan.pairs,
            figure=figure,
            higher_is_better=higher_is_better,
            slowest=self._plan.slowest,
            keep=(OWN, UNCACHED),
        )

    def _seeded(self, case: Case, number: int) -> Case:
        """The case of one round: its prompts are its own, so that no engine finds them in a prefix cache."""
        seed = random.Random(f"{self._model} {case} {number}").getrandbits(32)
        return replace(case, vocab_size=MODELS[self._model]["vocab_size"], seed=seed)

    def _online_rows(self) -> None:
        """Poisson arrivals at a share of what the best peer gets through when all requests are there at once."""
        engines = [name for name in self._workers if name not in (*WITHOUT_ARRIVALS, UNCACHED)]
        capacity = self._rounds(
            engines, capacity_case(quick=self._plan.quick), "requests_per_second", higher_is_better=True
        )
        self._add("capacity", "requests_per_second", "req/s", capacity, higher_is_better=True)
        peers = [name for name in engines if name != OWN]
        best = max((capacity.median(name, "requests_per_second") or 0.0 for name in peers), default=0.0)
        if not best:
            return
        rate = ONLINE_SHARE * best

        def case_of(number: int) -> Case:
            return self._seeded(online_case(quick=self._plan.quick, rate=rate, seed=number), number)

        rounds = self._run_rounds(engines, case_of, "ttft_p99_ms", higher_is_better=False)
        for figure in ONLINE_FIGURES:
            self._add(f"online {figure}", figure, f"at {rate:.2f} req/s", rounds, higher_is_better=False)

    def _memory_row(self) -> None:
        """What each worker held at most, over all of its rows."""
        peaks = {name: worker.peak_rss_bytes for name, worker in self._workers.items() if name != UNCACHED}
        rounds = Rounds({name: [{"peak": peak / BYTES_PER_GIB}] for name, peak in peaks.items() if peak})
        self._add("memory", "peak", "GiB", rounds, higher_is_better=False)

    def _add(self, row: str, figure: str, unit: str, rounds: Rounds, *, higher_is_better: bool) -> None:
        self._results.add(self._model, self._weights, row, figure, unit, rounds, higher_is_better=higher_is_better)
