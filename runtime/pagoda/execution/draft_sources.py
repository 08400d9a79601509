"""What drafts for a worker's model, by `speculative_config`: how much it keeps of each token, its weights, and the drafter."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from typing_extensions import override

from pagoda.config.schema import PagodaConfig
from pagoda.config.values import format_bytes
from pagoda.execution.draft_model import DraftModel
from pagoda.execution.drafter import Drafter
from pagoda.execution.head_drafter import Head, HeadDrafter
from pagoda.execution.kernel_choice import packs_weights
from pagoda.execution.model_runner import ModelRunner
from pagoda.models.aux_hidden_states import AuxHiddenStates
from pagoda.models.build import build_model
from pagoda.models.causal_lm import allocate_kv_caches
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.eagle3 import load_eagle3_head
from pagoda.models.eagle3_config import Eagle3Config
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.loading.loader import initialize_dummy_weights, load_weights
from pagoda.models.loading.packed import weight_bytes
from pagoda.models.mtp import MTPHead, MTPLayer
from pagoda.models.mtp_config import read_mtp_config
from pagoda.models.quantization.schemes import check_device, choose_quantization
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups

logger = logging.getLogger(__name__)

Zeros = Callable[[int, tuple[int, ...], torch.dtype], Sequence[torch.Tensor]]
"""Allocates so many tensors of a shape and dtype for the KV cache."""


class DraftSource(ABC):
    """Used in this order: `bytes_per_token`, `load`, `drafter`."""

    def __init__(self, config: PagodaConfig, directory: str, dtype: torch.dtype) -> None:
        """`directory`: of its checkpoint. `dtype`: the model's, which is also that of all that is kept here."""
        self.config = config
        self.directory = directory
        self.dtype = dtype

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Memory of one token in the KV cache."""

    @abstractmethod
    def load(self, target: DecoderForCausalLM) -> None:
        """Load the weights, once the model `target` is loaded and fused."""

    @abstractmethod
    def drafter(self, runner: ModelRunner, zeros: Zeros) -> Drafter:
        """The drafter on the request slots of `runner`, the model's."""

    @property
    def max_num_batched_tokens(self) -> int:
        assert self.config.max_num_batched_tokens is not None
        return self.config.max_num_batched_tokens


def draft_source(config: PagodaConfig, groups: ParallelGroups, dtype: torch.dtype) -> DraftSource | None:
    """What drafts on this rank; None where nothing does, as on all ranks but the one that samples."""
    speculation = config.speculation
    if speculation is None or speculation.model is None or not groups.coordinates.is_sampling_rank:
        return None
    source = _SOURCES[speculation.method]
    return source(config, speculation.model, dtype)


class SmallModelSource(DraftSource):
    """A small model, whole on the rank."""

    def __init__(self, config: PagodaConfig, directory: str, dtype: torch.dtype) -> None:
        super().__init__(config, directory, dtype)
        self._model_config = ModelConfig.from_directory(directory)
        self._model: DecoderForCausalLM | None = None

    @property
    @override
    def bytes_per_token(self) -> int:
        return self._model_config.kv_bytes_per_token(self.dtype.itemsize)

    @override
    def load(self, target: DecoderForCausalLM) -> None:
        assert self.config.speculation is not None
        quantization = choose_quantization(
            self.config.speculation.quantization,
            None,
            self._model_config.quantization,
            self._model_config.linear_input_sizes,
        )
        if quantization is not None:
            check_device(quantization, target.device.type, self.config.dtype)
        model = build_model(
            self._model_config, self.dtype, target.device, SINGLE_RANK, quantization, packed=packs_weights(self.dtype)
        )
        load_weights(model, self.directory)
        fuse_layers(model)
        logger.info("weights of the draft model take %s", format_bytes(weight_bytes(model)))
        self._model = model

    @override
    def drafter(self, runner: ModelRunner, zeros: Zeros) -> Drafter:
        assert self._model is not None, "the draft model is not loaded"
        batch = runner.batch
        kv_caches = allocate_kv_caches(
            self._model_config.kv_specs,
            batch.block_size,
            lambda shape, _: zeros(1, (batch.num_blocks, *shape), self.dtype)[0],
        )
        small = ModelRunner(self._model, kv_caches, runner.batch, seed=self.config.seed, sampler=runner.sampler)
        return DraftModel(small, self.max_num_batched_tokens)


class HeadSource(DraftSource):
    """What drafts from hidden states of the model, whole on the rank."""

    _head: Head | None = None
    _target: DecoderForCausalLM | None = None

    @property
    @abstractmethod
    def layer(self) -> ModelConfig:
        """The head as a model of one layer."""

    @property
    @override
    def bytes_per_token(self) -> int:
        return self.layer.kv_bytes_per_token(self.dtype.itemsize) + self.layer.hidden_size * self.dtype.itemsize

    @override
    def drafter(self, runner: ModelRunner, zeros: Zeros) -> Drafter:
        assert self._head is not None, "the head is not loaded"
        assert self._target is not None
        batch = runner.batch
        states = AuxHiddenStates(self._target, self._head.aux_layers, self.max_num_batched_tokens)
        (kv_cache,) = allocate_kv_caches(
            self.layer.kv_specs,
            batch.block_size,
            lambda shape, _: zeros(1, (batch.num_blocks, *shape), self.dtype)[0],
        )
        (features,) = zeros(1, (batch.num_blocks, batch.block_size, self.layer.hidden_size), self.dtype)
        return HeadDrafter(self._head, runner, states, features, kv_cache, self.max_num_batched_tokens)


class Eagle3Source(HeadSource):
    """An EAGLE-3 head of a checkpoint of its own."""

    def __init__(self, config: PagodaConfig, directory: str, dtype: torch.dtype) -> None:
        super().__init__(config, directory, dtype)
        self._head_config = Eagle3Config.from_directory(directory)

    @property
    @override
    def layer(self) -> ModelConfig:
        return self._head_config.layer

    @override
    def load(self, target: DecoderForCausalLM) -> None:
        directory = None if self.config.load_format == "dummy" else self.config.model
        self._head = load_eagle3_head(
            self._head_config, self.directory, target, directory, packed=packs_weights(self.dtype)
        )
        self._target = target


class MTPSource(HeadSource):
    """The layer for multi-token prediction of the model's own checkpoint."""

    def __init__(self, config: PagodaConfig, directory: str, dtype: torch.dtype) -> None:
        super().__init__(config, directory, dtype)
        self._layer = read_mtp_config(directory, ModelConfig.from_directory(directory))

    @property
    @override
    def layer(self) -> ModelConfig:
        return self._layer

    @override
    def load(self, target: DecoderForCausalLM) -> None:
        packed = packs_weights(self.dtype)
        layer = build_model(
            self._layer,
            self.dtype,
            target.device,
            SINGLE_RANK,
            target.quantization,
            packed=packed,
            max_model_len=self.config.max_model_len,
        )
        assert isinstance(layer, MTPLayer)
        assert target.norm is not None
        if target.groups.tp_group.size == 1:
            layer.share_ends(target)
        if self.config.load_format == "dummy":
            initialize_dummy_weights(layer)
        else:
            load_weights(layer, self.directory)
        self._head = MTPHead(layer, target.norm, target.config.num_layers).eval()
        if packed:
            self._head.pack()
        fuse_layers(layer)
        self._target = target
        logger.info("weights of the MTP layer take %s", format_bytes(weight_bytes(layer)))


_SOURCES: dict[str, type[DraftSource]] = {"draft_model": SmallModelSource, "eagle3": Eagle3Source, "mtp": MTPSource}
