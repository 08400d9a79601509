"""What each layer of a decoder is made of, as data. Imports neither torch nor transformers.

A family composes layers out of these records; sizes, packing, quantization, made-up checkpoints and the model itself follow
from them. Names are those that Llama has for its tensors: how a family's checkpoint spells them is `checkpoint_names`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pagoda.models.rope_config import RopeConfig
from pagoda.scheduling.kv_groups import FullAttention, KVSpec, LatentKV, RecurrentState, SharedKV, SlidingWindow

# What a gated MLP does with its two halves: see the operations of the same names in `pagoda_kernels.interface`.
Activation = Literal["silu", "gelu", "clamped_swiglu"]


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer as the model names it: `outputs` of `inputs`. `stays_float`: under any quantization."""

    name: str
    outputs: int
    inputs: int
    bias: bool = False
    stays_float: bool = False

    @property
    def num_parameters(self) -> int:
        """Weights, the bias included."""
        return self.outputs * self.inputs + self.outputs * self.bias


@dataclass(frozen=True, slots=True)
class VectorShape:
    """A tensor of one dimension: the weight of a norm, sinks, biases of a router."""

    name: str
    size: int

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return self.size


@dataclass(frozen=True, slots=True)
class ConvShape:
    """The weight of a convolution over time, of each channel by itself, over `size` tokens; stored as [channels, 1, size]."""

    name: str
    channels: int
    size: int

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return self.channels * self.size


TensorShape = LinearShape | VectorShape | ConvShape


@dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    """The norms of a model: RMSNorm, or LayerNorm without a bias.

    `float32_weight`: the product with the weight is rounded once, and not before it, too. `offset` is added to what is stored
    (Gemma stores weights around 0).
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    float32_weight: bool = False
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNorms:
    """Where a layer's norms stand, by the names of their weights; None: there is none."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are, in the order in which they run."""
        all_four = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in all_four if name is not None)


PRE_NORM = BlockNorms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
POST_NORM = BlockNorms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")
SANDWICH_NORM = BlockNorms(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention of one layer.

    `num_kv_heads` divides `num_heads`. `window`: a query sees itself and the `window - 1` tokens before it; None: all.
    `rope` of None: the layer knows no positions (NoPE). `scale`: factor of the scores. `soft_cap`: see
    `KernelBackend.paged_attention`. `sinks`: each head has a score of its own that takes part in the softmax and has no value.
    `qk_norm`: queries and keys are normalized, each head by itself or all of them together. `output_gate`: what a head gives
    is multiplied by the sigmoid of a gate of its own, which is projected behind its query. `value_norm`: each head of values
    is normalized, without a weight. `keys_are_values`: values are what keys are made of, before their norm. `kv_source`: the
    layer whose keys and values it reads; None: its own.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None
    window: int | None = None
    qk_norm: Literal["head", "width"] | None = None
    soft_cap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    output_gate: bool = False
    value_norm: bool = False
    keys_are_values: bool = False
    kv_source: int | None = None

    MODULE: ClassVar[str] = "self_attn"

    @property
    def rope_head_dim(self) -> int:
        """What `rope` sees of a head."""
        return self.head_dim

    @property
    def kv_spec(self) -> KVSpec:
        """What the layer keeps of a request's tokens."""
        if self.kv_source is not None:
            return SharedKV(self.kv_source)
        if self.window is None:
            return FullAttention(self.num_kv_heads, self.head_dim)
        return SlidingWindow(self.num_kv_heads, self.head_dim, self.window)

    @property
    def query_size(self) -> int:
        """Of all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Of all KV heads."""
        return self.num_kv_heads * self.head_dim

    def tensors(self, hidden_size: int) -> Iterator[TensorShape]:
        """Every tensor, in the order of a checkpoint."""
        yield LinearShape("q_proj", self.query_size * (1 + self.output_gate), hidden_size, self.qkv_bias)
        has_keys = self.kv_source is None
        if has_keys:
            yield LinearShape("k_proj", self.kv_size, hidden_size, self.qkv_bias)
        if has_keys and not self.keys_are_values:
            yield LinearShape("v_proj", self.kv_size, hidden_size, self.qkv_bias)
        yield LinearShape("o_proj", hidden_size, self.query_size, self.output_bias)
        if self.qk_norm is not None:
            by_head = self.qk_norm == "head"
            yield VectorShape("q_norm.weight", self.head_dim if by_head else self.query_size)
            if has_keys:
                yield VectorShape("k_norm.weight", self.head_dim if by_head else self.kv_size)
        if self.sinks:
            yield VectorShape("sinks", self.num_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention of one layer (DeepSeek-V2, 2024).

    Of each token the layer keeps a latent vector of `kv_rank` numbers, from which keys and values of all heads are made, and
    `rope_dim` rotated ones that the keys of all heads share. A head's query has `nope_dim` numbers for the first part of its
    key and `rope_dim` for the second; its values have `value_dim`. `query_rank`: queries are made from so many numbers, too;
    None: from the hidden state. `bias`: of the layers that read or write the stream. Norms of the latents have `norm_eps`.
    """

    num_heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: RopeConfig
    bias: bool = False
    norm_eps: float = 1e-6

    MODULE: ClassVar[str] = "self_attn"
    # As attention sees it, with what keys are made by multiplied into the queries: one KV head for all.
    num_kv_heads: ClassVar[int] = 1
    window: ClassVar[None] = None

    @property
    def head_dim(self) -> int:
        """Numbers that are kept of a token."""
        return self.kv_rank + self.rope_dim

    @property
    def rope_head_dim(self) -> int:
        """See `AttentionConfig`."""
        return self.rope_dim

    @property
    def kv_spec(self) -> KVSpec:
        """See `AttentionConfig`."""
        return LatentKV(self.kv_rank, self.rope_dim)

    def tensors(self, hidden_size: int) -> Iterator[TensorShape]:
        """Every tensor, in the order of a checkpoint."""
        query_size = self.num_heads * (self.nope_dim + self.rope_dim)
        if self.query_rank is None:
            yield LinearShape("q_proj", query_size, hidden_size)
        else:
            yield LinearShape("q_a_proj", self.query_rank, hidden_size, self.bias)
            yield VectorShape("q_a_layernorm.weight", self.query_rank)
            yield LinearShape("q_b_proj", query_size, self.query_rank)
        yield LinearShape("kv_a_proj_with_mqa", self.head_dim, hidden_size, self.bias)
        yield VectorShape("kv_a_layernorm.weight", self.kv_rank)
        # One half of it is multiplied the other way round, for which no quantized form is made.
        yield LinearShape(
            "kv_b_proj", self.num_heads * (self.nope_dim + self.value_dim), self.kv_rank, stays_float=True
        )
        yield LinearShape("o_proj", hidden_size, self.num_heads * self.value_dim, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetConfig:
    """A gated delta net (Yang et al., 2024): a recurrent layer, of which each value head keeps a matrix
    [head_dim, value_dim].

    `num_kv_heads` key heads, each of which `num_heads` / `num_kv_heads` value heads read. Queries, keys and values go through
    a causal convolution over `conv_size` tokens. `interleaved`: the projections of a checkpoint are key head by key head; else
    each is a layer of its own: see `DeltaNetWeights`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    conv_size: int
    interleaved: bool

    MODULE: ClassVar[str] = "linear_attn"
    # A recurrent layer knows the order of tokens.
    rope: ClassVar[None] = None
    window: ClassVar[None] = None

    @property
    def rope_head_dim(self) -> int:
        """See `AttentionConfig`."""
        return self.head_dim

    @property
    def kv_spec(self) -> KVSpec:
        """See `AttentionConfig`."""
        return RecurrentState(self.num_kv_heads, self.num_heads, self.head_dim, self.value_dim, self.conv_size - 1)

    @property
    def key_size(self) -> int:
        """Of all key heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Of all value heads."""
        return self.num_heads * self.value_dim

    def tensors(self, hidden_size: int) -> Iterator[TensorShape]:
        """Every tensor, in the order of a checkpoint. Gates of the state stay floats: they are small, and add up."""
        yield VectorShape("dt_bias", self.num_heads)
        yield VectorShape("A_log", self.num_heads)
        yield ConvShape("conv1d.weight", 2 * self.key_size + self.value_size, self.conv_size)
        if self.interleaved:
            yield LinearShape("in_proj_qkvz", 2 * (self.key_size + self.value_size), hidden_size)
            yield LinearShape("in_proj_ba", 2 * self.num_heads, hidden_size, stays_float=True)
        else:
            yield LinearShape("in_proj_q", self.key_size, hidden_size)
            yield LinearShape("in_proj_k", self.key_size, hidden_size)
            yield LinearShape("in_proj_v", self.value_size, hidden_size)
            yield LinearShape("in_proj_z", self.value_size, hidden_size)
            yield LinearShape("in_proj_b", self.num_heads, hidden_size, stays_float=True)
            yield LinearShape("in_proj_a", self.num_heads, hidden_size, stays_float=True)
        yield VectorShape("norm.weight", self.value_dim)
        yield LinearShape("out_proj", hidden_size, self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """`down(activation(gate(x)) * up(x))` with `size` units."""

    size: int
    activation: Activation = "silu"
    bias: bool = False

    def tensors(self, hidden_size: int) -> Iterator[TensorShape]:
        """Every tensor, in the order of a checkpoint."""
        yield LinearShape("gate_proj", self.size, hidden_size, self.bias)
        yield LinearShape("up_proj", self.size, hidden_size, self.bias)
        yield LinearShape("down_proj", hidden_size, self.size, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a token's experts are chosen and weighted, from one logit an expert.

    `scoring`: softmax over all experts, sigmoid, or softmax over the chosen ones alone. `normalize`: the weights of the chosen
    are divided by their sum. `scaling`: factor of the weights. `bias`: the logits have one. `correction_bias`: added to scores
    where experts are chosen, not where they are weighted (DeepSeek V3). `num_groups`, `top_groups`: only experts of the
    best groups are chosen, groups being compared by the sum of their `group_members` best. `scaled_input`: the router sees its
    input normalized and scaled, and weights are multiplied by a number of each expert (Gemma 4).
    """

    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    normalize: bool = False
    scaling: float = 1.0
    bias: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_members: int = 2
    scaled_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Mixture of experts: each token goes to `top_k` of `num_experts` gated MLPs of `size` units, and to the shared one.

    `shared_size`: units of the expert that every token goes to; 0: there is none. `shared_gate`: its output is weighted by
    the sigmoid of a logit. `bias`: the experts have biases.
    """

    num_experts: int
    top_k: int
    size: int
    router: RouterConfig
    activation: Activation = "silu"
    bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    router_name: str = "gate"
    shared_name: str = "shared_expert"

    @property
    def expert(self) -> DenseMLP:
        """Each expert as a layer of its own."""
        return DenseMLP(size=self.size, activation=self.activation, bias=self.bias)

    @property
    def shared(self) -> DenseMLP | None:
        """The expert of every token."""
        return DenseMLP(size=self.shared_size, activation=self.activation) if self.shared_size else None

    def tensors(self, hidden_size: int) -> Iterator[TensorShape]:
        """Every tensor, in the order of a checkpoint."""
        yield LinearShape(self.router_name, self.num_experts, hidden_size, self.router.bias, stays_float=True)
        if self.router.correction_bias:
            yield VectorShape(f"{self.router_name}.e_score_correction_bias", self.num_experts)
        if self.router.scaled_input:
            yield VectorShape("router.scale", hidden_size)
            yield VectorShape("router.per_expert_scale", self.num_experts)
        for expert in range(self.num_experts):
            yield from within(f"experts.{expert}.", self.expert.tensors(hidden_size))
        if self.shared is not None:
            yield from within(f"{self.shared_name}.", self.shared.tensors(hidden_size))
            if self.shared_gate:
                yield LinearShape(f"{self.shared_name}_gate", 1, hidden_size, stays_float=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerInputs:
    """What each layer gets of a token beside the stream: `size` numbers, from its id and from its embedding."""

    vocab_size: int
    size: int

    def tensors(self, hidden_size: int, num_layers: int) -> Iterator[TensorShape]:
        """Every tensor, but the layers' own."""
        yield LinearShape("embed_tokens_per_layer", self.vocab_size, num_layers * self.size)
        yield LinearShape("per_layer_model_projection", num_layers * self.size, hidden_size)
        yield VectorShape("per_layer_projection_norm.weight", self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """A layer: attention and MLP, each added to the residual stream.

    `parallel`: both read the stream behind one norm, and neither sees the other's output. `residual_multiplier`: factor of
    what is added. `per_layer_input`: numbers of a token that this layer alone gets, and adds in its own way; 0: none.
    `output_scale`: the stream behind the layer is multiplied by a number of the checkpoint. `experts`: a mixture beside the
    MLP, with norms of its own, `EXPERT_NORMS` (Gemma 4).
    """

    EXPERT_NORMS: ClassVar[tuple[str, ...]] = (
        "post_feedforward_layernorm_1",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_2",
    )

    attention: AttentionConfig | MLAConfig | DeltaNetConfig
    mlp: DenseMLP | MoE
    norms: BlockNorms = PRE_NORM
    parallel: bool = False
    residual_multiplier: float = 1.0
    per_layer_input: int = 0
    output_scale: bool = False
    experts: MoE | None = None

    @property
    def kv_spec(self) -> KVSpec:
        """What the layer keeps of a request's tokens."""
        return self.attention.kv_spec

    @property
    def mixture(self) -> MoE | None:
        """Its mixture of experts, in place of the MLP or beside it."""
        return self.mlp if isinstance(self.mlp, MoE) else self.experts

    def tensors(self, hidden_size: int) -> Iterator[TensorShape]:
        """Every tensor, in the order of a checkpoint; named from the layer on."""
        norms = self.norms
        if norms.before_attention is not None:
            yield VectorShape(f"{norms.before_attention}.weight", hidden_size)
        yield from within(f"{self.attention.MODULE}.", self.attention.tensors(hidden_size))
        for name in (norms.after_attention, norms.before_mlp):
            if name is not None:
                yield VectorShape(f"{name}.weight", hidden_size)
        yield from within("mlp.", self.mlp.tensors(hidden_size))
        if norms.after_mlp is not None:
            yield VectorShape(f"{norms.after_mlp}.weight", hidden_size)
        if self.experts is not None:
            yield from within("moe.", self.experts.tensors(hidden_size))
            for name in self.EXPERT_NORMS:
                yield VectorShape(f"{name}.weight", hidden_size)
        if self.per_layer_input:
            yield LinearShape("per_layer_input_gate", self.per_layer_input, hidden_size)
            yield LinearShape("per_layer_projection", hidden_size, self.per_layer_input)
            yield VectorShape("post_per_layer_input_norm.weight", hidden_size)
        if self.output_scale:
            yield VectorShape("layer_scalar", 1)


def within(prefix: str, tensors: Iterator[TensorShape]) -> Iterator[TensorShape]:
    """The same tensors as part of a larger module."""
    for tensor in tensors:
        yield replace(tensor, name=f"{prefix}{tensor.name}")
