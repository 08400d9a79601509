"""From a name and a directory to a `LoraAdapter`, checked against the model. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pagoda.adapters import LoraAdapter
from pagoda.models.checkpoint_files import checkpoint_file
from pagoda.models.config import ModelConfig
from pagoda.models.lora.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapter, read_version

Signature = tuple[tuple[int, int, int], ...]


def signature_of(directory: Path) -> Signature:
    """What changes when an adapter's files do: of each its inode, size and time. Raises `CheckpointError`."""
    found = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        status = checkpoint_file(directory, name).stat()
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


class AdapterSource:
    """Adapters of one model. Blocks while it reads files; for one thread at a time."""

    def __init__(self, model: str | Path, *, model_impl: str, max_lora_rank: int) -> None:
        """`model`: its directory or GGUF file."""
        self._model = model
        self._model_impl = model_impl
        self._max_lora_rank = max_lora_rank
        self._config: ModelConfig | None = None
        self._versions: dict[Path, tuple[Signature, str]] = {}

    def resolve(self, name: str, path: str) -> LoraAdapter:
        """The adapter in the directory `path` as it is now. Raises `CheckpointError` for one that does not fit the model."""
        directory = Path(path).expanduser().absolute()
        if self._config is None:
            self._config = ModelConfig.from_directory(self._model, generation=False, model_impl=self._model_impl)
        read_adapter(directory, self._config, self._max_lora_rank)
        signature = signature_of(directory)
        known = self._versions.get(directory)
        if known is None or known[0] != signature:
            known = self._versions[directory] = signature, read_version(directory)
        return LoraAdapter(name, str(directory), known[1])
