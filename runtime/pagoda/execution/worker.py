"""One rank: its device, its shard of the model, its KV cache, and the runner that works with them."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from pagoda.config.schema import PagodaConfig
from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda.execution.cuda_graphs import CudaCapture, graph_sizes, reserved_bytes, uses_cuda_graphs
from pagoda.execution.draft_model import DraftModel
from pagoda.execution.executor import StepHandle
from pagoda.execution.input_batch import InputBatch
from pagoda.execution.kernel_choice import (
    choose_cpu_kernels,
    choose_gpu_kernels,
    packs_weights,
    reserve_decode_workspace,
)
from pagoda.execution.kv_memory import choose_cpu_kv_cache_bytes
from pagoda.execution.model_runner import ModelRunner, PendingMultiStep
from pagoda.execution.precompile import ModelBuild, kernels_compiled_meanwhile
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM, KVCache
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.kv_scales import set_kv_scales
from pagoda.models.loading.loader import (
    LoadListener,
    check_weights,
    initialize_dummy_weights,
    load_weights,
    with_tie_as_stored,
)
from pagoda.models.loading.packed import weight_bytes
from pagoda.models.quantization.schemes import QuantizationConfig, check_device, choose_quantization
from pagoda.models.sharding import ModelShard, check_layout
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups
from pagoda.platform.hardware import memory_report
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import NO_SAMPLED_TOKENS, NewRequest, SampledTokensUpdate, StepPlan
from pagoda_kernels import backend
from pagoda_kernels.huge_pages import zeros_on_huge_pages

logger = logging.getLogger(__name__)

# The costliest way through the sampler: random, open, with log-probabilities.
_WARM_UP_SAMPLING = SamplingParams(top_p=0.999, min_p=1e-6, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=20)
_SMALL_STEPS = (512, 128, 32, 8, 2)  # tokens
_WARM_UP_TOKENS = 8  # on a CPU they take as long as one does: the weights are read once

# The dtype of each `kv_cache_dtype` but auto, which is the model's.
_FLOAT8_TYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Worker:
    """Called in this order: `load`, `available_kv_bytes`, `initialize_kv_cache`; then `execute` for each step.

    `config` must have its auto values resolved: `device`, `dtype`, `max_num_seqs`, `max_num_batched_tokens`. Every rank of
    `groups` goes through the same calls with the same arguments: they exchange messages in most of them.
    """

    def __init__(
        self,
        config: PagodaConfig,
        model_config: ModelConfig,
        groups: ParallelGroups = SINGLE_RANK,
        device: torch.device | None = None,
    ) -> None:
        """`device`: this rank's, with its index; None: the only one, or the current one."""
        unresolved = [name for name in ("max_num_seqs", "max_num_batched_tokens") if getattr(config, name) is None]
        unresolved += [name for name in ("device", "dtype") if getattr(config, name) == "auto"]
        if unresolved:
            raise ConfigError(f"{', '.join(unresolved)}: must be resolved before an executor is made")
        check_layout(model_config, groups.layout)
        self.config = config
        self.model_config = model_config
        self.groups = groups
        self.shard = ModelShard.of(model_config, groups.layout, groups.coordinates.rank)
        self.device = device or torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.kv_dtype = _FLOAT8_TYPES.get(config.kv_cache_dtype, self.dtype)
        self.model: DecoderForCausalLM | None = None
        self.runner: ModelRunner | None = None
        # Of speculative decoding by a draft model, which is whole on the rank that samples.
        self._draft_config = self._read_draft_config()
        self._small_model: DecoderForCausalLM | None = None
        self._draft_model: DraftModel | None = None

    def load(self, progress: LoadListener | None = None) -> None:
        """Set up the device and fill the weights. Raises `CheckpointError` for a checkpoint that does not fit."""
        if self.device.type == "cpu":
            if self.config.threads is not None:
                torch.set_num_threads(self.config.threads)
            choose_cpu_kernels(self.config.cpu_kernels)
        else:
            choose_gpu_kernels()
        quantization = self._quantization()
        if self.config.load_format != "dummy" and self.config.model is not None:
            # Before memory is allocated for the sizes in config.json, which may be wrong.
            self.model_config = with_tie_as_stored(self.model_config, self.config.model)
            check_weights(self.model_config, quantization, self.config.model)
        with self._compiling_kernels(quantization):
            self.model = build_model(
                self.model_config,
                self.dtype,
                self.device,
                self.groups,
                quantization,
                packed=packs_weights(self.dtype),
            )
            if self.config.load_format == "dummy":
                initialize_dummy_weights(self.model, self.config.seed)
            elif self.config.model is None:
                raise ConfigError("model: there is no directory to load weights from")
            else:
                load_weights(self.model, self.config.model, progress)
        if self.kv_dtype != self.dtype:
            set_kv_scales(self.model, self.config.model if self.config.load_format != "dummy" else None)
        fuse_layers(self.model)
        if self._draft_config is not None:
            self._small_model = self._load_draft_model(self._draft_config)
        logger.info("weights take %s", format_bytes(weight_bytes(self.model)))
        if self.device.type == "cuda":
            reserve_decode_workspace(
                self._max_num_seqs(), self.shard.heads.size, self.model_config.head_dim, self.device
            )

    def _read_draft_config(self) -> ModelConfig | None:
        speculation = self.config.speculation
        if speculation is None or speculation.model is None or not self.groups.coordinates.is_sampling_rank:
            return None
        return ModelConfig.from_directory(speculation.model)

    def _load_draft_model(self, config: ModelConfig) -> DecoderForCausalLM:
        speculation = self.config.speculation
        assert speculation is not None
        assert speculation.model is not None
        quantization = choose_quantization(None, None, config.quantization, config.linear_input_sizes)
        if quantization is not None:
            check_device(quantization, self.device.type, self.config.dtype)
        packed = packs_weights(self.dtype)
        model = build_model(config, self.dtype, self.device, SINGLE_RANK, quantization, packed=packed)
        load_weights(model, speculation.model)
        fuse_layers(model)
        logger.info("weights of the draft model take %s", format_bytes(weight_bytes(model)))
        return model

    def _compiling_kernels(self, quantization: QuantizationConfig | None) -> AbstractContextManager[None]:
        """On a GPU, compile the model's kernels in the background."""
        if self.device.type != "cuda":
            return nullcontext()
        return kernels_compiled_meanwhile(
            ModelBuild(
                config=self.model_config,
                groups=self.groups,
                quantization=quantization,
                dtype=self.dtype,
                kv_dtype=self.kv_dtype,
                block_size=self.config.block_size,
                device=self.device,
            )
        )

    def _quantization(self) -> QuantizationConfig | None:
        """How the model is quantized. Raises `ConfigError` where it cannot be so."""
        quantization = choose_quantization(
            self.config.quantization,
            self.config.quantization_group_size,
            self.model_config.quantization,
            self.model_config.linear_input_sizes,
        )
        if quantization is None:
            return None
        check_device(quantization, self.device.type, self.config.dtype)
        logger.info("weights are quantized: %s", quantization)
        return quantization.from_floats() if self.config.load_format == "dummy" else quantization

    def kv_block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block of `block_size` tokens: keys and values, in the layers and of the KV heads of this rank, and
        of the draft model where it has one."""
        of_token = self.shard.kv_bytes_per_token(self.kv_dtype.itemsize)
        if self._draft_config is not None:
            whole = ModelShard.of(self._draft_config, SINGLE_RANK.layout, 0)
            of_token += whole.kv_bytes_per_token(self.dtype.itemsize)
        return of_token * block_size

    def available_kv_bytes(self, num_ranks_on_host: int = 1) -> int:
        """Memory that the KV cache may take, with the weights loaded. On a GPU, a step of the greatest size is run.

        `num_ranks_on_host`: how many ranks share this host's memory, this one included.
        """
        asked = self.config.kv_cache_memory_bytes
        if self.device.type == "cuda" and asked is None:
            return self._profile_cuda()
        choice = choose_cpu_kv_cache_bytes(
            asked,
            memory_available=self._available_bytes(num_ranks_on_host),
            block_bytes=self.kv_block_bytes(self.config.block_size),
            block_size=self.config.block_size,
            max_model_len=self._longest_sequence(),
            max_num_seqs=self._max_num_seqs(),
        )
        logger.info("memory of the KV cache: %s (%s)", format_bytes(int(choice.value)), choice.reason)
        return int(choice.value)

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """Allocate `num_blocks` KV blocks, the null block included, and all that a step needs; then run a first step.

        `max_model_len`: the longest sequence, where it was fitted to the KV cache; None: as configured, else the model's.
        """
        self.runner = self._make_runner(num_blocks, max_model_len or self._longest_sequence(), self._max_num_seqs())
        self._run_largest(self.runner, num_rows=1, num_tokens=min(_WARM_UP_TOKENS, self.runner.batch.max_model_len - 1))
        if self._small_model is not None:
            self._draft_model = self._make_draft_model(self._small_model, self.runner)
        if self._uses_cuda_graphs():
            self._capture_cuda_graphs(self.runner)
        if self.device.type == "cuda":
            # The memory of steps is taken now, and not from the driver while requests run: that of the greatest one, and
            # of small ones, whose tensors the allocator keeps apart (those of 1 MiB and less).
            max_model_len = self.runner.batch.max_model_len
            largest = self._largest_step(max_model_len)
            self._run_largest(self.runner, **largest)
            for num_tokens in _SMALL_STEPS:
                if num_tokens < min(largest["num_tokens"], max_model_len):
                    self._run_largest(self.runner, num_rows=1, num_tokens=num_tokens)

    def execute(self, plan: StepPlan, update: SampledTokensUpdate = NO_SAMPLED_TOKENS) -> StepHandle:
        """Run a plan, see `ModelRunner.execute`; all steps of a multi-step plan, each on what the one before sampled."""
        if self.runner is None:
            raise RuntimeError("the KV cache is not initialized: no step can run")
        first = self.runner.execute(plan, update)
        if self._draft_model is not None:
            return self._draft_model.follow(plan, first)
        if not plan.num_steps:
            return first
        later = [plan.nth_step(index) for index in range(1, max(plan.num_steps))]
        return PendingMultiStep(first, [(rows, self.runner.execute(step)) for rows, step in later])

    def shutdown(self) -> None:
        """Free model, KV cache and CUDA graphs, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.model = self._small_model = None
        self.runner = self._draft_model = None
        if self.device.type == "cuda":
            gc.collect()  # graphs and model refer to each other
            torch.cuda.empty_cache()

    def _available_bytes(self, num_ranks_on_host: int) -> int:
        """This rank's part of the free memory, once all replicas on this machine have their weights there."""
        num_replicas = self.config.data_parallel_size
        weights = weight_bytes(self.model) if self.model is not None else 0
        still_to_load = (num_replicas - 1) * num_ranks_on_host * weights
        return max(0, memory_report().available - still_to_load) // (num_ranks_on_host * num_replicas)

    def _max_num_seqs(self) -> int:
        assert self.config.max_num_seqs is not None
        return self.config.max_num_seqs

    def _uses_cuda_graphs(self) -> bool:
        return uses_cuda_graphs(self.device.type, self.groups.layout, enforce_eager=self.config.enforce_eager)

    def _largest_step(self, max_model_len: int) -> dict[str, int]:
        """Rows and tokens of the greatest step that the scheduler can plan."""
        assert self.config.max_num_batched_tokens is not None
        num_tokens = self.config.max_num_batched_tokens
        num_rows = min(self._max_num_seqs(), num_tokens)
        return {"num_rows": num_rows, "num_tokens": min(num_tokens, num_rows * (max_model_len - 1))}

    def _longest_sequence(self) -> int:
        return self.config.max_model_len or self.model_config.max_context_length

    def _make_runner(self, num_blocks: int, max_model_len: int, max_num_seqs: int) -> ModelRunner:
        if self.model is None:
            raise RuntimeError("the model is not loaded: there is nothing to run")
        config, model_config = self.config, self.model_config
        kv_caches = self._kv_caches(self.shard, model_config, self.kv_dtype, num_blocks)
        heads_per_kv = self.shard.heads.size // self.shard.kv_heads.size
        batch = InputBatch(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=model_config.vocab_size,
            block_size=config.block_size,
            num_blocks=num_blocks,
            device=self.device,
            short_query_len=backend.active.short_query_len(heads_per_kv),
            max_short_rows=backend.active.max_short_rows(heads_per_kv),
        )
        return ModelRunner(self.model, kv_caches, batch, seed=config.seed)

    def _kv_caches(
        self, shard: ModelShard, model_config: ModelConfig, dtype: torch.dtype, num_blocks: int
    ) -> list[KVCache]:
        shape = (num_blocks, shard.kv_heads.size, self.config.block_size, model_config.head_dim)
        tensors = self._zeros(2 * len(shard.layers), shape, dtype)
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _make_draft_model(self, model: DecoderForCausalLM, large: ModelRunner) -> DraftModel:
        """The draft model on the request slots of `large`; runs a first step."""
        assert self.config.max_num_batched_tokens is not None
        kv_caches = self._kv_caches(model.shard, model.config, self.dtype, large.batch.num_blocks)
        runner = ModelRunner(model, kv_caches, large.batch, seed=self.config.seed, sampler=large.sampler)
        self._run_largest(runner, num_rows=1, num_tokens=min(_WARM_UP_TOKENS, large.batch.max_model_len - 1))
        return DraftModel(runner, self.config.max_num_batched_tokens)

    def _capture_cuda_graphs(self, runner: ModelRunner) -> None:
        torch.cuda.synchronize()
        started, free_before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        runner.capture_graphs(CudaCapture())
        torch.cuda.synchronize()
        sizes = graph_sizes(self._max_num_seqs())
        logger.info(
            "CUDA graphs: %d, for up to %d rows, captured in %.1f s, %s",
            len(sizes),
            sizes[-1],
            time.perf_counter() - started,
            format_bytes(max(0, free_before - torch.cuda.mem_get_info()[0])),
        )

    def _zeros(self, num_tensors: int, shape: tuple[int, ...], dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """Keys and values of all layers. On a CPU, all of their memory is taken now, on huge pages where there are any."""
        if self.device.type == "cpu":
            return zeros_on_huge_pages((num_tensors, *shape), dtype).unbind()
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(num_tensors)]

    def _run_largest(self, runner: ModelRunner, *, num_rows: int, num_tokens: int) -> None:
        """Run `num_tokens` tokens in `num_rows` rows that all sample, and then one more of each. Uses the null block only."""
        tokens_per_row = max(1, num_tokens // num_rows)
        blocks = [0] * -(-(tokens_per_row + 1) // runner.batch.block_size)
        req_indices = list(range(num_rows))
        prefill = StepPlan(
            step_id=0,
            new_requests=[
                NewRequest(
                    req_index=req_index,
                    spec=EngineRequest(
                        request_id=f"warm-up-{req_index}",
                        params=_WARM_UP_SAMPLING,
                        prompt_token_ids=[0] * tokens_per_row,
                        max_tokens=1,
                    ),
                    output_token_ids=[],
                    block_ids=blocks,
                    num_computed_tokens=0,
                )
                for req_index in req_indices
            ],
        )
        decode = StepPlan(step_id=1)
        for plan, computed, scheduled in ((prefill, 0, tokens_per_row), (decode, tokens_per_row, 1)):
            plan.req_indices = req_indices
            plan.num_computed_tokens = [computed] * num_rows
            plan.num_scheduled_tokens = [scheduled] * num_rows
            plan.new_block_ids = [[] for _ in req_indices]
            plan.block_offsets = [len(blocks)] * num_rows
            plan.samples = [True] * num_rows
            result = runner.execute(plan).result()
            if result.errors:
                logger.warning("the warm-up step failed: %s", next(iter(result.errors.values())))
        runner.execute(StepPlan(step_id=2, released_req_indices=req_indices)).result()

    def _profile_cuda(self) -> int:
        """What `gpu_memory_utilization` leaves after weights, the greatest step, graphs, and the tables of the request
        slots."""
        assert self.config.max_num_batched_tokens is not None
        num_tokens = self.config.max_num_batched_tokens
        speculation, max_num_seqs = self.config.speculation, self._max_num_seqs()
        # A draft is one more row of logits.
        num_drafts = 0 if speculation is None else speculation.max_draft_tokens(max_num_seqs, num_tokens)
        num_rows = min(max_num_seqs + num_drafts, num_tokens)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_reserved()
        self._run_largest(
            self._make_runner(1, num_tokens // num_rows + 2, num_rows), num_rows=num_rows, num_tokens=num_tokens
        )
        step_bytes = torch.cuda.max_memory_reserved() - held
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        blocks_per_row = -(-self._longest_sequence() // self.config.block_size)
        table_bytes = self._max_num_seqs() * (8 * (self._longest_sequence() + 1) + 4 * blocks_per_row)
        graph_bytes = 0
        if self._uses_cuda_graphs():
            graph_bytes = reserved_bytes(self._max_num_seqs(), -(-step_bytes // num_tokens))
        share = self.config.gpu_memory_utilization
        available = max(0, int(total * share) - (total - free) - step_bytes - graph_bytes - table_bytes)
        logger.info(
            "memory of the KV cache: %g of %s - %s in use - %s for a step - %s for CUDA graphs - %s for tokens and block "
            "tables = %s",
            share,
            *(format_bytes(size) for size in (total, total - free, step_bytes, graph_bytes, table_bytes, available)),
        )
        return available
