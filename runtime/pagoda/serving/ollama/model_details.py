"""What Ollama's routes say of the served model: of its files, once they are there."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pagoda.models.checkpoint_files import read_json_object
from pagoda.models.config import CONFIG_FILE, ModelConfig
from pagoda.models.encoders.config import EncoderConfig
from pagoda.models.pooling_config import read_model
from pagoda.serving.models import ServedModel
from pagoda.serving.ollama.types import LATEST
from pagoda.text.generation import TextGenerator
from pagoda.text.pooling import TextPooler

_WEIGHTS = (".safetensors", ".bin")
# The model is never unloaded; Ollama has a moment for that, and clients read it as one.
_NEVER = "9999-12-31T23:59:59Z"


class ModelDetails:
    """Facts of the checkpoint, read once, when they are first asked for after the model is ready."""

    def __init__(self, model: ServedModel) -> None:
        self._served = model

    def card(self, name: str) -> dict[str, Any]:
        """The entry of the model under one of its names in /api/tags."""
        return {
            "name": name + LATEST,
            "model": name + LATEST,
            "modified_at": self._modified_at,
            "size": self._size,
            "digest": self._digest,
            "details": self.details,
        }

    def running(self, name: str) -> dict[str, Any]:
        """The entry in /api/ps."""
        card = self.card(name)
        del card["modified_at"]
        ready = self._served.ready
        is_on_gpu = ready is not None and ready.device == "cuda"
        return {
            **card,
            "expires_at": _NEVER,
            "size_vram": self._size if is_on_gpu else 0,
            "context_length": self._max_model_len,
        }

    def shown(self) -> dict[str, Any]:
        """The body of /api/show. The chat template is shown where `enable_tokenizer_info_endpoint` shows it, too."""
        served, text = self._served, self._served.text
        template = ""
        if served.config.enable_tokenizer_info_endpoint:
            template = text.pool.tokenizer.chat_templates.get("default", "")
        sampling = text.default_sampling if isinstance(text, TextGenerator) else {}
        return {
            "modelfile": f"FROM {served.name}\n",
            "parameters": "\n".join(f"{name} {value}" for name, value in sampling.items()),
            "template": template,
            "details": self.details,
            "model_info": self._model_info(),
            "capabilities": _capabilities(text),
            "modified_at": self._modified_at,
        }

    @cached_property
    def details(self) -> dict[str, Any]:
        """Format, family and size."""
        family = str(read_json_object(self._directory, CONFIG_FILE).get("model_type") or "unknown")
        model = self._model
        stored = (model.quantization or model.dtype) if isinstance(model, ModelConfig) else model.dtype
        return {
            "parent_model": "",
            "format": "gguf" if self._directory.is_file() else "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": _in_words(model.num_parameters()) if isinstance(model, ModelConfig) else "",
            "quantization_level": str(self._served.config.quantization or stored),
        }

    def _model_info(self) -> dict[str, Any]:
        model, kind = self._model, self.details["family"]
        info: dict[str, Any] = {
            "general.architecture": kind,
            f"{kind}.context_length": self._max_model_len,
            f"{kind}.embedding_length": model.hidden_size,
            f"{kind}.block_count": model.num_layers,
            f"{kind}.attention.head_count": model.num_heads,
            f"{kind}.vocab_size": model.vocab_size,
        }
        if isinstance(model, ModelConfig):
            info["general.parameter_count"] = model.num_parameters()
            info[f"{kind}.attention.head_count_kv"] = model.num_kv_heads
        return info

    @property
    def _max_model_len(self) -> int | None:
        ready = self._served.ready
        return None if ready is None else ready.max_model_len

    @property
    def _directory(self) -> Path:
        return self._served.directory

    @cached_property
    def _model(self) -> ModelConfig | EncoderConfig:
        return read_model(self._directory, generation=False, model_impl="auto")

    @cached_property
    def _files(self) -> list[Path]:
        if self._directory.is_file():  # of GGUF
            return [self._directory]
        return sorted(path for path in self._directory.iterdir() if path.suffix in _WEIGHTS)

    @cached_property
    def _size(self) -> int:
        return sum(path.stat().st_size for path in self._files)

    @cached_property
    def _modified_at(self) -> str:
        newest = max((path.stat().st_mtime for path in self._files), default=0.0)
        return datetime.fromtimestamp(newest, UTC).isoformat().replace("+00:00", "Z")

    @cached_property
    def _digest(self) -> str:
        """Of the configuration, and names and sizes of the weight files: reading all of those would take minutes."""
        configuration = read_json_object(self._directory, CONFIG_FILE)
        digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode())
        for path in self._files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()


def _capabilities(text: TextGenerator | TextPooler) -> list[str]:
    if not isinstance(text, TextGenerator):
        return ["embedding"] * ("embed" in text.tasks)
    found = ["completion"]
    if (format := text.answer_format) is not None:
        found += ["tools"] * format.has_calls + ["thinking"] * (format.reasoning_name is not None)
    return found


def _in_words(count: int) -> str:
    """A number of parameters as Ollama writes it: 0.6B, 135M."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
