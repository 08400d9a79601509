"""Decode steps as CUDA graphs: a whole forward pass is one launch, and costs the CPU the same for any model.

A graph is captured for a few batch sizes: rows, and tokens that each has at most. A step between two of them is padded up:

    rows 0 … R - 1      the step's rows, gathered into buffers that never move
    rows R … rows - 1   padding: one token at position 0 of a request that has only the null block
    tokens behind       of no row, where rows verify fewer drafts than they may; they go to the null block

Where all rows decode, each has one token. With speculative decoding there are graphs for rows of few tokens too, in which
attention takes all rows as those that have drafts (`AttentionMetadata.num_short_rows`), also those that have none.

Padding rows write to the null block, whose contents never influence a result, and their own results are left behind. As every
kernel's result for a row depends on that row alone, padding changes nothing for the others.

With tensor parallelism the sums over the ranks are in the graph: NCCL's kernels are work of the stream like any other. Which
graph runs follows from the plan, and so is the same on every rank; captured is everywhere in the same order, each size after a
run without capture, in which NCCL opens the connections that it cannot open later. Between pipeline stages messages are sent
and received by the host, so several stages run without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagoda.errors import ConfigError
from pagoda.execution.input_batch import RowLayout
from pagoda.models.causal_lm import CausalLM, KVCache
from pagoda.models.lora.weights import LoraModel
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels.types import AttentionMetadata, StepTensors

# Powers of two up to 32, then steps that pad by a third at most.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384)
MAX_GRAPHS = 12
# Of rows with drafts: so many numbers of tokens a row, and of rows for each of them.
MAX_QUERY_LENS, MAX_VERIFYING_SIZES = 2, 6

# Memory of the driver for a graph besides that of its tensors, a generous estimate; to be measured.
BYTES_PER_GRAPH = 32 << 20


Replay = Callable[[], None]
"""Queues what was captured on the current stream, over the same memory."""

Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records what a function does to the device; returns what runs it again, and the function's result."""


def uses_cuda_graphs(device_type: str, layout: ParallelLayout, *, enforce_eager: bool) -> bool:
    """Whether decode steps are captured: on a GPU, unless the host sends messages within a step, or they are turned off."""
    return device_type == "cuda" and layout.pipeline_parallel_size == 1 and not enforce_eager


class GraphSize(NamedTuple):
    """Steps of up to `num_rows` rows, of up to `query_len` tokens each."""

    num_rows: int
    query_len: int = 1

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.query_len


def graph_sizes(
    max_num_seqs: int, num_drafts: int = 0, *, short_query_len: int = 1, max_short_rows: int = 0
) -> list[GraphSize]:
    """What to capture for batches of up to `max_num_seqs` rows with up to `num_drafts` drafts each, by the number of tokens.

    Those of rows that decode, at most `MAX_GRAPHS`, and of rows with drafts as many rows as `max_short_rows` and as few tokens
    as `short_query_len` allow (see `KernelBackend`), at most `MAX_QUERY_LENS` times `MAX_VERIFYING_SIZES`. Steps that fit none
    run without a graph: they are long enough to hide their launches.
    """
    sizes = [GraphSize(rows) for rows in GRAPH_SIZES if rows < max_num_seqs]
    if len(sizes) < MAX_GRAPHS:
        sizes.append(GraphSize(max_num_seqs))
    longest = min(1 + num_drafts, short_query_len)
    query_lens = {longest, (longest + 1) // 2} if longest > 2 else {longest}
    most_rows = min(max_num_seqs, max_short_rows)
    for query_len in sorted(query_lens - {1})[:MAX_QUERY_LENS]:
        rows = [each for each in GRAPH_SIZES if each <= most_rows][:MAX_VERIFYING_SIZES]
        sizes += [GraphSize(each, query_len) for each in rows]
    return sorted(sizes, key=lambda size: (size.num_tokens, size.query_len))


def reserved_bytes(sizes: Sequence[GraphSize], bytes_per_token: int, *, has_adapters: bool = False) -> int:
    """Memory to leave for graphs: the tensors of the largest one, which all share, and what the driver keeps of each; with
    adapters there are two of each size."""
    num_graphs = len(sizes) * (1 + has_adapters)
    return max(size.num_tokens for size in sizes) * bytes_per_token + num_graphs * BYTES_PER_GRAPH


class DecodeGraphs:
    """The captured decode steps of one model over its KV caches."""

    def __init__(
        self,
        model: CausalLM,
        kv_caches: list[KVCache],
        *,
        sizes: Sequence[GraphSize],
        max_model_len: int,
        max_blocks: int,
        num_groups: int = 1,
        block_size: int = 0,
        capture: Capture,
        adapters: LoraModel | None = None,
    ) -> None:
        """Capture every one of `sizes`, the largest first: the smaller ones then fit into the memory it took. With `adapters`
        each is captured twice: a step without any does not launch what adds them.

        `capture`: `CudaCapture()`. Raises `ConfigError` where a size cannot be captured.
        """
        self._group = model.groups.tp_group
        self._sizes = sorted(sizes, key=lambda size: (size.num_tokens, size.query_len))
        most_rows, most_tokens = max(size.num_rows for size in sizes), self._sizes[-1].num_tokens
        # What the captured steps read: the first rows and tokens. Until requests run, all of them are padding.
        self._inputs = StepTensors.allocate_groups(num_groups, most_tokens, most_rows, max_blocks, model.device)
        for inputs in self._inputs:
            for tensor in (inputs.input_ids, inputs.positions, inputs.slot_mapping, inputs.block_table):
                tensor.zero_()
            inputs.seq_lens.fill_(1)
        self._one_token_each = torch.arange(most_rows + 1, dtype=torch.int32, device=model.device)
        # Where the rows of steps with drafts begin, as of this layout and size.
        self._query_start_loc = self._one_token_each.clone()
        self._written: tuple[RowLayout, GraphSize] | None = None
        self._max_seq_len = max_model_len
        self._block_size = block_size
        self._steps: dict[tuple[GraphSize, bool], tuple[Replay, Tensor]] = {}
        self._num_collectives = 0

        def step_of(size: GraphSize) -> Callable[[], Tensor]:
            def step() -> Tensor:
                groups = [inputs.part(size.num_rows, size.num_tokens, max_blocks) for inputs in self._inputs]
                before = self._group.num_operations
                metadata = [self._metadata(inputs, size) for inputs in groups]
                hidden = model.forward(groups[0].input_ids, groups[0].positions, kv_caches, metadata)
                assert hidden is not None, "graphs are for models of one pipeline stage"
                self._num_collectives = self._group.num_operations - before
                return hidden

            return step

        for size, has_adapters in product(reversed(self._sizes), (False,) if adapters is None else (True, False)):
            if adapters is not None:
                adapters.begin_capture(size.num_tokens if has_adapters else 0)
            try:
                self._steps[size, has_adapters] = capture(step_of(size))
            except RuntimeError as error:
                raise ConfigError(
                    f"the step of {size.num_rows} sequences, {size.query_len} tokens each, could not be captured as a CUDA "
                    f"graph ({error}); enforce_eager=true does without graphs, and a smaller gpu_memory_utilization leaves "
                    "them more memory"
                ) from error

    def _metadata(self, inputs: StepTensors, size: GraphSize) -> AttentionMetadata:
        """Of rows of which each may grow as long as any may ever be."""
        decodes = size.query_len == 1
        starts = self._one_token_each if decodes else self._query_start_loc
        return AttentionMetadata(
            query_start_loc=starts[: size.num_rows + 1],
            seq_lens=inputs.seq_lens,
            block_table=inputs.block_table,
            slot_mapping=inputs.slot_mapping,
            max_query_len=size.query_len,
            max_seq_len=self._max_seq_len,
            num_decode_rows=size.num_rows if decodes else 0,
            num_short_rows=0 if decodes else size.num_rows,
            block_size=self._block_size,
        )

    def size_for(self, layout: RowLayout) -> GraphSize | None:
        """The size of the smallest graph that can run such a step; None if its rows, or the tokens of one, are too many."""
        num_rows, query_len = len(layout.req_indices), layout.max_query_len
        for size in self._sizes:
            if size.num_rows >= num_rows and size.query_len >= query_len:
                return size
        return None

    def tensors_for(self, layout: RowLayout, num_columns: int) -> list[StepTensors] | None:
        """Where the step's inputs must be for `run`; None if it cannot run as a graph.

        Columns to the right keep old values: no row is long enough to reach them.
        """
        size = self.size_for(layout)
        if size is None:
            return None
        num_padding = size.num_rows - len(layout.req_indices)
        num_tokens = layout.num_tokens + num_padding
        if size.query_len > 1:
            self._write_starts(layout, size)
            for inputs in self._inputs:
                inputs.slot_mapping[num_tokens : size.num_tokens].zero_()
        return [inputs.part(size.num_rows, num_tokens, num_columns) for inputs in self._inputs]

    def _write_starts(self, layout: RowLayout, size: GraphSize) -> None:
        """Say where the rows of the step begin; padding rows behind them have one token each."""
        if self._written is not None and self._written[0] is layout and self._written[1] == size:
            return
        num_rows = len(layout.req_indices)
        self._query_start_loc[: num_rows + 1] = layout.query_start_loc
        padding = self._one_token_each[1 : size.num_rows - num_rows + 1]
        self._query_start_loc[num_rows + 1 : size.num_rows + 1] = padding + layout.num_tokens
        self._written = layout, size

    def run(self, size: GraphSize, has_adapters: bool = False) -> Tensor:
        """Hidden states `[size.num_tokens, hidden_size]` of a step on the buffers of `tensors_for`, until the next.
        `has_adapters`: as the step was begun, see `LoraModel.begin_step`."""
        replay, hidden = self._steps[size, has_adapters]
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
