"""Any other decoder that transformers has, over this engine's KV cache: scheduled, cached and preempted as all models are.

transformers' models look their attention up in a registry, by name. What is registered here as `pagoda_paged` writes a layer's
keys and values into its cache, and attends over the block tables of the step:

    forward(ids, positions, kv_caches, metadata)
      └─ transformers' decoder, batch [1, T] ─▶ layer i ─▶ registry["pagoda_paged"] ─▶ write_kv, paged_attention (cache i)
    compute_logits(hidden)
      └─ transformers' head: what its model does behind the decoder, factors and caps included

What a layer keeps is not read from config.json, which every family spells in its own way: the model is built without memory
and run once, and its calls of attention are noted (`observed_attention`). A model that computes something else with this
attention than with transformers' own is refused when it is loaded (`check_against_itself`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from typing_extensions import override

from pagoda.errors import CheckpointError
from pagoda.models.causal_lm import CausalLM, KVCache
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata

logger = logging.getLogger(__name__)

ATTENTION = "pagoda_paged"

# What attention may be given besides what it computes with; anything else would change what a model means.
_WITHOUT_EFFECT = frozenset(
    {"dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "is_causal", "past_key_values"}
)

_CHECK_TOKENS = 24
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention by a layer. Queries are [1, heads, T, head_dim], keys and values [1, KV heads, T, head_dim], of
    which values may be narrower."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None
    soft_cap: float | None


# What attends in the present forward pass: takes a call, returns [1, T, heads, size of a value].
_attend: ContextVar[Callable[[AttentionCall], torch.Tensor]] = ContextVar("attend")


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """See `transformers.AttentionInterface`. Raises `CheckpointError` for what paged attention does not have."""
    name = type(module).__name__
    if attention_mask is not None:
        raise CheckpointError(f"{name} makes a mask of its own")
    if not others.get("is_causal", getattr(module, "is_causal", True)):
        raise CheckpointError(f"{name} is not causal")
    unknown = sorted(key for key, value in others.items() if value is not None and key not in _WITHOUT_EFFECT)
    if unknown:
        raise CheckpointError(f"{name} wants {', '.join(unknown)} in its attention")
    if value.shape[-1] > key.shape[-1]:
        raise CheckpointError(f"{name} has values wider than its keys")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise CheckpointError(f"{name} does not know the number of its layer")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = AttentionCall(int(layer), query, key, value, scale, sliding_window, softcap)
    return _attend.get()(call), None


AttentionInterface.register(ATTENTION, _paged_attention)


@contextmanager
def _attending(attend: Callable[[AttentionCall], torch.Tensor]) -> Iterator[None]:
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


class TransformersForCausalLM(CausalLM):
    """A model of transformers, all of which one rank holds."""

    def __init__(self, model: PreTrainedModel, kv_shapes: Sequence[tuple[int, int]]) -> None:
        """`model`: with its weights, and `ATTENTION` as its attention. `kv_shapes`: KV heads and head_dim of each layer."""
        super().__init__()
        self.groups: ParallelGroups = SINGLE_RANK
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.kv_shapes = kv_shapes
        self.layer_groups = [0] * len(kv_shapes)
        self._decoder = model.base_model
        self._vocab_size: int = model.config.get_text_config().vocab_size
        # The head runs behind whatever stands for its decoder.
        self._given = _GivenStates()
        self._head = model
        setattr(model, model.base_model_prefix, self._given)

    @override
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[KVCache],
        metadata: Sequence[AttentionMetadata],
    ) -> torch.Tensor:
        with _attending(_PagedStep(kv_caches, [metadata[group] for group in self.layer_groups])):
            return self.run_decoder(input_ids, positions)

    def run_decoder(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden_size] of tokens, int64 [T], at these positions, with whatever attends."""
        output = self._decoder(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def run_with_own_attention(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The same of one sequence with transformers' attention, without a cache."""
        self._decoder.set_attn_implementation("eager")
        try:
            return self.run_decoder(input_ids, positions)
        finally:
            self._decoder.set_attn_implementation(ATTENTION)

    @override
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # The head's product is one of the model's dtype, and not of float32 as in Pagoda's own.
        self._given.states = hidden[None]
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = self._head(input_ids=ids, use_cache=False).logits[0]
        return logits[:, : self._vocab_size].float().contiguous()

    @property
    def hf_config(self) -> PretrainedConfig:
        return self._head.config


class _PagedStep:
    """The attention of a step: of each layer its cache, and the metadata of its group."""

    def __init__(self, kv_caches: list[KVCache], metadata: Sequence[AttentionMetadata]) -> None:
        self._kv_caches = kv_caches
        self._metadata = metadata

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        k_cache, v_cache = self._kv_caches[call.layer]
        metadata = self._metadata[call.layer]
        query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (call.query, call.key, call.value))
        value_size = value.shape[-1]
        if value_size < key.shape[-1]:
            value = nn.functional.pad(value, (0, key.shape[-1] - value_size))
        backend.active.write_kv(key, value, k_cache, v_cache, metadata.slot_mapping)
        attended = backend.active.paged_attention(
            query, k_cache, v_cache, metadata, call.scale, call.window, call.soft_cap
        )
        return attended[None, ..., :value_size]


class _GivenStates(nn.Module):
    """Stands for a decoder behind which a head runs; also for one within another (`model.decoder`)."""

    states: torch.Tensor

    @property
    def decoder(self) -> _GivenStates:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return _GivenOutput(self.states)


class _GivenOutput:
    """Has hidden states, and None for everything else that a decoder may give."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# ---- what a model does, before it has weights ---------------------------------------------------------------------------


def model_without_memory(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the device `meta`, in bfloat16, in which every kind of layer can run there."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION, dtype=torch.bfloat16, trust_remote_code=False
        )
    return model.eval()


def observed_attention(model: PreTrainedModel) -> list[AttentionCall]:
    """The call of attention that each layer makes, in the order of the layers.

    Raises `CheckpointError`: a layer calls none, or several, or attends in a way that there is not.
    """
    found: dict[int, AttentionCall] = {}
    num_layers = _num_layers(model.config)

    def note(call: AttentionCall) -> torch.Tensor:
        if call.layer in found:
            raise CheckpointError(f"layer {call.layer} attends more than once")
        found[call.layer] = call
        size = (1, call.query.shape[2], call.query.shape[1], call.value.shape[3])
        return call.query.new_empty(size)

    ids = torch.zeros((1, 2), dtype=torch.int64, device="meta")
    with torch.inference_mode(), _attending(note):
        model.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    missing = [layer for layer in range(num_layers) if layer not in found]
    if missing or len(found) != num_layers:
        raise CheckpointError(
            f"{len(missing)} of its {num_layers} layers do not attend through transformers' attention interface"
        )
    return [found[layer] for layer in range(num_layers)]


def _num_layers(config: PretrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


# ---- with weights -------------------------------------------------------------------------------------------------------


def load_transformers_model(
    config: PretrainedConfig,
    directory: str | Path | None,
    kv_shapes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> TransformersForCausalLM:
    """The model with the weights in `directory`, as transformers loads them; None: random ones.

    Raises `CheckpointError` for weights that cannot be loaded, and for a model that is another one with paged attention.
    """
    try:
        if directory is None:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                str(directory),
                config=config,
                attn_implementation=ATTENTION,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{directory}: transformers could not load the weights: {error}") from error
    model = model.to(device).eval().requires_grad_(False)
    loaded = TransformersForCausalLM(model, kv_shapes)
    check_against_itself(loaded)
    return loaded


@torch.inference_mode()
def check_against_itself(model: TransformersForCausalLM) -> None:
    """Raise `CheckpointError` where paged attention, in two steps, gives other hidden states than transformers' own in one.

    So a model whose positions, masks or biases do not come through the attention interface is refused, and not served wrongly.
    """
    config, device = model.hf_config.get_text_config(), model.device
    longest = getattr(config, "max_position_embeddings", None) or _CHECK_TOKENS
    count = max(1, min(_CHECK_TOKENS, longest))
    positions = torch.arange(count, device=device)
    ids = positions * 7 % config.vocab_size
    blocks = -(-count // 16)
    caches: list[KVCache] = [
        (torch.zeros(shape, dtype=model.dtype, device=device), torch.zeros(shape, dtype=model.dtype, device=device))
        for shape in ((1 + blocks, heads, 16, size) for heads, size in model.kv_shapes)
    ]
    split = -(-count * 2 // 3)
    parts = []
    for first, end in ((0, split), (split, count)):
        if first < end:
            metadata = AttentionMetadata(
                query_start_loc=torch.tensor([0, end - first], dtype=torch.int32, device=device),
                seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
                block_table=torch.arange(1, 1 + blocks, dtype=torch.int32, device=device)[None],
                slot_mapping=16 + positions[first:end],
                max_query_len=end - first,
                max_seq_len=end,
                num_decode_rows=int(end - first == 1),
            )
            parts.append(model.forward(ids[first:end], positions[first:end], caches, [metadata]))
    found = torch.cat(parts).float()
    expected = model.run_with_own_attention(ids, positions).float()
    distance = float((found - expected).norm() / expected.norm().clamp(min=1e-6))
    if not distance <= _CHECK_TOLERANCE[model.dtype]:
        raise CheckpointError(
            f"{type(model.hf_config).__name__}: with paged attention its hidden states are {distance:.2g} away from those of "
            "transformers' own attention, so model_impl=transformers cannot serve it"
        )
