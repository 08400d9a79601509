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


_LANGUAGE_MODEL = "ForCausalLM"


def family_of(reader: ConfigReader) -> Family:
    """The family by `model_type`, as transformers chooses, or by `architectures` where that names none.

    Raises `CheckpointError`, naming the supported ones, for any other, and for a model with another head than a language
    model's (`LlamaForSequenceClassification`).
    """
    architectures = reader.strings("architectures")
    model_type = reader.values.get("model_type")
    found = ", ".join(map(shown_name, architectures[:MAX_NAMES_IN_ERROR])) or f"model_type {shown(model_type)}"
    problem = f"{reader.where}: {found} is not supported; supported architectures: {', '.join(FAMILIES)}"
    # A base model (LlamaModel) is one without its head, which may be tied.
    if architectures and not any(name.endswith(_LANGUAGE_MODEL) or "For" not in name for name in architectures):
        raise CheckpointError(problem)
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    for family in FAMILIES.values():
        if family.architecture in architectures:
            return family
    raise CheckpointError(problem)
