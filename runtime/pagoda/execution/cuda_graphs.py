"""Decode steps as CUDA graphs: a whole forward pass is one launch, and costs the CPU the same for any model.

A graph is captured for a few batch sizes. A batch between two of them is padded up:

    rows 0 … R - 1      the step's rows, gathered into buffers that never move
    rows R … size - 1   padding: one token at position 0 of a request that has only the null block

Padding rows write to the null block, whose contents never influence a result, and their own results are left behind. As every
kernel's result for a row depends on that row alone, padding changes nothing for the others.

With tensor parallelism the sums over the ranks are in the graph: NCCL's kernels are work of the stream like any other. Which
graph runs follows from the plan, and so is the same on every rank; captured is everywhere in the same order, each size after a
run without capture, in which NCCL opens the connections that it cannot open later. Between pipeline stages messages are sent
and received by the host, so several stages run without graphs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pagoda.errors import ConfigError
from pagoda.execution.input_batch import RowLayout
from pagoda.models.decoder import DecoderForCausalLM, KVCache
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels.types import AttentionMetadata, StepTensors

# Powers of two up to 32, then steps that pad by a third at most.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384)
MAX_GRAPHS = 12

# Memory of the driver for a graph besides that of its tensors, a generous estimate; to be measured.
BYTES_PER_GRAPH = 32 << 20


Replay = Callable[[], None]
"""Queues what was captured on the current stream, over the same memory."""

Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records what a function does to the device; returns what runs it again, and the function's result."""


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

        `capture`: `CudaCapture()`. Raises `ConfigError` where a size cannot be captured.
        """
        self._group = model.groups.tp_group
        self._sizes = graph_sizes(max_num_seqs)
        largest = self._sizes[-1]
        # What the captured steps read; a graph of size n, the first n rows. Until requests run, all of them are padding.
        self._inputs = StepTensors.allocate(largest, largest, max_blocks, model.device)
        for tensor in (self._inputs.input_ids, self._inputs.positions, self._inputs.slot_mapping):
            tensor.zero_()
        self._inputs.seq_lens.fill_(1)
        self._inputs.block_table.zero_()
        self._query_start_loc = torch.arange(largest + 1, dtype=torch.int32, device=model.device)
        self._max_seq_len = max_model_len
        self._steps: dict[int, tuple[Replay, Tensor]] = {}
        self._num_collectives = 0

        def step_of(size: int) -> Callable[[], Tensor]:
            def step() -> Tensor:
                inputs, before = self._inputs.part(size, max_blocks), self._group.num_operations
                hidden = model.forward(inputs.input_ids, inputs.positions, kv_caches, self._metadata(inputs))
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

    def _metadata(self, inputs: StepTensors) -> AttentionMetadata:
        """Of rows that decode, of which each may grow as long as any may ever be."""
        size = len(inputs.seq_lens)
        return AttentionMetadata(
            query_start_loc=self._query_start_loc[: size + 1],
            seq_lens=inputs.seq_lens,
            block_table=inputs.block_table,
            slot_mapping=inputs.slot_mapping,
            max_query_len=1,
            max_seq_len=self._max_seq_len,
            num_decode_rows=size,
        )

    def size_for(self, layout: RowLayout) -> int | None:
        """The size of the graph that can run such a step; None if its rows do not all decode, or are too many."""
        num_rows = len(layout.req_indices)
        if layout.num_decode_rows != num_rows or num_rows > self._sizes[-1]:
            return None
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def tensors_for(self, layout: RowLayout, num_columns: int) -> StepTensors | None:
        """Where the step's inputs must be for `run`; None if it cannot run as a graph.

        Columns to the right keep old values: no row is long enough to reach them.
        """
        size = self.size_for(layout)
        return None if size is None else self._inputs.part(size, num_columns)

    def run(self, size: int) -> Tensor:
        """Hidden states `[size, hidden_size]` of a step on the buffers of `tensors_for`; overwritten by the next."""
        replay, hidden = self._steps[size]
        self._group.count_replayed(self._num_collectives)
        replay()
        return hidden


class CudaCapture:
    """A `Capture` by CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None  # a handle that torch gives and takes
        # One for all: cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream that it has ever worked on.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Run `step` once, so that kernels are compiled and libraries have set themselves up, then capture it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are captured, and only they must be of a kind that can be: others, such as those of NCCL's
        # watchdog, may call the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            hidden = step()
        self._pool = graph.pool()
        return graph.replay, hidden
