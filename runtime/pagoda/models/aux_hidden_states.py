"""Hidden states of some layers, kept for a speculation head (EAGLE-3) that drafts from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pagoda.models.decoder import DecoderForCausalLM


class AuxHiddenStates:
    """The residual stream before some layers of a model, of the tokens of its last step.

    `tensor`: `[max_num_tokens, len(layers) * hidden_size]`, in the model's dtype; a step of T tokens writes the first T rows,
    in the order of its batch. Layer i means what goes into it: 0 the embeddings, the number of layers what comes out of the
    last one, before the final norm.

    A stack that runs as one operator writes them itself; hooks do where layers are called one by one.
    """

    def __init__(self, model: DecoderForCausalLM, layers: Sequence[int], max_num_tokens: int) -> None:
        """Of a whole model, loaded and fused; layers within 0 to the model's number of them."""
        size = model.config.hidden_size
        self.tensor = torch.zeros((max_num_tokens, len(layers) * size), dtype=model.dtype, device=model.device)
        if model.fused_layers is not None:
            model.fused_layers.capture(layers, self.tensor)
            return
        assert model.norm is not None, "a model of several pipeline stages has its layers elsewhere"
        readers = [*model.layers, model.norm]
        for place, layer in enumerate(layers):
            columns = self.tensor[:, place * size : (place + 1) * size]
            readers[layer].register_forward_pre_hook(_writer_to(columns))


def _writer_to(columns: torch.Tensor) -> Any:
    """A hook of a layer, or norm, that is called with the output of the one below and the residual stream under it."""

    def write(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        del module
        hidden, residual = inputs[0], inputs[1]
        rows = columns[: len(hidden)]
        if residual is None:
            rows.copy_(hidden)
        else:
            torch.add(hidden, residual, out=rows)

    return write
