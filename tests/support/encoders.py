"""Checkpoints of encoders: random weights that transformers makes, with a tokenizer of few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

_TEXT = """the a cat dog sat on mat barked in of is capital berlin paris germany france city river old new house war peace
music science good bad red blue green one two three four five"""
WORDS = _TEXT.split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB_SIZE = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 160,
}


def save_tokenizer(directory: Path, *, has_types: bool = True) -> None:
    """A tokenizer of `WORDS` that puts texts, and pairs of them, between special tokens."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    second = ":1" if has_types else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B{second} [SEP]{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"})
    )


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif "embed" in name or "relative" in name:
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(parameter.shape[1] ** -0.5 * noise)


def save_encoder(directory: Path, model: Any, *, has_types: bool = True, seed: int = 0) -> Any:
    """Save a model of transformers with random weights and the tokenizer; returns it as it is loaded again."""
    directory.mkdir(parents=True, exist_ok=True)
    randomize(model, seed)
    model.save_pretrained(directory)
    save_tokenizer(directory, has_types=has_types)
    loaded = type(model).from_pretrained(directory).eval()
    loaded.set_attn_implementation("eager")
    return loaded


def save_bert(directory: Path, *, num_labels: int | None = None, seed: int = 0, **config: Any) -> Any:
    """A BERT, with a classifier of `num_labels` outputs if that is given."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    settings = BertConfig(**{**SIZES, **config}, **({} if num_labels is None else {"num_labels": num_labels}))
    model = BertModel(settings) if num_labels is None else BertForSequenceClassification(settings)
    return save_encoder(directory, model, seed=seed)


def add_modules(directory: Path, *modes: str, dense: int | None = None, normalize: bool = True) -> None:
    """What Sentence Transformers writes beside a model: pooling, a dense layer of `dense` outputs with tanh, normalizing."""
    prefix = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    hidden = json.loads((directory / "config.json").read_text())["hidden_size"]
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": hidden, **{f"pooling_mode_{mode}": True for mode in modes}}
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    if dense is not None:
        from safetensors.torch import save_file

        (directory / "2_Dense").mkdir()
        layer = {
            "in_features": hidden * len(modes),
            "out_features": dense,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (directory / "2_Dense/config.json").write_text(json.dumps(layer))
        generator = torch.Generator().manual_seed(7)
        tensors = {
            "linear.weight": torch.randn(dense, hidden * len(modes), generator=generator) * 0.1,
            "linear.bias": torch.randn(dense, generator=generator) * 0.1,
        }
        save_file(tensors, str(directory / "2_Dense/model.safetensors"))
        modules.append(("2_Dense", "Dense"))
    if normalize:
        modules.append(("3_Normalize", "Normalize"))
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"{prefix}{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
