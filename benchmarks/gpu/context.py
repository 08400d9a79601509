"""What all parts share: device, time, sizes, ceilings measured in the same run, and where results go."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pagoda.benchmarking.environment import environment
from pagoda_kernels.gpu.tuning import table_of_device

# Launches timed together and repetitions of that; the median counts.
LAUNCHES, REPEATS = 10, 7


@dataclass(eq=False)
class Context:
    """`dry_run`: on a CPU, where times mean nothing and sizes are tiny."""

    out: Path
    dry_run: bool
    deadline: float
    device: torch.device
    dtype: torch.dtype
    environment: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    """What the part has measured so far: kept if it is cut off."""
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, out: Path, *, deadline: float, dry_run: bool) -> Context:
        """For the GPU here and one part of a run, until `deadline` on the monotonic clock.

        Exits with a sentence where there is no GPU.
        """
        if not dry_run and not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA GPU here; --dry-run tries this program out without one")
        (out / "scratch").mkdir(parents=True, exist_ok=True)
        device = torch.device("cpu" if dry_run else "cuda")
        facts = environment()
        facts["device"] = "cpu (dry run)" if dry_run else torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["tuning_table"] = table_of_device(device).name
        return cls(out, dry_run, deadline, device, torch.float32 if dry_run else torch.bfloat16, facts)

    def seconds_left(self) -> float:
        """Until the part is cut off."""
        return self.deadline - time.monotonic()

    def choose(self, full: Any, tiny: Any) -> Any:
        """`full`, or `tiny` in a dry run."""
        return tiny if self.dry_run else full

    @property
    def scratch(self) -> Path:
        """A folder of the run, for models and what parts leave for each other; gone at its end."""
        return self.out / "scratch"

    def begin(self, name: str, about: str) -> None:
        """Say which part this is."""
        self.about = {"part": name, "about": about, "environment": self.environment}
        self.write({"status": "running"})

    def write(self, result: dict[str, Any]) -> None:
        """Write the part's file, whole or not at all."""
        path = self.scratch / f"{self.about['part']}.json"
        path.with_suffix(".new").write_text(json.dumps({**self.about, **result}, default=str), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def keep(self, entry: dict[str, Any]) -> None:
        """Print a figure of the part, and keep it in `entries` and in the part's file."""
        print(f"  {entry}", flush=True)
        self.note(entry)

    def note(self, entry: dict[str, Any]) -> None:
        """Keep a figure without printing it."""
        self.entries.append(entry)
        self.write({"status": "running", "results": self.entries})

    def python(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start another Python with this one's import path; its output is text in `stdout`."""
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment}
        return subprocess.Popen(
            [sys.executable, *arguments], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )

    def release(self) -> None:
        """Between engines: give memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_of(self, launch: Callable[[], object]) -> float:
        """Seconds on the device of one `launch`, which must not depend on the host: from replays of a graph."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            launch()
            return time.perf_counter() - started
        # One stream for all timings, and none that an engine captures on: cuBLAS keeps a workspace for each, and torch may
        # free that of a stream when a graph captured on it goes (pytorch/pytorch#193402).
        side = self._timing_stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            launch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(LAUNCHES):
                launch()
        graph.replay()
        times = []
        for _ in range(REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / LAUNCHES)
        return statistics.median(times)

    @cached_property
    def _timing_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @cached_property
    def ceilings(self) -> dict[str, float]:
        """Measured once a run: bytes a second of a copy (read and written), FLOP/s of a matrix product on random data."""
        known = self.scratch / "ceilings.json"
        if known.exists():
            return dict(json.loads(known.read_text()))
        source = torch.randn(self.choose(1 << 30, 1 << 12), device=self.device)
        target = torch.empty_like(source)
        copy_seconds = self.seconds_of(lambda: target.copy_(source))
        size = self.choose(8192, 64)
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        product_seconds = self.seconds_of(lambda: torch.mm(left, right))
        measured = {
            "copy_bytes_per_second": 2 * source.nbytes / copy_seconds,
            "matmul_flops_per_second": 2 * size**3 / product_seconds,
        }
        known.write_text(json.dumps(measured), encoding="utf-8")
        return measured
