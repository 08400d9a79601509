"""How much memory a model's weights will take, before any of them is read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pagoda.models.config import ModelConfig
from pagoda.models.quantization.schemes import HEAD, QuantizationConfig, WeightScheme

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def expected_weight_bytes(
    config: ModelConfig, dtype: str, quantization: QuantizationConfig | None = None, *, packed: bool
) -> int:
    """Bytes of all weights in a model that runs in `dtype`, those of all ranks together.

    `packed`: whether linear layers are packed for the CPU's compiled kernels, which keeps float32 weights in two bytes where
    the checkpoint has them so. What its tensors are is taken from config.json; padding of layers is left out.
    """
    element_bytes, is_tied = ELEMENT_BYTES[dtype], config.tie_word_embeddings
    linear_bytes = 2 if packed and "bfloat16" in (config.dtype, dtype) else element_bytes
    head = config.vocab_size, config.hidden_size
    num_linear = num_bytes = 0
    for name, outputs, inputs in [*_linear_layers(config), ("lm_head", *head)]:
        scheme = None if quantization is None else quantization.scheme_of(name)
        if quantization is not None and name == "lm_head":
            scheme = HEAD if is_tied or scheme is None else scheme
        num_linear += outputs * inputs
        num_bytes += outputs * inputs * linear_bytes if scheme is None else _quantized_bytes(scheme, outputs, inputs)
    if not is_tied:
        num_linear += math.prod(head)
        num_bytes += math.prod(head) * min(element_bytes, ELEMENT_BYTES[config.dtype])
    return num_bytes + (config.num_parameters() - num_linear) * element_bytes


def _linear_layers(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every linear layer but the head."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for layer in range(config.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        yield f"{attention}q_proj", queries, hidden
        yield f"{attention}k_proj", keys, hidden
        yield f"{attention}v_proj", keys, hidden
        yield f"{attention}o_proj", hidden, queries
        yield f"{mlp}gate_proj", intermediate, hidden
        yield f"{mlp}up_proj", intermediate, hidden
        yield f"{mlp}down_proj", hidden, intermediate


def _quantized_bytes(scheme: WeightScheme, outputs: int, inputs: int) -> int:
    """Values, a float32 scale for each group, and a zero of one byte where it is not in the middle."""
    has_zeros = scheme.has_zeros or (scheme.layout == "float" and scheme.bits == 4)
    return outputs * inputs * scheme.bits // 8 + outputs * scheme.num_groups(inputs) * (5 if has_zeros else 4)
