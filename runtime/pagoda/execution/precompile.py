"""The kernels of a model, compiled while its weights are loaded, so that the first step finds them in Triton's cache.

Which kernels, and for which arguments, follows from the model: it is built once more on the device `meta`, where tensors have
no memory, and run for a prompt and for a decode step. See `pagoda_kernels.gpu.precompile`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from pagoda.models.build import build_model
from pagoda.models.causal_lm import KVCache
from pagoda.models.config import ModelConfig
from pagoda.models.layers.rope import RotaryEmbedding
from pagoda.models.lora.weights import LoraModel
from pagoda.models.quantization.schemes import QuantizationConfig
from pagoda.parallel.groups import ParallelGroups, PipelineParallelGroup
from pagoda.parallel.tensor_group import TensorParallelGroup
from pagoda.platform.hardware import cpu_report
from pagoda.sampling.selection import pad_to_blocks
from pagoda.scheduling.kv_groups import RecurrentState
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata, LoraLimits, StepTensors

if TYPE_CHECKING:
    from pagoda_kernels.gpu.precompile import Specialization

logger = logging.getLogger(__name__)

# More tokens or longer contexts than these need no other kernels.
_PROMPT_TOKENS, _SHORT_TOKENS, _DECODE_ROWS, _CONTEXT_TOKENS = 16, 2, 2, 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBuild:
    """What a rank's kernels follow from, with `device`, on which they will run; `lora`: where adapters are served."""

    config: ModelConfig
    groups: ParallelGroups
    quantization: QuantizationConfig | None
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    device: torch.device
    lora: LoraLimits | None = None


@contextmanager
def kernels_compiled_meanwhile(build: ModelBuild) -> Iterator[None]:
    """Compile the kernels of `build` in other processes; at the end of the context they are in Triton's cache.

    A kernel that could not be compiled so is compiled, or fails, where it is first launched; a warning names it.
    """
    from pagoda_kernels.gpu.precompile import KernelPrecompiler

    began = time.monotonic()
    try:
        wanted = wanted_kernels(build)
    except Exception as error:  # whatever it is, of a Triton that has changed for instance: it only costs time
        logger.warning("every kernel is compiled at its first launch instead: %s: %s", type(error).__name__, error)
        wanted = []
    ranks = build.groups.layout.world_size
    processes = max(1, cpu_report().usable_cores // ranks - 1)
    with KernelPrecompiler(wanted, processes=processes) as compiling:
        logger.info("kernels: %d wanted, %d not in Triton's cache", len(wanted), compiling.num_kernels)
        yield
        loaded = time.monotonic()
        for compiled in compiling.wait().values():
            if compiled.error:
                logger.warning("%s is compiled at its first launch instead: %s", compiled.name, compiled.error)
    if compiling.num_kernels:
        ended = time.monotonic()
        logger.info("kernels compiled after %.1f s, of which weights left %.1f to wait", ended - began, ended - loaded)


def wanted_kernels(build: ModelBuild) -> list[Specialization]:
    """Each kernel that steps of this rank launch, once."""
    from pagoda_kernels.gpu.precompile import recorded_launches
    from pagoda_kernels.gpu.tuning import table_in_use, table_of_device

    meta = torch.device("meta")
    model = build_model(build.config, build.dtype, meta, _unconnected(build.groups), build.quantization)
    model.rotary_embeddings = nn.ModuleList(map(_NoAngles, model.rotary_embeddings))
    adapters = None
    if build.lora is not None:
        adapters = LoraModel(model, build.config, replace(build.lora, device=meta), max_num_seqs=1)
    shard = model.shard
    caches: list[KVCache] = []
    for layer in shard.layers:
        spec = build.config.layers[layer].kv_spec.on_rank(build.groups.layout.tensor_parallel_size)
        dtype = torch.float32 if isinstance(spec, RecurrentState) else build.kv_dtype
        shapes = spec.page_shapes(build.block_size)
        caches.append(tuple(torch.empty((2, *shape), dtype=dtype, device=meta) for shape in shapes))
    with table_in_use(table_of_device(build.device)), torch.inference_mode(), recorded_launches() as wanted:
        _gather(build.block_size)
        short_rows = int(bool(backend.active.max_short_rows(shard.heads.size // shard.kv_heads.size)))
        for num_tokens, num_decode_rows, num_short_rows in (
            (_PROMPT_TOKENS, 0, 0),
            (_SHORT_TOKENS, 0, short_rows),
            (_DECODE_ROWS, _DECODE_ROWS, 0),
        ):
            ids = torch.empty(num_tokens, dtype=torch.int64, device=meta)
            metadata = _metadata(num_tokens, num_decode_rows, num_short_rows, build.block_size)
            if adapters is not None:
                adapters.begin_capture(num_tokens)
            hidden = model.forward(ids, ids, caches, [metadata])
            logits = model.compute_logits(hidden[:1]) if hidden is not None else None
            if logits is not None:
                _sample(pad_to_blocks(logits))
    return wanted


def _metadata(num_tokens: int, num_decode_rows: int, num_short_rows: int, block_size: int) -> AttentionMetadata:
    """One prompt, a row of few tokens, or rows that decode in contexts long enough to be cut into segments."""
    num_rows = num_decode_rows or 1

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return AttentionMetadata(
        query_start_loc=empty(num_rows + 1),
        seq_lens=empty(num_rows),
        block_table=empty(num_rows, _CONTEXT_TOKENS // block_size),
        slot_mapping=empty(num_tokens, dtype=torch.int64),
        max_query_len=num_tokens // num_rows,
        max_seq_len=_CONTEXT_TOKENS,
        num_decode_rows=num_decode_rows,
        num_short_rows=num_short_rows,
        block_size=block_size,
    )


def _gather(block_size: int) -> None:
    """The inputs of a step with any rows."""
    meta = torch.device("meta")
    pool = torch.empty((2, 2), dtype=torch.int64, device=meta)
    table = torch.empty((2, 2), dtype=torch.int32, device=meta)
    into = StepTensors.allocate(2, 2, 2, meta)
    backend.active.gather_step(pool, table, block_size, pool[0], table[0], pool[0], 1, into)


def _sample(logits: torch.Tensor) -> None:
    """The operations that sample."""
    _, best_logits = backend.active.greedy_sample(logits)
    rows = torch.empty(1, dtype=torch.int64, device="meta")
    one = torch.empty(1, dtype=torch.float32, device="meta")
    backend.active.sample_top_p_by_rejection(logits, best_logits, rows, rows, rows, one, one, one.double())


class _NoAngles(nn.Module):
    """Replaces the rotary embedding: on `meta` torch multiplies in Python, by modules that take seconds to import."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        assert isinstance(rotary, RotaryEmbedding)
        self._size = rotary.inverse_frequency.numel()

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(positions), self._size)
        return torch.empty(shape, device="meta"), torch.empty(shape, device="meta")


class _UnconnectedTensors(TensorParallelGroup):
    """Stands in for several ranks where nothing is computed: the shapes are right, and nothing is sent."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_gather(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(values.shape)
        shape[dim] *= self.size
        return values.new_empty(shape)

    def gather(self, values: torch.Tensor, dim: int) -> torch.Tensor | None:
        return self.all_gather(values, dim) if self.rank == 0 else None


class _UnconnectedStage(PipelineParallelGroup):
    """Likewise for the stages before and after."""

    def send(self, values: torch.Tensor) -> None:
        pass

    def receive(self, into: torch.Tensor) -> torch.Tensor:
        return into


def _unconnected(groups: ParallelGroups) -> ParallelGroups:
    tensors = _UnconnectedTensors(groups.tp_group.rank, groups.tp_group.size)
    return ParallelGroups(groups.layout, groups.coordinates, tensors, _UnconnectedStage())
