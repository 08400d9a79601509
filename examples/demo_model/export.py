"""Writes a trained model as a Hugging Face checkpoint: bfloat16 safetensors, configuration, tokenizer, chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from model import DemoModel
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig


def export(model: DemoModel, tokenizer_directory: Path, target: Path) -> None:
    """Write the checkpoint directory `target`; ids 0 and 2 (end of text, end of turn) both end a generation."""
    target.mkdir(parents=True, exist_ok=True)
    shape = model.shape.to_dict()
    theta = shape.pop("rope_theta")
    config = LlamaConfig(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[2, 0],
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(target)
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, do_sample=False).save_pretrained(target)
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for path in tokenizer_directory.iterdir():
        shutil.copy(path, target / path.name)
