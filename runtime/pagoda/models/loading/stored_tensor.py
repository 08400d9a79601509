"""Where a tensor of a checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pagoda.models.checkpoint_names import TensorPart


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, or a part of one, not yet read; `name` is the file's, `dtype` as safetensors spells it.

    `part`: what of the tensor of shape `stored_shape` this is; None: all of it. `shape` is that of the part.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    part: TensorPart | None = None
    stored_shape: tuple[int, ...] = ()

    def take(self, part: TensorPart) -> StoredTensor:
        """A part of it, which is all there."""
        return replace(self, part=part, shape=part.shape(self.shape), stored_shape=self.shape)
