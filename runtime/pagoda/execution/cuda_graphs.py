"""Decode steps as CUDA graphs: a whole forward pass is one launch, and costs the CPU the same for any model.

A graph is captured for a few batch sizes. A batch between two of them is padded up:

    rows 0 … R - 1      the step's rows, copied into buffers that never move
    rows R … size - 1   padding: one token at position 0 of a request that has only the null block

Padding rows write to the null block, whose contents never influence a result, and their own results are left behind. As every
kernel's result for a row depends on that row alone, padding changes nothing for the others.

With tensor parallelism the sums over the ranks are in the graph: NCCL's kernels are work of the stream like any other. Which
graph runs follows from the plan, and so is the same on every rank; captured is everywhere in the same order, each size after a
run without capture, in which NCCL opens the connections that it cannot open later. Between pipeline stages messages are sent
and received by the host, so several stages run without graphs.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda.execution.input_batch import StepInputs
from pagoda.models.decoder import DecoderForCausalLM, KVCache
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels.attention import AttentionMetadata

logger = logging.getLogger(__name__)

# Powers of two up to 32, then steps that pad by a third at most.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384)
MAX_GRAPHS = 12

# What the driver keeps of a graph besides the memory of its tensors, with room to spare; to be measured.
BYTES_PER_GRAPH = 32 << 20


class Replay(Protocol):
    """Runs what was captured again, over the same memory."""

    def __call__(self) -> None:
        """Queue the work on the current stream."""


class Capture(Protocol):
    """Records what a function does to the device; returns the means to run it again and the function's result."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record `step`."""


def uses_cuda_graphs(device_type: str, layout: ParallelLayout, *, enforce_eager: bool) -> bool:
    """Whether decode steps are captured: on a GPU, unless the host sends messages within a step, or they are turned off."""
    return device_type == "cuda" and layout.pipeline_parallel_size == 1 and not enforce_eager


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes to capture for batches of up to `max_num_seqs` rows: at most `MAX_GRAPHS`, ascending.

    Batches above the largest size run without a graph: they are long enough to hide their launches.
    """
    sizes = [size for size in GRAPH_SIZES if size < max_num_seqs]
    if len(sizes) < MAX_GRAPHS:
        sizes.append(max_num_seqs)
    return sizes


def reserved_bytes(max_num_seqs: int, bytes_per_token: int) -> int:
    """Memory to leave for graphs: the tensors of the largest one, which all share, and what the driver keeps of each."""
    sizes = graph_sizes(max_num_seqs)
    return sizes[-1] * bytes_per_token + len(sizes) * BYTES_PER_GRAPH


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """The inputs of the captured steps. Of each tensor, a graph of size n reads the first n rows.

    int64 `input_ids`, `positions`, `slot_mapping` `[N]`; int32 `seq_lens` `[N]`, `block_table` `[N, max_blocks]` and
    `query_start_loc` `[N + 1]`, which is 0, 1, 2, …
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    block_table: Tensor
    query_start_loc: Tensor

    @classmethod
    def allocate(cls, max_size: int, max_blocks: int, device: torch.device) -> StaticInputs:
        """Buffers for `max_size` rows, all of them padding."""
        longs = torch.zeros((3, max_size), dtype=torch.int64, device=device)
        return cls(
            input_ids=longs[0],
            positions=longs[1],
            slot_mapping=longs[2],
            seq_lens=torch.ones(max_size, dtype=torch.int32, device=device),
            block_table=torch.zeros((max_size, max_blocks), dtype=torch.int32, device=device),
            query_start_loc=torch.arange(max_size + 1, dtype=torch.int32, device=device),
        )

    def fill(self, inputs: StepInputs, size: int) -> None:
        """Copy a step of R decode rows into the first rows, and make rows R to `size - 1` padding."""
        num_rows, metadata = len(inputs.input_ids), inputs.metadata
        for target, source in (
            (self.input_ids, inputs.input_ids),
            (self.positions, inputs.positions),
            (self.slot_mapping, metadata.slot_mapping),
            (self.seq_lens, metadata.seq_lens),
        ):
            target[:num_rows].copy_(source)
        # What lies to the right of the step's columns is left from before: no row is long enough to reach it.
        self.block_table[:num_rows, : metadata.block_table.shape[1]].copy_(metadata.block_table)
        if num_rows < size:
            padding = slice(num_rows, size)
            for buffer in (self.input_ids, self.positions, self.slot_mapping, self.block_table):
                buffer[padding].zero_()
            self.seq_lens[padding].fill_(1)

    def metadata(self, size: int, max_seq_len: int) -> AttentionMetadata:
        """The batch of a graph of `size`; `max_seq_len` is the longest that any row may ever be."""
        return AttentionMetadata(
            query_start_loc=self.query_start_loc[: size + 1],
            seq_lens=self.seq_lens[:size],
            block_table=self.block_table[:size],
            slot_mapping=self.slot_mapping[:size],
            max_query_len=1,
            max_seq_len=max_seq_len,
            num_decode_rows=size,
        )


class DecodeGraphs:
    """The captured decode steps of one model over its KV caches."""

    def __init__(
        self,
        model: DecoderForCausalLM,
        kv_caches: list[KVCache],
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_blocks: int,
        capture: Capture,
    ) -> None:
        """Capture every size, the largest first: the smaller ones then fit into the memory it took.

        Raises `ConfigError` where one cannot be captured.
        """
        self._group = model.groups.tensor
        self._sizes = graph_sizes(max_num_seqs)
        self._inputs = StaticInputs.allocate(self._sizes[-1], max_blocks, model.device)
        self._steps: dict[int, tuple[Replay, Tensor]] = {}
        self._num_collectives = 0

        def step_of(size: int) -> Callable[[], Tensor]:
            def step() -> Tensor:
                metadata, before = self._inputs.metadata(size, max_model_len), self._group.num_operations
                hidden = model.forward(
                    self._inputs.input_ids[:size], self._inputs.positions[:size], kv_caches, metadata
                )
                assert hidden is not None, "graphs are for models of one pipeline stage"
                self._num_collectives = self._group.num_operations - before
                return hidden

            return step

        for size in reversed(self._sizes):
            try:
                self._steps[size] = capture(step_of(size))
            except RuntimeError as error:
                raise ConfigError(
                    f"the decode step of {size} sequences could not be captured as a CUDA graph ({error}); enforce_eager=true "
                    "does without graphs, and a smaller gpu_memory_utilization leaves them more memory"
                ) from error

    def size_for(self, inputs: StepInputs) -> int | None:
        """The size of the graph that can run this step; None if its rows do not all decode, or are too many."""
        num_rows = len(inputs.layout.slots)
        if inputs.metadata.num_decode_rows != num_rows or num_rows > self._sizes[-1]:
            return None
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def run(self, inputs: StepInputs, size: int) -> Tensor:
        """Hidden states `[R, hidden_size]` of a step for which `size_for` gave `size`; overwritten by the next one."""
        self._inputs.fill(inputs, size)
        replay, hidden = self._steps[size]
        self._group.count_replayed(self._num_collectives)
        replay()
        return hidden[: len(inputs.input_ids)]


class CudaCapture:
    """`Capture` by CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None  # a handle that torch gives and takes

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Run `step` once, so that kernels are compiled and libraries have set themselves up, then capture it."""
        warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            step()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are captured, and only they must be of a kind that can be: others, such as those of NCCL's
        # watchdog, may ask the device whatever they want meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = step()
        self._pool = graph.pool()
        return graph.replay, hidden


class GraphCapture(Protocol):
    """How `DecodeGraphs` come about; see `capture_cuda_graphs`."""

    def __call__(
        self,
        model: DecoderForCausalLM,
        kv_caches: list[KVCache],
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_blocks: int,
    ) -> DecodeGraphs:
        """Capture."""


@torch.inference_mode()
def capture_cuda_graphs(
    model: DecoderForCausalLM, kv_caches: list[KVCache], *, max_num_seqs: int, max_model_len: int, max_blocks: int
) -> DecodeGraphs:
    """Capture on the model's GPU; logs what it took."""
    torch.cuda.synchronize()
    started, free_before = time.perf_counter(), torch.cuda.mem_get_info()[0]
    graphs = DecodeGraphs(
        model,
        kv_caches,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_blocks=max_blocks,
        capture=CudaCapture(),
    )
    torch.cuda.synchronize()
    logger.info(
        "CUDA graphs: %d, for up to %d rows, captured in %.1f s, %s",
        len(graph_sizes(max_num_seqs)),
        graph_sizes(max_num_seqs)[-1],
        time.perf_counter() - started,
        format_bytes(max(0, free_before - torch.cuda.mem_get_info()[0])),
    )
    return graphs
