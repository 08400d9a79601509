"""From the start of a process to an engine that is ready, by stage, with a checkpoint that is in the page cache."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import configuration, spec_of
from pagoda.models.dummy import DummySpec, tensor_shapes, write_dummy_checkpoint

GOAL_SECONDS = 15
SHARD_BYTES = 4 << 30

# In a process of its own: argv is a JSON object of settings.
PROGRAM = """
import json, sys, time
began = time.time()
from pagoda.config.sources import from_kwargs
from pagoda.engine.core.startup import start_core
imported = time.time()
core = start_core(from_kwargs(json.loads(sys.argv[1])))
print(json.dumps({"import": imported - began, **core.ready.phase_seconds, "ready_at": time.time()}))
core.shutdown()
"""


def run(context: Context) -> dict[str, Any]:
    """An 8B checkpoint is written, and so cached, then loaded twice: kernels may be compiled the first time only."""
    name = "Qwen3-8B"
    folder = context.scratch / "models" / f"{name}-with-weights"
    free = shutil.disk_usage(context.out).free
    if not context.dry_run and free < 24 << 30:
        return {"passed": True, "headline": f"left out: 24 GiB of disk are needed, {free >> 30} are free"}
    try:
        _write(context, folder, spec_of(context, name))
        for run_name in ("first", "second"):
            context.keep({"run": run_name, **_start(context, folder)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "model": name,
        "results": context.entries,
        "goal_seconds": GOAL_SECONDS,
        "headline": {entry["run"]: entry["total"] for entry in context.entries},
    }


def _write(context: Context, folder: Path, spec: DummySpec) -> None:
    """Random weights, made on the device: numpy's would take minutes."""
    write_dummy_checkpoint(folder, spec, weights=False)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in tensor_shapes(spec):
        tensor = torch.randn(shape, device=context.device, dtype=torch.bfloat16).mul_(0.02).cpu()
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file_name)
    weight_map = {tensor: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _start(context: Context, folder: Path) -> dict[str, float]:
    settings = configuration(context, folder)
    names = ("model", "device", "dtype", "max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "threads")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    began = time.time()
    # A cache of its own, empty the first time: what other parts compiled does not count.
    child = context.python("-c", PROGRAM, json.dumps(given), TRITON_CACHE_DIR=str(folder / "triton"))
    output, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"the engine's process ended with status {child.returncode}; its log is above")
    stages: dict[str, float] = json.loads(output.splitlines()[-1])
    stages["total"] = stages.pop("ready_at") - began
    return stages
