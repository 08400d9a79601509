"""A LoRA adapter as a request carries it: by name, place and version; its weights are where the model is."""

from __future__ import annotations

from dataclasses import dataclass

_KIND = "adapter="


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """`name`: what requests call it. `path`: its directory, the same on every machine of the engine. `version`: the digest of
    its files, as `models.lora.peft.read_version` makes it.

    Of two with one name the version says which is which: what is cached of one is never found by the other.
    """

    name: str
    path: str
    version: str

    @property
    def cache_key(self) -> str:
        """One of the keys in the root of the prefix hash."""
        return f"{_KIND}{self.name}@{self.version}"

    def __str__(self) -> str:
        return f"{self.name} ({self.path}, version {self.version[:12]})"


def adapter_name(cache_key: str) -> str | None:
    """The name of the adapter whose cache key this is; None: it is one of another kind."""
    return cache_key.removeprefix(_KIND).rpartition("@")[0] if cache_key.startswith(_KIND) else None


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter as callers of `LLM` name it, with vLLM's fields: a name, and the directory of a PEFT checkpoint.

    `lora_int_id` is vLLM's, and not needed: adapters are told apart by their names and files.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
