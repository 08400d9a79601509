"""The EAGLE-3 head (Li et al., 2025): one decoder layer that drafts from hidden states of the model.

hidden states of three layers of the model at position p ─ fc ─▶ features [H] ─ hidden_norm ──╮
                                      token at p + 1 ─ embed ─ input_layernorm ─▶ concat [2H] ─▶ attention ─▶ MLP
                                                                                        │
         features of p + 1, where the model has not been yet ◀── before the last norm ──┤
                                                     token at p + 2 ◀── norm, lm_head ──╯
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pagoda.errors import CheckpointError
from pagoda.models.causal_lm import KVCache
from pagoda.models.checkpoint_files import shown
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.eagle3_config import Eagle3Config
from pagoda.models.layer_config import AttentionConfig, DenseMLP
from pagoda.models.layers.attention import SelfAttention
from pagoda.models.layers.builder import LayerBuilder
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.mlp import GatedMLP
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.layers.rope import build_rotary_embedding
from pagoda.models.loading.checkpoint import FLOAT_TYPES, StoredTensors, stored_tensors, with_model_names
from pagoda.models.loading.packed import pack_linear
from pagoda.models.loading.stored_tensor import StoredTensor
from pagoda.models.sharding import ModelShard, Shard
from pagoda.models.weight_files import listed, weight_files
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import SINGLE_RANK
from pagoda_kernels.types import AttentionMetadata

logger = logging.getLogger(__name__)

_EMBEDDING, _HEAD, _OFFSETS = "embed_tokens.weight", "lm_head.weight", "d2t"
# What says which tokens of the vocabulary are among the head's; `d2t` says the same.
_REDUNDANT = "t2d"


class Eagle3Layer(nn.Module):
    """A decoder layer whose attention reads a token and features side by side."""

    def __init__(self, config: Eagle3Config, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        shape, hidden = config.layer, config.layer.hidden_size
        (layer,), (shard,) = shape.layers, ModelShard.of(shape, SINGLE_RANK.layout, 0).layer_shards
        build = LayerBuilder(norm=shape.norm, group=SINGLE_RANK.tp_group, dtype=dtype, device=device)
        assert isinstance(layer.attention, AttentionConfig)
        assert isinstance(layer.mlp, DenseMLP)

        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = build.rms_norm(hidden)
        self.hidden_norm = build.rms_norm(hidden)
        self.self_attn = SelfAttention(layer.attention, shard, hidden, build, "", input_size=2 * hidden)
        self.post_attention_layernorm = build.rms_norm(hidden)
        self.mlp = GatedMLP(layer.mlp, shard.units, hidden, build, "")

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {
            **self.input_layernorm.weight_targets(f"{prefix}input_layernorm."),
            **self.hidden_norm.weight_targets(f"{prefix}hidden_norm."),
            **self.self_attn.weight_targets(f"{prefix}self_attn."),
            **self.post_attention_layernorm.weight_targets(f"{prefix}post_attention_layernorm."),
            **self.mlp.weight_targets(f"{prefix}mlp."),
        }

    def forward(
        self,
        embedded: torch.Tensor,
        features: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [T, hidden_size], to the layer's output and the residual stream under it."""
        normed = self.hidden_norm(features)[0]
        residual = normed if self.norm_before_residual else features
        hidden = torch.cat((self.input_layernorm(embedded)[0], normed), dim=-1)
        hidden = self.self_attn(hidden, rotary, kv_cache, metadata)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Eagle3Head(nn.Module):
    """The head for `target`, whole on one rank; shares the embedding and the language model head that its checkpoint lacks.

    Its weights are loaded by `load_eagle3_head`.
    """

    def __init__(self, config: Eagle3Config, target: DecoderForCausalLM) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = target.dtype, target.device
        self.aux_layers = config.layers_of(target.config.num_layers)
        shape, dtype, device = config.layer, target.dtype, target.device
        hidden, states = shape.hidden_size, len(self.aux_layers) * config.target_hidden_size
        self.fc = Linear(Shard.whole(states), {"fc": Shard.whole(hidden)}, bias=False, dtype=dtype, device=device)
        self.input_norm = RMSNorm(states, shape.norm, dtype=dtype, device=device) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(
            RMSNorm(config.target_hidden_size, shape.norm, dtype=dtype, device=device)
            for _ in self.aux_layers
            if config.fc_norm
        )
        self.midlayer = Eagle3Layer(config, dtype=dtype, device=device)
        self.norm = RMSNorm(hidden, shape.norm, dtype=dtype, device=device)
        self.lm_head = Linear(
            Shard.whole(hidden),
            {"lm_head": Shard.whole(config.draft_vocab_size)},
            bias=False,
            dtype=dtype,
            device=device,
            out_dtype=torch.float32,
        )
        self.rotary_embedding = build_rotary_embedding(shape.layers[0].attention.rope, shape.head_dim, target.device)
        self._norm_output = config.norm_output
        self._vocab_size = shape.vocab_size
        # Set when the head is loaded. Token ids int64 [T] to [T, hidden_size]; hidden states to logits over the draft
        # vocabulary, or over all of it where the model's own head gives them; the ids of the draft vocabulary's tokens.
        self.embed: Callable[[torch.Tensor], torch.Tensor]
        self.predict: Callable[[torch.Tensor], torch.Tensor]
        self.token_ids: torch.Tensor | None = None

    def weight_targets(self) -> dict[str, WeightTarget]:
        """The tensors that every checkpoint of such a head has, but for the language model head's."""
        targets = {
            **self.fc.weight_targets(""),
            **self.midlayer.weight_targets("midlayer."),
            **self.norm.weight_targets("norm."),
        }
        if self.input_norm is not None:
            targets.update(self.input_norm.weight_targets("input_norm."))
        for index, norm in enumerate(self.fc_norm):
            assert isinstance(norm, RMSNorm)
            targets.update(norm.weight_targets(f"fc_norm.{index}."))
        return targets

    def features_of(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states of the model, [T, 3 * target_hidden_size] as in `AuxHiddenStates`, to features [T, hidden_size]."""
        if self.input_norm is not None:
            states = self.input_norm(states)[0]
        if len(self.fc_norm):
            parts = states.chunk(len(self.fc_norm), dim=-1)
            states = torch.cat(
                [norm(part.contiguous())[0] for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1
            )
        features: torch.Tensor = self.fc(states)
        return features

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over T tokens.

        `positions` int64 [T], and `features` [T, hidden_size] of these positions; `token_ids` int64 [T] are those behind them.
        `kv_cache` and `metadata` are for the positions, as in `DecoderForCausalLM.forward`.

        Returns what `compute_logits` takes, [T, hidden_size], and the features that stand for those of the next positions
        until the model has computed these.
        """
        hidden, residual = self.midlayer(
            self.embed(token_ids), features, self.rotary_embedding(positions), kv_cache, metadata
        )
        normed, residual = self.norm(hidden, residual)
        return normed, normed if self._norm_output else residual

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] to float32 [N, vocab_size]; -inf for tokens outside of the draft vocabulary."""
        logits = self.predict(hidden)
        if self.token_ids is None:
            return logits
        return logits.new_full((len(logits), self._vocab_size), -torch.inf).index_copy_(1, self.token_ids, logits)

    def best_token(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the token with the greatest logit of `compute_logits`, int64 [N], and that logit."""
        best, chosen = self.predict(hidden).max(dim=-1)
        return chosen if self.token_ids is None else self.token_ids.index_select(0, chosen), best


def load_eagle3_head(
    config: Eagle3Config,
    directory: str | Path,
    target: DecoderForCausalLM,
    target_directory: str | Path | None,
    *,
    packed: bool,
) -> Eagle3Head:
    """The head in `directory`, ready to draft for `target`, which is loaded; `packed`: in the form of the CPU's kernels.

    Where the checkpoint has no embedding, or no language model head, those of `target` are shared; with tensor parallelism,
    where a rank has a part of them only, they are read from `target_directory`. Raises `CheckpointError` for tensors that
    are missing or do not fit config.json.
    """
    head = Eagle3Head(config, target)
    stored = _stored(Path(directory))
    targets = head.weight_targets()
    hidden = config.layer.hidden_size
    own_head = config.tie_word_embeddings and _EMBEDDING in stored and _HEAD not in stored
    if own_head:
        stored[_HEAD] = stored[_EMBEDDING]
    if _HEAD in stored:
        targets.update(head.lm_head.weight_targets(""))
    missing = [name for name in targets if name not in stored]
    if missing:
        raise CheckpointError(f"{directory} holds no whole EAGLE-3 head: it lacks {listed(missing)}")
    unknown = [name for name in stored if name not in {*targets, _EMBEDDING, _OFFSETS, _REDUNDANT}]
    if unknown:
        logger.warning("%d tensors in %s are not used: %s", len(unknown), directory, listed(unknown))
    source = StoredTensors(stored)
    for name, weight in targets.items():
        _check(stored[name], weight.full_shape, FLOAT_TYPES)
        weight.destination.copy_(source.read(name))
    head.token_ids = _token_ids(config, stored, source, target.device)
    head.embed = _embedding(head, stored, source, target, target_directory)
    head.predict = head.lm_head if _HEAD in stored else _shared_head(head, target, target_directory)
    if _HEAD not in stored:
        del head.lm_head
    if packed:
        for layer in _linears(head):
            pack_linear(layer)
    logger.info(
        "EAGLE-3 head in %s: a layer of %d, %d of %d tokens, reads the layers %s",
        directory,
        hidden,
        config.draft_vocab_size,
        config.layer.vocab_size,
        ", ".join(map(str, head.aux_layers)),
    )
    return head.eval()


def _stored(directory: Path) -> dict[str, StoredTensor]:
    """The tensors by the names of SGLang's form: `speculators` numbers the layer instead of naming it."""
    stored = {}
    for name, tensor in stored_tensors(weight_files(directory)).items():
        short = name.removeprefix("model.")
        stored[f"midlayer.{short.removeprefix('layers.0.')}" if short.startswith("layers.0.") else short] = tensor
    return stored


def _check(tensor: StoredTensor, shape: tuple[int, ...], types: tuple[str, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.file} has shape {shown(list(tensor.shape))}, config.json makes it {list(shape)}"
        )
    if tensor.dtype not in types:
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.file} is of type {tensor.dtype}; supported: {', '.join(types)}"
        )


def _token_ids(
    config: Eagle3Config, stored: dict[str, StoredTensor], source: StoredTensors, device: torch.device
) -> torch.Tensor | None:
    """The vocabulary's id of each token of the draft vocabulary; None where they are the same."""
    if _OFFSETS not in stored:
        if config.draft_vocab_size < config.layer.vocab_size:
            raise CheckpointError(
                f"the EAGLE-3 head has {config.draft_vocab_size} of {config.layer.vocab_size} tokens, and no tensor d2t that "
                "says which"
            )
        return None
    _check(stored[_OFFSETS], (config.draft_vocab_size,), ("I64", "I32"))
    ids = source.read(_OFFSETS).long() + torch.arange(config.draft_vocab_size)
    if not bool(((ids >= 0) & (ids < config.layer.vocab_size)).all()) or len(set(ids.tolist())) != len(ids):
        raise CheckpointError(f"tensor d2t in {stored[_OFFSETS].file} does not map tokens to others of the vocabulary")
    if config.draft_vocab_size == config.layer.vocab_size and torch.equal(ids, torch.arange(len(ids))):
        return None
    return ids.to(device)


def _embedding(
    head: Eagle3Head,
    stored: dict[str, StoredTensor],
    source: StoredTensors,
    target: DecoderForCausalLM,
    target_directory: str | Path | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    shape = head.config.layer.vocab_size, head.config.layer.hidden_size
    if _EMBEDDING in stored:
        _check(stored[_EMBEDDING], shape, FLOAT_TYPES)
        weight = source.read(_EMBEDDING).to(head.device, head.dtype, copy=True)
    else:
        _check_can_share(head, target, "embedding")
        assert target.embed_tokens is not None
        if target.groups.tp_group.size == 1:
            return target.embed_tokens.forward
        weight = _tensor_of_target(target, target_directory, "model.embed_tokens.weight")
    return lambda token_ids: F.embedding(token_ids, weight)


def _shared_head(
    head: Eagle3Head, target: DecoderForCausalLM, target_directory: str | Path | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The language model head of `target`; over the head's own tokens where these are fewer."""
    _check_can_share(head, target, "language model head")
    token_ids, head.token_ids = head.token_ids, None
    assert token_ids is None, "a head with a draft vocabulary of its own has a language model head"
    assert target.lm_head is not None
    if target.groups.tp_group.size == 1:
        return lambda hidden: target.lm_head(hidden)[:, : target.config.vocab_size]  # type: ignore[misc]
    name = "model.embed_tokens.weight" if target.config.tie_word_embeddings else "lm_head.weight"
    weight = _tensor_of_target(target, target_directory, name)
    return lambda hidden: F.linear(hidden, weight).float()


def _check_can_share(head: Eagle3Head, target: DecoderForCausalLM, what: str) -> None:
    if head.config.layer.hidden_size != target.config.hidden_size:
        raise CheckpointError(
            f"the EAGLE-3 head has no {what}, and cannot share that of the model: its hidden_size is "
            f"{head.config.layer.hidden_size}, the model's {target.config.hidden_size}"
        )
    if what == "language model head" and head.config.draft_vocab_size != target.config.vocab_size:
        raise CheckpointError(
            f"the EAGLE-3 head has no {what}, and its draft_vocab_size is {head.config.draft_vocab_size}: it must have one"
        )


def _tensor_of_target(target: DecoderForCausalLM, directory: str | Path | None, name: str) -> torch.Tensor:
    if directory is None:
        raise CheckpointError(
            f"the EAGLE-3 head lacks a tensor {name}, and the model has no checkpoint to read it from"
        )
    stored = with_model_names(stored_tensors(weight_files(Path(directory))), {name, "lm_head.weight"})
    name = name if name in stored else "lm_head.weight"  # a tied weight may have either name
    if name not in stored:
        raise CheckpointError(f"{directory} has no tensor {name} that the EAGLE-3 head could share")
    return StoredTensors(stored).read(name).to(target.device, target.dtype, copy=True)


def _linears(head: Eagle3Head) -> Iterator[Linear]:
    return (module for module in head.modules() if isinstance(module, Linear))
