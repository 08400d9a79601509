"""A real model answers real questions from its GGUF file, and without rounding it is transformers' model of those weights."""

from __future__ import annotations

import gc
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagoda.llm import LLM
from pagoda.models.config import ModelConfig
from pagoda.sampling.params import SamplingParams

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

ANSWERS = {
    "What is the capital of France? Answer in one sentence.": "Paris",
    "What is 2 + 2?": "4",
    "Name the three primary colors.": "Blue",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "What gas do plants take in from the air?": "carbon dioxide",
}
QUESTIONS = [
    *ANSWERS,
    "What is the capital of France?",
    "Tell me a short story about a lighthouse.",
    "Explain why the sky is blue.",
    "Write a haiku about autumn.",
    "List five fruits.",
    "How do I boil an egg?",
    "Translate to French: Good morning, my friend.",
]
NUM_TOKENS = 96


def conversations(questions: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in questions]


def test_real_questions_are_answered_as_the_file_is(real_model: Path) -> None:
    llm = LLM(str(real_model), max_model_len=512)
    outputs = llm.chat(conversations(list(ANSWERS)), SamplingParams(temperature=0, max_tokens=48))
    for (question, answer), output in zip(ANSWERS.items(), outputs, strict=True):
        assert answer in output.outputs[0].text, question


# With inputs rounded to int8 "L'Étoile, …" comes a hair before this, in llama.cpp as well.
def test_in_the_default_dtype_the_capital_of_france_is_paris(real_model: Path) -> None:
    llm = LLM(str(real_model), max_model_len=512, quantization="dequantize")
    (output,) = llm.chat(
        conversations(["What is the capital of France?"]), SamplingParams(temperature=0, max_tokens=24)
    )
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"


def reference_model(path: Path) -> LlamaForCausalLM:
    """transformers' model over the weights that the package `gguf` dequantizes, with rows of q and k put back in order."""
    config = ModelConfig.from_directory(path)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, rms_norm_eps=config.norm.eps, rope_theta=100000.0, tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
    )  # fmt: skip
    blocks = {
        **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
        **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            state[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]] + ".weight"] = weight
            continue
        heads = {"attn_q": 9, "attn_k": 3}.get(parts[2])
        if heads is not None:
            weight = weight.view(heads, 32, 2, 576).transpose(1, 2).reshape(weight.shape)
        state[f"model.layers.{parts[1]}.{blocks[parts[2]]}.weight"] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def test_without_rounding_it_is_transformers_model(real_model: Path) -> None:
    llm = LLM(str(real_model), max_model_len=512, dtype="float32", quantization="dequantize")
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    outputs = llm.chat(conversations(QUESTIONS), sampling)
    del llm
    gc.collect()
    assert len(outputs) == 12
    model = reference_model(real_model)
    for output in outputs:
        answer = list(output.outputs[0].token_ids)
        with torch.inference_mode():
            # What greedy decoding would choose at each position after the tokens before it.
            logits = model(torch.tensor([[*output.prompt_token_ids, *answer]])).logits[0]
        chosen = logits[len(output.prompt_token_ids) - 1 : -1].argmax(dim=-1).tolist()
        assert answer == chosen
        assert len(answer) == NUM_TOKENS or output.outputs[0].finish_reason == "stop"
