"""Linear layers packed for the CPU's kernels, once their weights are loaded."""

from __future__ import annotations

import torch
from torch import nn

from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.layers.embedding import TokenEmbedding
from pagoda.models.layers.linear import UNQUANTIZED, Linear, LinearMethod
from pagoda.models.weights import WeightTarget
from pagoda_kernels.linear import PackedWeight, pack, packed_linear, packed_rows

# How much of a weight is looked at together when its float32 values are tested for being bfloat16 ones.
_TESTED_ELEMENTS = 1 << 20


class PackedLinearMethod(LinearMethod):
    """A loaded weight, packed: each layer that is packed has an instance of its own."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Not possible: layers are created unpacked, and packed when they are loaded."""
        raise NotImplementedError("a packed layer is made from a loaded one")

    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, WeightTarget]:
        """None: nothing can be loaded into a packed weight."""
        return {}

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """One matrix product for all parts."""
        return packed_linear(x.contiguous(), self.weight, layer.bias)


class PackedEmbedding(TokenEmbedding):
    """The vectors of a vocabulary, looked up in the packed weight of the head that shares them."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # no weight of its own
        self.packed = packed
        self.dtype = dtype

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """None: nothing can be loaded into a packed weight."""
        return {}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] to [T, hidden_size]."""
        return packed_rows(self.packed, token_ids, self.dtype)


def pack_linear_layers(model: DecoderForCausalLM) -> None:
    """Pack every unquantized linear layer of a loaded model, one after the other; the weights they had are given back.

    float32 weights that bfloat16 holds exactly, as those of most checkpoints, are stored so: products with float32 inputs are
    the same to the last bit, from half of the memory. Models in float16 stay as they are: there are no kernels for them.
    """
    if model.dtype == torch.float16:
        return
    embedding, head = model.embed_tokens, model.lm_head
    shares_weight = (
        type(embedding) is TokenEmbedding
        and head is not None
        and head.method is UNQUANTIZED
        and embedding.weight is head.weight
    )
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.method is UNQUANTIZED:
            if layer is head and not shares_weight and embedding is not None and embedding.weight is head.weight:
                continue  # spread over ranks: the embedding needs its own rows
            layer.method = PackedLinearMethod(pack(_narrowest(layer.weight.data)))
            del layer.weight
    if shares_weight:
        assert head is not None
        assert isinstance(head.method, PackedLinearMethod)
        model.embed_tokens = PackedEmbedding(head.method.weight, model.dtype)


def _narrowest(weight: torch.Tensor) -> torch.Tensor:
    """The weight in bfloat16 if that changes no value, else as it is."""
    if weight.dtype != torch.float32:
        return weight
    bits = weight.view(torch.int32).flatten()
    if any((part & 0xFFFF).any() for part in torch.split(bits, _TESTED_ELEMENTS)):
        return weight
    return weight.bfloat16()
