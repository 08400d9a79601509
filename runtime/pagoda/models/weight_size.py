"""How much memory a model's weights will take, before any of them is read."""

from __future__ import annotations

import math

from pagoda.models.config import ModelConfig
from pagoda.models.layer_config import LinearShape
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
    for linear in [*config.linears(), LinearShape("lm_head", *head)]:
        scheme, is_head = None, linear.name == "lm_head"
        if quantization is not None and not linear.stays_float:
            scheme = quantization.scheme_of(config.names.stored_layer(linear.name))
        if quantization is not None and quantization.method == "gguf" and is_head and is_tied:
            scheme = quantization.scheme_of("model.embed_tokens")
        elif quantization is not None and quantization.method != "gguf" and is_head:
            scheme = HEAD if is_tied or scheme is None else scheme
        size = linear.outputs * linear.inputs
        num_linear += size
        num_bytes += size * linear_bytes if scheme is None else _quantized_bytes(scheme, linear.outputs, linear.inputs)
    if not is_tied:
        num_linear += math.prod(head)
        num_bytes += math.prod(head) * min(element_bytes, ELEMENT_BYTES[config.dtype])
    return num_bytes + (config.num_parameters() - num_linear) * element_bytes


def _quantized_bytes(scheme: WeightScheme, outputs: int, inputs: int) -> int:
    """Values, a float32 scale for each group, and a min like it, or a zero of one byte where it is not in the middle.

    In two levels: a byte for each group, two for each block, and as much for a min.
    """
    has_zeros = scheme.has_zeros or (scheme.layout == "float" and scheme.bits == 4)
    group_bytes: float = 8 if scheme.has_mins else 5 if has_zeros else 4
    if scheme.block_groups:
        group_bytes = (1 + 2 / scheme.block_groups) * (2 if scheme.has_mins else 1)
    return outputs * inputs * scheme.bits // 8 + outputs * int(scheme.num_groups(inputs) * group_bytes)
