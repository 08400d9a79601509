"""LoRA adapters with random weights, as PEFT saves them, and models of transformers that have one in their weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pagoda.adapters import LoraAdapter
from pagoda.models.lora.peft import read_version
from tests.support.parity import greedy

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_model(model: Path) -> Any:
    """The model in float32, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def write_adapter(
    directory: Path,
    model: Path,
    *,
    rank: int = 8,
    seed: int = 0,
    targets: tuple[str, ...] = ALL_LINEAR,
    dtype: torch.dtype = torch.float32,
    layers: range | None = None,
    size: float = 0.3,
    **settings: Any,
) -> Path:
    """An adapter of `targets` in a checkpoint, `size` what B's values are like; returns `directory`.

    `settings`: further ones of adapter_config.json.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tests/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "use_rslora": False,
        "target_modules": list(targets),
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        **settings,
    }
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in base_model(model).named_modules():
        is_target = isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if not is_target or (layers is not None and (layer is None or int(layer[1]) not in layers)):
            continue
        own = _of(config["rank_pattern"], name, rank)
        a = torch.randn(own, module.in_features, generator=generator) / math.sqrt(module.in_features)
        b = torch.randn(module.out_features, own, generator=generator) * size / own
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    save(directory, config, tensors)
    return directory


def save(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Both files of an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors")


def adapter_of(directory: Path, name: str = "") -> LoraAdapter:
    """As requests carry it."""
    return LoraAdapter(name or directory.name, str(directory), read_version(directory))


@torch.no_grad()
def merged_model(model: Path, adapter: Path) -> Any:
    """The model of transformers whose weights have `scale * B @ A` added, as PEFT defines it."""
    merged = base_model(model)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = dict(merged.named_modules())
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        rank = len(a)
        alpha = _of(config["alpha_pattern"], name, config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        modules[name].weight += scale * (b.float() @ a.float())
    return merged


def _of(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def greedy_text(model: Path, adapter: Path | None, prompt: list[int], max_tokens: int) -> str:
    """What transformers answers with an adapter in the weights."""
    from transformers import AutoTokenizer

    tokens = greedy(base_model(model) if adapter is None else merged_model(model, adapter), prompt, max_tokens)
    text: str = AutoTokenizer.from_pretrained(model).decode(tokens, skip_special_tokens=True)
    return text
