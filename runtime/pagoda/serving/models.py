"""The served models by name. There is one; every protocol looks it up here, so that several are a change of this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pagoda.errors import ModelNotFoundError, shown
from pagoda.serving.generation import GenerationRunner
from pagoda.serving.health import ServerHealth


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model, what runs its requests, and its health. It may be asked for by its `aliases`, too; answers have its name."""

    name: str
    runner: GenerationRunner
    health: ServerHealth
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the model's own first."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))


class ServedModels:
    """The lookup; iterates over the models."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def __iter__(self) -> Iterator[ServedModel]:
        return iter((self._model,))

    def find(self, name: str) -> ServedModel:
        """The model of that name, ready or not; raises `ModelNotFoundError`."""
        if name not in self._model.names:
            raise ModelNotFoundError(
                f"model {shown(name)} is not served here; the served model is {self._model.name!r}"
            )
        return self._model
