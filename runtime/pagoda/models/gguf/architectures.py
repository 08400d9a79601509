"""The architectures of GGUF files that Pagoda serves, and what llama.cpp calls and does to their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pagoda.errors import CheckpointError, shown
from pagoda.models.gguf.reader import GgufFile, GgufTensor

ARCHITECTURE = "general.architecture"
ROPE_FACTORS = "rope_freqs.weight"

ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_OF_THE_CONFIGURATION = (ROPE_FACTORS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT)

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Stacks of all experts: `[experts, outputs, inputs]`, and biases `[experts, outputs]`.
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
MAX_EXPERTS = 1 << 12

_BLOCK_NAME = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
_OUTSIDE_NAME = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How llama.cpp stores a family.

    `architecture`, `model_type`: as config.json names it. `interleaved`: rows of q and k are in the order in which pairs to be
    rotated lie side by side, not half a head apart. `blocks`: tensors of a layer by llama.cpp's names, where they are others
    than the usual ones. `norm_offset`: what llama.cpp adds to the weights of norms.
    """

    architecture: str
    model_type: str
    interleaved: bool = False
    blocks: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0


# Mistral's files, and those of all models that have Llama's form, are of architecture llama; with experts it is Mixtral's.
_MIXTRAL = Architecture(
    architecture="MixtralForCausalLM", model_type="mixtral", interleaved=True, blocks={"ffn_gate_inp": "mlp.gate"}
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(architecture="LlamaForCausalLM", model_type="llama", interleaved=True),
    "qwen2": Architecture(architecture="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": Architecture(architecture="Qwen3ForCausalLM", model_type="qwen3"),
    "qwen2moe": Architecture(architecture="Qwen2MoeForCausalLM", model_type="qwen2_moe", blocks=_QWEN_EXPERTS),
    "qwen3moe": Architecture(architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe", blocks=_QWEN_EXPERTS),
    "gemma2": Architecture(
        architecture="Gemma2ForCausalLM", model_type="gemma2", blocks=_SANDWICH_NORMS, norm_offset=1.0
    ),
    "gemma3": Architecture(
        architecture="Gemma3ForCausalLM", model_type="gemma3_text", blocks=_SANDWICH_NORMS, norm_offset=1.0
    ),
    "phi3": Architecture(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        blocks={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "gpt-oss": Architecture(
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        blocks={
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
    ),
}


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor under the name that a Hugging Face checkpoint has for it.

    `interleaved_heads`: its rows are those of so many heads, in llama.cpp's order of them; 0: in that of the checkpoint.
    `offset`: what was added to its values.
    """

    name: str
    stored: GgufTensor
    interleaved_heads: int = 0
    offset: float = 0.0

    def rows(self, start: int, length: int) -> NamedTensor:
        """So many of its first dimension, from `start` on."""
        assert not self.interleaved_heads
        return replace(self, stored=_rows(self.stored, start, length))


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """The file's architecture, and its name. Raises `CheckpointError` for one that is not served, naming those that are."""
    name = file.value(ARCHITECTURE, str)
    known = ARCHITECTURES.get(name)
    if known is None:
        raise CheckpointError(
            f"{file.path}: GGUF files of architecture {shown(name)} are not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return name, _MIXTRAL if name == "llama" and file.value("llama.expert_count", int, 0) else known


def named_tensors(file: GgufFile) -> Iterator[NamedTensor]:
    """The file's tensors, with the names of the checkpoint; those without one keep their own."""
    prefix, architecture = architecture_of(file)
    heads = file.value(f"{prefix}.attention.head_count", int)
    num_heads = {"attn_q": heads, "attn_k": file.value(f"{prefix}.attention.head_count_kv", int, heads)}
    blocks = {**_BLOCK, **architecture.blocks}
    for tensor in file.tensors.values():
        if tensor.name in _OF_THE_CONFIGURATION:
            continue
        block = _BLOCK_NAME.fullmatch(tensor.name)
        if block is not None and block[2] in _EXPERTS:
            yield from _of_experts(file, tensor, f"model.layers.{int(block[1])}.mlp.experts", block[2], block[3])
            continue
        named = NamedTensor(_checkpoint_name(tensor.name, blocks), tensor)
        if architecture.interleaved and block is not None and block[2] in num_heads:
            rows, count = tensor.shape[0], num_heads[block[2]]
            if count < 1 or rows % count or rows // count % 2:
                raise CheckpointError(
                    f"{file.path}: {rows} rows of {shown(tensor.name)} are not those of {count} heads"
                )
            named = replace(named, interleaved_heads=count)
        if architecture.norm_offset and tensor.name.endswith("_norm.weight"):
            named = replace(named, offset=architecture.norm_offset)
        if named.name.endswith(".shared_expert_gate.weight") and len(tensor.shape) == 1:
            named = replace(named, stored=replace(tensor, shape=(1, *tensor.shape)))
        yield named


def _of_experts(file: GgufFile, tensor: GgufTensor, parent: str, stack: str, kind: str) -> Iterator[NamedTensor]:
    """The tensors of each expert, which follow each other in `tensor`."""
    if len(tensor.shape) != (3 if kind == "weight" else 2) or tensor.shape[0] > MAX_EXPERTS:
        raise CheckpointError(
            f"{file.path}: {shown(tensor.name)} of shape {list(tensor.shape)} is no stack of at most {MAX_EXPERTS} experts"
        )
    for expert in range(tensor.shape[0]):
        part = _rows(tensor, expert, 1)
        yield NamedTensor(f"{parent}.{expert}.{_EXPERTS[stack]}.{kind}", replace(part, shape=tensor.shape[1:]))


def _rows(tensor: GgufTensor, start: int, length: int) -> GgufTensor:
    row_bytes = tensor.nbytes // tensor.shape[0]
    return replace(
        tensor, shape=(length, *tensor.shape[1:]), start=tensor.start + start * row_bytes, nbytes=length * row_bytes
    )


def _checkpoint_name(name: str, blocks: Mapping[str, str]) -> str:
    if (block := _BLOCK_NAME.fullmatch(name)) is not None and block[2] in blocks:
        checkpoint = f"model.layers.{int(block[1])}.{blocks[block[2]]}"
        return checkpoint if checkpoint.endswith(".sinks") else f"{checkpoint}.{block[3]}"
    if (outside := _OUTSIDE_NAME.fullmatch(name)) is not None and outside[1] in _OUTSIDE:
        return f"{_OUTSIDE[outside[1]]}.{outside[2]}"
    return name
