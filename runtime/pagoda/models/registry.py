"""The families that Pagoda serves."""

from __future__ import annotations

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import MAX_NAMES_IN_ERROR, shown, shown_name
from pagoda.models.cohere2 import COHERE, COHERE2
from pagoda.models.config_reader import ConfigReader
from pagoda.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, MINICPM3, MISTRAL4, YOUTU
from pagoda.models.ernie4_5 import ERNIE4_5
from pagoda.models.exaone4 import EXAONE4
from pagoda.models.family import Family
from pagoda.models.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_VISION
from pagoda.models.gemma4 import GEMMA4, GEMMA4_WITH_VISION
from pagoda.models.glm4 import GLM, GLM4
from pagoda.models.glm4_moe import DOTS1, GLM4_MOE
from pagoda.models.gpt_oss import GPT_OSS
from pagoda.models.granite import GRANITE, GRANITE_MOE, GRANITE_MOE_SHARED
from pagoda.models.llama import LLAMA
from pagoda.models.minimax_m2 import MINIMAX_M2
from pagoda.models.ministral import MINISTRAL
from pagoda.models.mistral import MISTRAL
from pagoda.models.mistral3 import MINISTRAL3, MISTRAL3_WITH_VISION
from pagoda.models.mixtral import MIXTRAL
from pagoda.models.olmo import OLMO2, OLMO3, OLMOE
from pagoda.models.phi3 import PHI3
from pagoda.models.qwen2 import QWEN2
from pagoda.models.qwen3 import QWEN3
from pagoda.models.qwen3_next import (
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_5_MOE_WITH_VISION,
    QWEN3_5_WITH_VISION,
    QWEN3_NEXT,
)
from pagoda.models.qwen_moe import QWEN2_MOE, QWEN3_MOE
from pagoda.models.seed_oss import SEED_OSS
from pagoda.models.smollm3 import SMOLLM3
from pagoda.models.transformers_config import transformers_family

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        LLAMA,
        MISTRAL,
        MINISTRAL,
        MINISTRAL3,
        MISTRAL3_WITH_VISION,
        MISTRAL4,
        MIXTRAL,
        QWEN2,
        QWEN2_MOE,
        QWEN3,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_5,
        QWEN3_5_WITH_VISION,
        QWEN3_5_MOE,
        QWEN3_5_MOE_WITH_VISION,
        GEMMA,
        GEMMA2,
        GEMMA3,
        GEMMA3_WITH_VISION,
        GEMMA4,
        GEMMA4_WITH_VISION,
        PHI3,
        GRANITE,
        GRANITE_MOE,
        GRANITE_MOE_SHARED,
        OLMO2,
        OLMO3,
        OLMOE,
        SMOLLM3,
        GLM,
        GLM4,
        GLM4_MOE,
        GLM4_MOE_LITE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        DOTS1,
        MINICPM3,
        YOUTU,
        MINIMAX_M2,
        GPT_OSS,
        COHERE,
        COHERE2,
        EXAONE4,
        ERNIE4_5,
        SEED_OSS,
    )
}

_LANGUAGE_MODEL = "ForCausalLM"
# Keys of models that take more than text.
_OTHER_INPUTS = ("vision_config", "audio_config", "thinker_config", "talker_config", "image_token_id", "audio_token_id")


def _what_is_supported(reader: ConfigReader) -> str:
    """Of the kind of model that config.json describes."""
    if reader.values.get("is_encoder_decoder") is True:
        return "it is an encoder-decoder model, and supported are decoders alone (and encoders, for embeddings)"
    names = reader.strings("architectures")
    has_other_inputs = any(name.endswith("ForConditionalGeneration") for name in names)
    if has_other_inputs or any(reader.values.get(key) is not None for key in _OTHER_INPUTS):
        with_text = ", ".join(name for name in FAMILIES if not name.endswith(_LANGUAGE_MODEL))
        return f"of models that take images or audio, the text model is served of {with_text}"
    supported = ", ".join(name.removesuffix(_LANGUAGE_MODEL) for name in FAMILIES if name.endswith(_LANGUAGE_MODEL))
    return f"supported architectures, each followed by {_LANGUAGE_MODEL}: {supported}"


def family_of(reader: ConfigReader, model_impl: str = "pagoda") -> Family:
    """The family by `model_type`, as transformers chooses, or by `architectures` where that names none.

    `model_impl`: `pagoda`, `transformers`, which takes any model that transformers can run here (`transformers_config`), or
    `auto`, which takes such a one where there is no family.

    Raises `CheckpointError`, naming the supported ones, for any other, and for a model with another head than a language
    model's (`LlamaForSequenceClassification`).
    """
    architectures = reader.strings("architectures")
    model_type = reader.values.get("model_type")
    found = ", ".join(map(shown_name, architectures[:MAX_NAMES_IN_ERROR])) or f"model_type {shown(model_type)}"
    problem = f"{reader.where}: {found} is not supported; {_what_is_supported(reader)}"
    # A base model (LlamaModel) is one without its head, which may be tied.
    is_language_model = any(
        name.endswith(_LANGUAGE_MODEL) or "For" not in name or name in FAMILIES for name in architectures
    )
    if architectures and not is_language_model:
        raise CheckpointError(problem)
    if model_impl == "transformers":
        return transformers_family(reader)
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    for family in FAMILIES.values():
        if family.architecture in architectures:
            return family
    if model_impl == "auto":
        return transformers_family(reader)
    raise CheckpointError(problem)
