"""EAGLE-3 heads of random weights, in both forms, and what such a head drafts, worked out in the plainest way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file

from pagoda.models.dummy import DummySpec

EPS = 1e-6


def write_head(
    directory: Path,
    target: DummySpec,
    *,
    speculators: bool = False,
    draft_vocab_size: int | None = 200,
    has_embedding: bool = False,
    has_lm_head: bool = True,
    seed: int = 0,
    layer: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A head for models of `target`; `layer` and `config` change what config.json says."""
    random = torch.Generator().manual_seed(seed)
    shape = {
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 1,
        "vocab_size": target.vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": EPS,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        **(layer or {}),
    }
    verifier = {"name_or_path": "model", **config.pop("verifier", {})}
    form = {**shape, "architectures": ["LlamaForCausalLMEagle3"]}
    if speculators:
        form = {
            "speculators_model_type": "eagle3",
            "architectures": ["Eagle3Speculator"],
            "transformer_layer_config": shape,
            "speculators_config": {"algorithm": "eagle3", "verifier": verifier},
        }
    values = {**form, "draft_vocab_size": draft_vocab_size, **config}
    hidden, size = shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"] * size, shape["num_key_value_heads"] * size
    states = 3 * (config.get("target_hidden_size") or target.hidden_size)
    prefix = "layers.0." if speculators else "midlayer."
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, states),
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}hidden_norm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
        f"{prefix}self_attn.q_proj.weight": (heads, 2 * hidden),
        f"{prefix}self_attn.k_proj.weight": (kv_heads, 2 * hidden),
        f"{prefix}self_attn.v_proj.weight": (kv_heads, 2 * hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, heads),
        f"{prefix}mlp.gate_proj.weight": (shape["intermediate_size"], hidden),
        f"{prefix}mlp.up_proj.weight": (shape["intermediate_size"], hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, shape["intermediate_size"]),
        "norm.weight": (hidden,),
    }
    if has_lm_head:
        shapes["lm_head.weight"] = (draft_vocab_size or target.vocab_size, hidden)
    if has_embedding:
        shapes["embed_tokens.weight"] = (target.vocab_size, hidden)
    if config.get("norm_before_fc"):
        shapes["input_norm.weight"] = (states,)
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{index}.weight": (states // 3,) for index in range(3)}
    tensors = {
        name: torch.randn(each, generator=random) * (each[-1] ** -0.5 if len(each) > 1 else 0.2) + (len(each) == 1)
        for name, each in shapes.items()
    }
    if draft_vocab_size is not None and draft_vocab_size < target.vocab_size:
        ids = torch.randperm(target.vocab_size, generator=random)[:draft_vocab_size].sort().values
        tensors["d2t"] = ids - torch.arange(draft_vocab_size)
        tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "model.safetensors")
    return directory


class NaiveHead:
    """A head of `write_head`; everything is computed anew for every draft, in float32."""

    def __init__(self, directory: Path, embedding: torch.Tensor, lm_head: torch.Tensor) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.is_speculators = "speculators_model_type" in config
        self.layer = config.get("transformer_layer_config", config)
        self.config = config
        tensors = load_file(directory / "model.safetensors")
        self.weights = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
        self.embedding = self.weights.get("embed_tokens.weight", embedding)
        self.lm_head = self.weights.get("lm_head.weight", lm_head)

    def shortfall(self, states: torch.Tensor, tokens: Sequence[int], drafts: Sequence[int]) -> float:
        """By how much the logits of `drafts`, one after the other, fall short of the best; 0 for greedy ones.

        `states` `[N - 1, 3 * hidden]` of the model at the first N - 1 positions of the N `tokens`.
        """
        features = functional.linear(self._normed_states(states), self.weights["fc.weight"])
        known, shortfall = list(tokens), 0.0
        offsets = self.weights.get("d2t", torch.zeros(len(self.lm_head), dtype=torch.long))
        ids = (torch.arange(len(offsets)) + offsets).tolist()
        for draft in drafts:
            output, following = self._forward(features, self.embedding[torch.tensor(known[1:])])
            logits = functional.linear(output[-1], self.lm_head)
            shortfall = max(shortfall, float(logits.max() - logits[ids.index(draft)]))
            known.append(draft)
            features = torch.cat((features, following[-1:]))
        return shortfall

    def _normed_states(self, states: torch.Tensor) -> torch.Tensor:
        if self.config.get("norm_before_fc"):
            states = self._norm(states, "input_norm")
        if self.config.get("fc_norm"):
            parts = states.chunk(3, dim=-1)
            states = torch.cat([self._norm(part, f"fc_norm.{index}") for index, part in enumerate(parts)], dim=-1)
        return states

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], EPS)

    def _forward(self, features: torch.Tensor, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self._norm(features, "midlayer.hidden_norm")
        residual = normed if self.config.get("norm_before_residual", self.is_speculators) else features
        hidden = torch.cat((self._norm(embedded, "midlayer.input_layernorm"), normed), dim=-1)
        residual = residual + self._attention(hidden)
        hidden = self._norm(residual, "midlayer.post_attention_layernorm")
        gate, up = (self._linear(hidden, f"mlp.{name}_proj") for name in ("gate", "up"))
        residual = residual + self._linear(functional.silu(gate) * up, "mlp.down_proj")
        output = self._norm(residual, "norm")
        return output, output if self.config.get("norm_output") else residual

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.weights[f"midlayer.{name}.weight"])

    def _attention(self, hidden: torch.Tensor) -> torch.Tensor:
        size = self.layer["head_dim"]
        query, key, value = (
            self._linear(hidden, f"self_attn.{name}_proj").view(len(hidden), -1, size).transpose(0, 1) for name in "qkv"
        )
        turns = torch.arange(len(hidden))[:, None] * 10000.0 ** -(torch.arange(0, size, 2).float() / size)
        cos, sin = turns.cos(), turns.sin()
        query, key = (
            torch.cat(
                (
                    x[..., : size // 2] * cos - x[..., size // 2 :] * sin,
                    x[..., size // 2 :] * cos + x[..., : size // 2] * sin,
                ),
                -1,
            )
            for x in (query, key)
        )
        groups = len(query) // len(key)
        mixed = functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0), is_causal=True
        )
        return self._linear(mixed.transpose(0, 1).flatten(1), "self_attn.o_proj")
