"""One rank: its device, its shard of the model, its KV cache, and the runner that works with them."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pagoda.config.schema import PagodaConfig
from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda.execution.cuda_graphs import CudaCapture, GraphSize, graph_sizes, reserved_bytes, uses_cuda_graphs
from pagoda.execution.draft_sources import draft_source
from pagoda.execution.drafter import Drafter
from pagoda.execution.executor import StepHandle
from pagoda.execution.expert_load import ExpertLoadMeter
from pagoda.execution.input_batch import InputBatch
from pagoda.execution.kernel_choice import (
    choose_cpu_kernels,
    choose_gpu_kernels,
    packs_weights,
    reserve_decode_workspace,
)
from pagoda.execution.kv_memory import CPU_KV_SHARE, OWN_SHARE, choose_cpu_kv_cache_bytes
from pagoda.execution.kv_pages import KVPages
from pagoda.execution.model_runner import ModelRunner, PendingMultiStep
from pagoda.execution.pooling_runner import PoolingRunner
from pagoda.execution.precompile import ModelBuild, kernels_compiled_meanwhile
from pagoda.execution.released_memory import forget_files, give_back_memory
from pagoda.execution.weight_source import WeightSource
from pagoda.models.build import build_model
from pagoda.models.causal_lm import CausalLM, KVCache
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.kv_scales import set_kv_scales
from pagoda.models.layers.moe import MixtureOfExperts
from pagoda.models.loading.loader import (
    LoadListener,
    check_weights,
    initialize_dummy_weights,
    load_weights,
    with_tie_as_stored,
)
from pagoda.models.loading.packed import weight_bytes
from pagoda.models.loading.weight_cache import cache_key
from pagoda.models.loading.weight_cache_directory import WeightCacheDirectory
from pagoda.models.lora.weights import LoraModel
from pagoda.models.pooler import Pooler
from pagoda.models.pooling_config import read_pooler, token_ids_of
from pagoda.models.quantization.schemes import QuantizationConfig, check_device, choose_quantization
from pagoda.models.sharding import ModelShard, check_layout
from pagoda.models.transformers_config import TransformersDetails
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups
from pagoda.platform.hardware import memory_report, resident_bytes
from pagoda.pooling.params import PoolingParams
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.kv_groups import KVSpec, RecurrentState, cache_forms
from pagoda.scheduling.plan import NO_SAMPLED_TOKENS, NewRequest, SampledTokensUpdate, StepPlan
from pagoda_kernels import backend
from pagoda_kernels.huge_pages import zeros_on_huge_pages
from pagoda_kernels.types import LoraLimits

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
        """`device`: this rank's, with its index; None: the only one, or the current one.

        Where the model pools (`task`), its runner does so instead of sampling.
        """
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
        self.kv_groups = model_config.kv_groups(config.block_size, config.max_model_len)
        self.model: CausalLM | None = None
        self.runner: ModelRunner | None = None
        self._pooler_config = read_pooler(config, config.model, model_config) if config.model is not None else None
        self._warm_up_params: SamplingParams | PoolingParams = _WARM_UP_SAMPLING
        if self._pooler_config is not None:
            self._warm_up_params = PoolingParams(self._pooler_config.tasks[0])
        self._draft_source = draft_source(config, groups, self.dtype)
        self._drafter: Drafter | None = None
        self._expert_load: ExpertLoadMeter | None = None
        self._kv_pages: KVPages | None = None
        self._weights: WeightSource | None = None
        self.adapters: LoraModel | None = None

    def load(self, progress: LoadListener | None = None) -> None:
        """Set up the device and fill the weights. Raises `CheckpointError` for a checkpoint that does not fit."""
        if self.device.type == "cpu":
            if self.config.threads is not None:
                torch.set_num_threads(self.config.threads)
            choose_cpu_kernels(self.config.cpu_kernels)
        else:
            choose_gpu_kernels()
        if self.model_config.transformers is not None:
            self.model = self._load_through_transformers(self.model_config.transformers)
        else:
            self.model = self._load_own(progress)
        self.model.layer_groups = [self.kv_groups.group_of_layer[layer] for layer in self.shard.layers]
        if self.config.enable_lora:
            self.adapters = LoraModel(
                self.model, self.model_config, self._lora_limits(), max_num_seqs=self._max_num_seqs()
            )
        if isinstance(self.model, DecoderForCausalLM):
            fuse_layers(self.model)
            counters = [module.load for module in self.model.modules() if isinstance(module, MixtureOfExperts)]
            if counters and self.groups.coordinates.is_sampling_rank:
                layout = self.groups.layout
                num_ranks = layout.tensor_parallel_size if layout.expert_parallel else 1
                self._expert_load = ExpertLoadMeter(counters, num_ranks)
            if self._draft_source is not None:
                self._draft_source.load(self.model)
        if self.device.type == "cuda":
            reserve_decode_workspace(
                self._max_num_seqs(), self.shard.heads.size, self.model_config.head_dim, self.device
            )

    def _load_through_transformers(self, details: TransformersDetails) -> CausalLM:
        from pagoda.models.transformers_model import load_transformers_model  # transformers' models take long to import

        return load_transformers_model(
            details.hf_config(),
            None if self.config.load_format == "dummy" else self.config.model,
            [(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in self.model_config.layers],
            dtype=self.dtype,
            device=self.device,
            seed=self.config.seed,
        )

    def _load_own(self, progress: LoadListener | None) -> DecoderForCausalLM:
        """A model of one of Pagoda's families."""
        quantization = self._quantization()
        if self.config.load_format == "dummy":
            model = self._build(quantization)
            initialize_dummy_weights(model, self.config.seed)
        elif self.config.model is None:
            raise ConfigError("model: there is no directory to load weights from")
        else:
            model = self._load_checkpoint(self.config.model, quantization, progress)
        if self.kv_dtype != self.dtype:
            set_kv_scales(model, self.config.model if self.config.load_format != "dummy" else None)
        logger.info("weights take %s", format_bytes(weight_bytes(model)))
        return model

    def _load_checkpoint(
        self, directory: str, quantization: QuantizationConfig | None, progress: LoadListener | None
    ) -> DecoderForCausalLM:
        self.model_config = with_tie_as_stored(self.model_config, directory)
        self._weights = self._weight_source(directory, quantization)

        def check() -> None:
            """Before memory is allocated for the sizes in config.json, which may be wrong."""
            check_weights(self.model_config, quantization, directory)

        def read(model: DecoderForCausalLM) -> None:
            load_weights(model, directory, progress)

        with self._compiling_kernels(quantization):
            if self._weights is not None:
                return self._weights.load(lambda: self._build(quantization), read, check, progress)
            check()
            model = self._build(quantization)
            read(model)
            return model

    def _build(self, quantization: QuantizationConfig | None) -> DecoderForCausalLM:
        return build_model(
            self.model_config,
            self.dtype,
            self.device,
            self.groups,
            quantization,
            packed=packs_weights(self.dtype),
            max_model_len=self.config.max_model_len,
        )

    def _weight_source(self, directory: str, quantization: QuantizationConfig | None) -> WeightSource | None:
        """A cache of packed weights, where weights are packed."""
        model, setting = Path(directory), self.config.weight_cache_dir
        if self.device.type != "cpu" or not (packs_weights(self.dtype) or quantization is not None):
            return None
        cache = WeightCacheDirectory.of(setting, model, self.config.weight_cache_max_bytes)
        if cache is None:
            return None
        rank, kernels = self.groups.coordinates.rank, type(backend.active).__name__
        return WeightSource(
            cache, cache_key(model, self.model_config, quantization, self.dtype, self.groups.layout, rank, kernels)
        )

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
                lora=self._lora_limits() if self.config.enable_lora else None,
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
        """Bytes of one KV block of `block_size` tokens of a group's layers: keys and values, in the layers and of the KV heads
        of this rank, and what drafts keeps in it where there is something."""
        num_ranks = self.groups.layout.tensor_parallel_size
        of_block: int = self.kv_groups.block_bytes(self.shard.layers, num_ranks, block_size, self.kv_dtype.itemsize)
        if self._draft_source is not None:
            of_block += self._draft_source.bytes_per_token * block_size
        return of_block

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
            rules=self.kv_groups.rules,
            max_num_seqs=self._max_num_seqs(),
            max_model_len=self._longest_sequence(),
            max_step_tokens=self.config.max_num_batched_tokens or 1,
        )
        logger.info("memory of the KV cache: %s (%s)", format_bytes(int(choice.value)), choice.reason)
        return int(choice.value)

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """Allocate `num_blocks` KV blocks, the null block included, and all that a step needs; then run a first step.

        `max_model_len`: the longest sequence, where it was fitted to the KV cache; None: as configured, else the model's.
        """
        self.runner = self._make_runner(num_blocks, max_model_len or self._longest_sequence(), self._max_num_seqs())
        self._run_largest(self.runner, num_rows=1, num_tokens=min(_WARM_UP_TOKENS, self.runner.batch.max_model_len - 1))
        if self._draft_source is not None:
            self._drafter = self._draft_source.drafter(self.runner, self._zeros)
        if self.config.speculation is not None and self.config.speculation.model is not None:
            # On all ranks, for they exchange messages, although one has the drafter.
            self._run_largest(self.runner, num_rows=1, num_tokens=_WARM_UP_TOKENS // 2, num_drafts=1)
        if self._uses_cuda_graphs():
            self._capture_cuda_graphs(self.runner)
        if self._kv_pages is not None:
            self._kv_pages.populate_rest()
        if self._weights is not None:
            self._weights.finish()
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
        if self._expert_load is not None:
            first.expert_load = self._expert_load.take()
        if self._drafter is not None:
            return self._drafter.follow(plan, first)
        if not plan.num_steps:
            return first
        later = [plan.nth_step(index) for index in range(1, max(plan.num_steps))]
        return PendingMultiStep(first, [(rows, self.runner.execute(step)) for rows, step in later])

    def release(self, level: int) -> None:
        """Free what `load` and `initialize_kv_cache` made; both may be called again."""
        files = [self.config.model] if self._weights is None else [self.config.model, self._weights.file]
        self.shutdown()
        self._draft_source = draft_source(self.config, self.groups, self.dtype)
        give_back_memory()
        if level > 1:
            for file in files:
                forget_files(file)

    def shutdown(self) -> None:
        """Free model, KV cache and CUDA graphs, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._kv_pages is not None:
            self._kv_pages.stop()
        if self._weights is not None:
            self._weights.stop()
        self.model = self.runner = self._kv_pages = self._weights = None
        self._draft_source = self._drafter = None
        self.adapters = None
        if self.device.type == "cuda":
            gc.collect()  # graphs and model refer to each other
            torch.cuda.empty_cache()

    def _available_bytes(self, num_ranks_on_host: int) -> int:
        """This rank's part of the free memory, once all replicas on this machine have their weights there."""
        num_replicas = self.config.data_parallel_size
        weights = weight_bytes(self.model) if self.model is not None else 0
        still_to_load = (num_replicas - 1) * num_ranks_on_host * weights
        adapters = self._adapter_bytes()
        mapped = 0 if self._weights is None else self._weights.mapped_bytes
        available = max(0, memory_report().available - mapped * num_ranks_on_host - still_to_load) // (
            num_ranks_on_host * num_replicas
        )
        available = max(0, available - adapters)
        most = self.config.engine_memory_bytes
        if most is None or self.device.type != "cpu":
            return available
        resident = resident_bytes() + mapped
        left = (most - still_to_load) // (num_ranks_on_host * num_replicas) - resident - adapters
        if left <= 0:
            raise ConfigError(
                f"engine_memory_bytes={format_bytes(most)}: the process has {format_bytes(resident)} with the weights "
                f"({format_bytes(weights)}), which leaves nothing for the KV cache"
            )
        # The share below is for what a machine has beside an engine: of its own part it may take more.
        return min(available, int(left * OWN_SHARE / CPU_KV_SHARE))

    def _adapter_bytes(self) -> int:
        """Memory of as many adapters of the greatest rank as may be in it."""
        return 0 if self.adapters is None else self.adapters.max_bytes

    def _lora_limits(self) -> LoraLimits:
        """What adapters are sized for; a graph may have more rows than the greatest step, as padding."""
        largest = self._largest_step(self._longest_sequence())["num_tokens"]
        of_graphs = max(size.num_tokens for size in self._graph_sizes()) if self._uses_cuda_graphs() else 0
        return LoraLimits(
            num_slots=self.config.num_cpu_loras,
            max_rank=self.config.max_lora_rank,
            max_num_tokens=max(largest, of_graphs),
            dtype=self.dtype,
            device=self.device,
        )

    def _max_num_seqs(self) -> int:
        assert self.config.max_num_seqs is not None
        return self.config.max_num_seqs

    def _uses_cuda_graphs(self) -> bool:
        enforce_eager = self.config.enforce_eager or self.model_config.transformers is not None
        return uses_cuda_graphs(self.device.type, self.groups.layout, enforce_eager=enforce_eager)

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
        kv_caches = self._kv_caches(num_blocks)
        heads_per_kv = self.shard.heads.size // self.shard.kv_heads.size
        batch = InputBatch(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=model_config.vocab_size,
            block_size=config.block_size,
            num_blocks=num_blocks,
            num_groups=len(self.kv_groups),
            device=self.device,
            short_query_len=backend.active.short_query_len(heads_per_kv),
            max_short_rows=backend.active.max_short_rows(heads_per_kv),
        )
        if self._pooler_config is None:
            return ModelRunner(self.model, kv_caches, batch, seed=config.seed, adapters=self.adapters)
        assert config.model is not None
        assert isinstance(self.model, DecoderForCausalLM)
        pooler = Pooler(self._pooler_config, config.model, ("", "model."), self.device)
        score_token_ids = token_ids_of(self._pooler_config.score_tokens, config.tokenizer or config.model)
        return PoolingRunner(self.model, kv_caches, batch, pooler, score_token_ids, self.adapters)

    def _kv_caches(self, num_blocks: int) -> list[KVCache]:
        """The cache of each layer held here; layers of different groups share theirs."""
        block_size = self.config.block_size
        caches = self.kv_groups.caches(self.shard.layers, self.groups.layout.tensor_parallel_size)
        memory = {
            form: [self._zeros(each.num_caches, (num_blocks, size), torch.uint8) for size in each.page_bytes]
            for form, each in cache_forms(caches, block_size, self.kv_dtype.itemsize).items()
        }
        if self.device.type == "cpu":
            self._kv_pages = KVPages([pages for tensors in memory.values() for each in tensors for pages in each])
            self._kv_pages.populate_first()
        return [
            tuple(
                self._as_pages(pages[cache.index], shape, cache.spec)
                for pages, shape in zip(memory[cache.form], cache.spec.page_shapes(block_size), strict=False)
            )
            for cache in caches
        ]

    def _as_pages(self, pages: torch.Tensor, shape: tuple[int, ...], spec: KVSpec) -> torch.Tensor:
        """The pages [num_blocks, bytes] of a cache as tensors of `shape`, which may take less than a page."""
        dtype = torch.float32 if isinstance(spec, RecurrentState) else self.kv_dtype
        used = pages[:, : math.prod(shape) * dtype.itemsize]
        return used.view(dtype).view(len(pages), *shape)

    def _graph_sizes(self) -> list[GraphSize]:
        heads_per_kv = self.shard.heads.size // self.shard.kv_heads.size
        return graph_sizes(
            self._max_num_seqs(),
            self.config.speculation.num_speculative_tokens if self.config.speculation is not None else 0,
            short_query_len=backend.active.short_query_len(heads_per_kv),
            max_short_rows=backend.active.max_short_rows(heads_per_kv),
        )

    def _capture_cuda_graphs(self, runner: ModelRunner) -> None:
        torch.cuda.synchronize()
        started, free_before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        sizes = self._graph_sizes()
        runner.capture_graphs(CudaCapture(), sizes)
        torch.cuda.synchronize()
        logger.info(
            "CUDA graphs: %d, for up to %d rows, and up to %d tokens a row, captured in %.1f s, %s",
            len(sizes) * (2 if self.adapters is not None else 1),
            max(size.num_rows for size in sizes),
            max(size.query_len for size in sizes),
            time.perf_counter() - started,
            format_bytes(max(0, free_before - torch.cuda.mem_get_info()[0])),
        )

    def _zeros(self, num_tensors: int, shape: tuple[int, ...], dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """Keys, or values, of layers. On a CPU they take memory when they are written or populated."""
        if self.device.type == "cpu":
            return zeros_on_huge_pages((num_tensors, *shape), dtype).unbind()
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(num_tensors)]

    def _run_largest(self, runner: ModelRunner, *, num_rows: int, num_tokens: int, num_drafts: int = 0) -> None:
        """Run `num_tokens` tokens in `num_rows` rows that all sample, and then one more of each. Uses the null block only, or
        where there are states, which keys and values would be read as, the first block of each group.

        `num_drafts`: of each row, which the drafter makes.
        """
        execute = self.execute if num_drafts else runner.execute
        tokens_per_row = max(1, num_tokens // num_rows)
        num_blocks = -(-(tokens_per_row + 1) // runner.batch.block_size)
        num_groups = runner.batch.num_groups
        has_own = self.kv_groups.has_state and runner.batch.num_blocks > num_groups
        blocks = [[1 + group if has_own else 0] * num_blocks for group in range(num_groups)]
        req_indices = list(range(num_rows))
        prefill = StepPlan(
            step_id=0,
            new_requests=[
                NewRequest(
                    req_index=req_index,
                    spec=EngineRequest(
                        request_id=f"warm-up-{req_index}",
                        params=self._warm_up_params,
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
            plan.samples = [True] * num_rows
            plan.num_drafts_wanted = dict.fromkeys(range(num_rows), num_drafts) if num_drafts else {}
            result = execute(plan).result()
            if result.errors:
                logger.warning("the warm-up step failed: %s", next(iter(result.errors.values())))
        execute(StepPlan(step_id=2, released_req_indices=req_indices)).result()

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
        runner = self._make_runner(1, num_tokens // num_rows + 2, num_rows)
        if self.adapters is not None:
            self.adapters.assumes_adapters = True
        self._run_largest(runner, num_rows=num_rows, num_tokens=num_tokens)
        if self.adapters is not None:
            self.adapters.assumes_adapters = False
        del runner
        step_bytes = torch.cuda.max_memory_reserved() - held
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        blocks_per_row = -(-self._longest_sequence() // self.config.block_size)
        columns = blocks_per_row * len(self.kv_groups)
        table_bytes = self._max_num_seqs() * (8 * (self._longest_sequence() + 1) + 4 * columns)
        graph_bytes = 0
        if self._uses_cuda_graphs():
            graph_bytes = reserved_bytes(
                self._graph_sizes(), -(-step_bytes // num_tokens), has_adapters=self.adapters is not None
            )
        share = self.config.gpu_memory_utilization
        adapters = self._adapter_bytes()
        available = max(0, int(total * share) - (total - free) - step_bytes - graph_bytes - table_bytes - adapters)
        logger.info(
            "memory of the KV cache: %g of %s - %s in use - %s for a step - %s for CUDA graphs - %s for tokens and block "
            "tables - %s for adapters = %s",
            share,
            *map(format_bytes, (total, total - free, step_bytes, graph_bytes, table_bytes, adapters, available)),
        )
        return available
