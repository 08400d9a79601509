"""How several models share the machine: memory and threads of each, such that as many as may be loaded at once fit together.

    memory = places x (process + an equal part of the KV memory) + the weights of the largest models, one for each place

A model's engine keeps to its part itself (`engine_memory_bytes`), and to its threads. On a GPU the parts are of its memory
(`gpu_memory_utilization`), and weights are not known before they are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda.models.gguf.files import is_gguf
from pagoda.platform.hardware import CpuReport, MemoryReport, cpu_report, may_have_gpu, memory_report

PROCESS_BYTES = 600 * 2**20
"""An engine's process with its libraries, and what a step needs."""
WEIGHTS_MARGIN = 1.1
"""Weights in memory, at most, for those in files: tables, padding, norms in float32."""
MIN_KV_BYTES = 16 * 2**20
FREE_SHARE = 0.9
MAX_LOADED_ON_DEMAND = 4
_WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True, slots=True)
class ModelBudget:
    """What one model may take: bytes of memory in all, of which so many for weights; compute threads; share of a GPU."""

    memory: int
    weights: int
    threads: int
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True)
class ServerBudget:
    """`memory`: of all models that are loaded, in bytes; `places`: how many may be."""

    memory: int
    places: int
    models: Mapping[str, ModelBudget]

    def of_version(self, name: str, config: PagodaConfig, free: int) -> ModelBudget:
        """What another version of the model may take, out of `free` bytes: its weights, and beside them at most as much as the
        one before has. Where that is not enough `memory` is what it needs, which is more than `free`.
        """
        before = self.models[name]
        weights = weights_in_files(config)
        if config.engine_memory_bytes is not None:
            memory = config.engine_memory_bytes
        else:
            beside_weights = max(before.memory - before.weights, PROCESS_BYTES + MIN_KV_BYTES)
            memory = max(weights + PROCESS_BYTES + MIN_KV_BYTES, min(weights + beside_weights, free))
        return replace(before, memory=memory, weights=weights, threads=config.threads or before.threads)

    def lines(self) -> list[str]:
        """The budget for the log, a line a model."""
        of_model = [
            f"model {name}: at most {format_bytes(one.memory)} ({format_bytes(one.weights)} of weights) and "
            f"{one.threads} threads"
            for name, one in self.models.items()
        ]
        return [f"models share {format_bytes(self.memory)}; at most {self.places} are loaded at once", *of_model]


def share_out(
    config: PagodaConfig,
    models: Mapping[str, PagodaConfig],
    memory: MemoryReport | None = None,
    cpu: CpuReport | None = None,
) -> ServerBudget:
    """The budget of a server with these models. Raises `ConfigError` where they do not fit, with the figures."""
    total = config.models_memory_bytes or int(FREE_SHARE * (memory or memory_report()).available)
    if not models:  # `model_dir_root` is empty; the same memory is shared out when something is in it
        return ServerBudget(total, 1, {})
    if config.max_loaded_models is not None:
        places = min(config.max_loaded_models, len(models) + 1)
    else:
        places = min(MAX_LOADED_ON_DEMAND if config.load_on_demand else len(models), len(models))
    weights = {name: weights_in_files(one) for name, one in models.items()}
    fixed = {name: one.engine_memory_bytes for name, one in models.items() if one.engine_memory_bytes is not None}
    needed = {name: fixed.get(name, weights[name] + PROCESS_BYTES + MIN_KV_BYTES) for name in models}
    by_size = sorted(needed.values(), reverse=True)
    # A place more than there are models is for another version of one.
    largest = sum((by_size + by_size[:1] * places)[:places])
    if largest > total:
        raise ConfigError(
            f"models_memory_bytes={format_bytes(total)}: {places} models need {format_bytes(largest)} "
            f"({', '.join(f'{name} {format_bytes(size)}' for name, size in needed.items())}); "
            "load fewer at once (max_loaded_models), or give more memory"
        )
    spare = (total - largest) // places
    threads = max(1, (cpu or cpu_report()).usable_cores // min(places, len(models)))
    return ServerBudget(
        total,
        places,
        {
            name: ModelBudget(
                fixed.get(name, needed[name] + spare),
                weights[name],
                one.threads or threads,
                one.gpu_memory_utilization / places,
            )
            for name, one in models.items()
        },
    )


def within_budget(config: PagodaConfig, budget: ModelBudget) -> PagodaConfig:
    """The settings of a model with its part of the machine."""
    config = replace(config, threads=budget.threads, engine_memory_bytes=budget.memory)
    if config.device == "cpu" or not may_have_gpu():
        return config
    return replace(config, gpu_memory_utilization=budget.gpu_memory_utilization)


def needed_memory(config: PagodaConfig) -> int:
    """Bytes that an engine takes at least."""
    return config.engine_memory_bytes or weights_in_files(config) + PROCESS_BYTES + MIN_KV_BYTES


def weights_in_files(config: PagodaConfig) -> int:
    """Bytes that a model's weights will take, by its files; 0 for one that is not here yet."""
    if config.model is None:
        return 0
    path = Path(config.model).expanduser()
    if is_gguf(path):
        return int(path.stat().st_size * WEIGHTS_MARGIN)
    if not path.is_dir():
        return 0
    files = [entry for entry in path.iterdir() if entry.suffix in _WEIGHTS and entry.is_file()]
    formats = {entry.suffix for entry in files}
    if ".safetensors" in formats:  # the others hold the same weights once more
        files = [entry for entry in files if entry.suffix == ".safetensors"]
    return int(sum(entry.stat().st_size for entry in files) * WEIGHTS_MARGIN)
