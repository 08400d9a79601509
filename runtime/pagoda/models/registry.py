"""The families that Pagoda serves."""

from __future__ import annotations

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import MAX_NAMES_IN_ERROR, shown, shown_name
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family
from pagoda.models.llama import LLAMA
from pagoda.models.mistral import MISTRAL
from pagoda.models.qwen2 import QWEN2
from pagoda.models.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(reader: ConfigReader) -> Family:
    """The family by `architectures`, or by `model_type` where a config names no architecture.

    Raises `CheckpointError`, naming the supported ones, for any other.
    """
    architectures = reader.strings("architectures")
    model_type = reader.values.get("model_type")
    for family in FAMILIES.values():
        if family.architecture in architectures or (not architectures and family.model_type == model_type):
            return family
    found = ", ".join(map(shown_name, architectures[:MAX_NAMES_IN_ERROR])) or f"model_type {shown(model_type)}"
    raise CheckpointError(f"{reader.where}: {found} is not supported; supported architectures: {', '.join(FAMILIES)}")
