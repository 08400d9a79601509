"""One rank that runs an encoder: its device, its weights, and the runner. There is no KV cache."""

from __future__ import annotations

import logging

import torch

from pagoda.config.schema import PagodaConfig
from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda.execution.executor import StepHandle
from pagoda.execution.input_batch import InputBatch
from pagoda.execution.kernel_choice import choose_cpu_kernels, choose_gpu_kernels
from pagoda.execution.pooling_runner import EncoderRunner
from pagoda.execution.released_memory import forget_files, give_back_memory
from pagoda.models.encoders.config import EncoderConfig
from pagoda.models.encoders.encoder import Encoder, EncoderWeights
from pagoda.models.loading.loader import LoadListener
from pagoda.models.lora.weights import LoraModel
from pagoda.models.pooler import Pooler
from pagoda.models.pooling_config import PoolerConfig
from pagoda.pooling.params import PoolingParams
from pagoda.request import EngineRequest
from pagoda.scheduling.plan import NO_SAMPLED_TOKENS, NewRequest, SampledTokensUpdate, StepPlan

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 8


class EncoderWorker:
    """Called as `Worker` is: `load`, `initialize_kv_cache`, then `execute` for each step."""

    def __init__(self, config: PagodaConfig, model_config: EncoderConfig, pooler_config: PoolerConfig) -> None:
        self.config = config
        self.adapters: LoraModel | None = None  # of decoders only
        self.model_config = model_config
        self.pooler_config = pooler_config
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.runner: EncoderRunner | None = None
        self._encoder: Encoder | None = None
        self._pooler: Pooler | None = None

    def load(self, progress: LoadListener | None = None) -> None:
        """Set up the device and fill the weights. Raises `CheckpointError` for a checkpoint that does not fit."""
        config = self.config
        if self.device.type == "cpu":
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            choose_cpu_kernels(config.cpu_kernels)
        else:
            choose_gpu_kernels()
        if config.model is None:
            raise ConfigError("model: there is no directory to load weights from")
        prefixes = self.model_config.names.prefixes
        bits = 8 if config.quantization == "int8" else None
        self._encoder = Encoder(self.model_config, self.dtype, self.device, bits)
        self._encoder.load(EncoderWeights.of(config.model, prefixes), progress)
        self._pooler = Pooler(self.pooler_config, config.model, prefixes, self.device)
        logger.info("weights take %s", format_bytes(self._encoder.num_bytes))

    def kv_block_bytes(self, block_size: int) -> int:
        """None: there is no KV cache."""
        del block_size
        return 0

    def available_kv_bytes(self) -> int:
        """None: there is no KV cache."""
        return 0

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """Allocate the request slots, and run a first step."""
        del num_blocks
        assert self._encoder is not None
        assert self._pooler is not None
        assert self.config.max_num_seqs is not None
        longest = max_model_len or self.model_config.max_context_length
        batch = InputBatch(
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=longest,
            vocab_size=self.model_config.vocab_size,
            # Block tables of one entry, the null block: nothing is written there, nor read.
            block_size=longest + 1,
            num_blocks=1,
            device=self.device,
        )
        self.runner = EncoderRunner(self._encoder, batch, self._pooler)
        self._warm_up(self.runner, min(_WARM_UP_TOKENS, longest))

    def execute(self, plan: StepPlan, update: SampledTokensUpdate = NO_SAMPLED_TOKENS) -> StepHandle:
        """Run a plan, see `ModelRunner.execute`."""
        if self.runner is None:
            raise RuntimeError("the request slots are not allocated: no step can run")
        return self.runner.execute(plan, update)

    def release(self, level: int) -> None:
        """Free the model; `load` and `initialize_kv_cache` may be called again."""
        self.shutdown()
        give_back_memory()
        if level > 1:
            forget_files(self.config.model)

    def shutdown(self) -> None:
        """Free the model."""
        self.runner = self._encoder = self._pooler = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _warm_up(self, runner: EncoderRunner, num_tokens: int) -> None:
        spec = EngineRequest(
            request_id="warm-up",
            params=PoolingParams(self.pooler_config.tasks[0]),
            prompt_token_ids=[0] * num_tokens,
            max_tokens=1,
        )
        plan = StepPlan(
            step_id=0,
            new_requests=[NewRequest(req_index=0, spec=spec, output_token_ids=[], block_ids=[], num_computed_tokens=0)],
            req_indices=[0],
            num_computed_tokens=[0],
            num_scheduled_tokens=[num_tokens],
            samples=[True],
        )
        result = runner.execute(plan).result()
        if result.errors:
            logger.warning("the warm-up step failed: %s", next(iter(result.errors.values())))
        runner.execute(StepPlan(step_id=1, released_req_indices=[0])).result()
