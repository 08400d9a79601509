"""How a family's checkpoints name and lay out the tensors that the model has by its own names.

The model names every projection by itself (`q_proj`, `experts.3.gate_proj`). A checkpoint may call it something else, keep
several of them as rows of one tensor, or stack those of all experts:

    model.layers.0.self_attn.qkv_proj.weight    q_proj │ k_proj │ v_proj     rows after each other     Phi-3
    model.layers.0.mlp.experts.gate_up_proj     [experts, inputs, 2 * outputs], gate and up in turn    gpt-oss

Each of the model's tensors is then a part of a stored one, which is all that readers need to know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class TensorPart:
    """The part of a stored tensor that one of the model's tensors is.

    `expert`: its index in the first dimension, which the part does not have; None: the tensor is no stack. `transposed`: the
    last two dimensions are the other way round. `start`, `length` and `step`: elements of dimension `dim` of what is left.
    """

    expert: int | None = None
    transposed: bool = False
    dim: int = 0
    start: int = 0
    length: int | None = None
    step: int = 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part of a tensor of shape `stored`."""
        shape = list(stored if self.expert is None else stored[1:])
        if self.transposed:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        if self.length is not None and self.dim < len(shape):
            shape[self.dim] = self.length
        return tuple(shape)

    def index(self, part: tuple[slice, ...], stored: tuple[int, ...]) -> tuple[slice, ...]:
        """Where elements `part` of this part are in the stored tensor of shape `stored`; steps are left to `pick`."""
        shape = self.shape(stored)
        slices = [*part, *(slice(None),) * (len(shape) - len(part))]
        bounded = [slice(*each.indices(size)[:2]) for each, size in zip(slices, shape, strict=True)]
        if self.length is not None:
            own = bounded[self.dim]
            last = self.start + (own.stop - 1) * self.step + 1
            bounded[self.dim] = slice(self.start + own.start * self.step, max(last, self.start))
        if self.transposed:
            bounded[-1], bounded[-2] = bounded[-2], bounded[-1]
        return tuple(bounded) if self.expert is None else (slice(self.expert, self.expert + 1), *bounded)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedExperts:
    """A tensor `experts.<name>` that has those of all experts, one after the other in its first dimension.

    `members`: the layers of each expert whose outputs it has, after each other, or `interleaved`: in turn. `transposed`:
    float weights are `[inputs, outputs]`.
    """

    name: str
    members: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False

    # What follows the name in a checkpoint, and what the tensor is to a layer of its own.
    KINDS: ClassVar[dict[str, str]] = {"": "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}

    def parts(self, suffix: str, shape: tuple[int, ...]) -> Iterator[tuple[str, TensorPart]]:
        """Names from `experts.` on, and parts, of the tensor of `shape` whose name ends with `suffix`."""
        kind = self.KINDS[suffix]
        transposed = self.transposed and kind == "weight"
        outputs = shape[-1] if transposed else shape[1]
        each = outputs // len(self.members)
        for expert in range(shape[0]):
            for place, member in enumerate(self.members):
                start, step = (place, len(self.members)) if self.interleaved else (place * each, 1)
                yield (
                    f"{expert}.{member}.{kind}",
                    TensorPart(expert=expert, transposed=transposed, start=start, length=each, step=step),
                )


STACKED_EXPERTS = (
    StackedExperts(name="gate_up_proj", members=("gate_proj", "up_proj")),
    StackedExperts(name="down_proj", members=("down_proj",)),
)
"""As transformers 5 keeps experts itself, and writes those of families that it has no older form for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointNames:
    """`renames`: regular expressions for stored names, and what the model calls what they match. `fused`: the last part of a
    layer's name, and the layers whose outputs follow each other in it. `stacked`: tensors of all experts. `ignored`: regular
    expressions for the stored names of what is not the language model's."""

    renames: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    stacked: tuple[StackedExperts, ...] = ()
    ignored: tuple[str, ...] = ()

    def is_ignored(self, stored: str) -> bool:
        """Whether a tensor belongs to another part of the checkpoint than the language model."""
        return any(re.search(pattern, stored) for pattern in self.ignored)

    def model_name(self, stored: str) -> str:
        """What the model calls the tensor or layer that a checkpoint calls `stored`."""
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return stored

    def stored_layer(self, layer: str) -> str:
        """The layer of a checkpoint, by its renamed name, that holds the model's layer of that name."""
        parent, _, last = layer.rpartition(".")
        for fused, parts in self.fused:
            if last in parts:
                return f"{parent}.{fused}"
        return layer
