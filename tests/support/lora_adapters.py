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


def add_experts(directory: Path, model: Path, *, stacked: bool, seed: int = 0, size: float = 0.3) -> Path:
    """Give an adapter that `write_adapter` made something for all experts, too; returns `directory`.

    `stacked`: as PEFT's `target_parameters` are stored, for transformers keeps experts in one parameter; else each as layers
    of its own, by the names of before (Mixtral's `w1`).
    """
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(directory / "adapter_model.safetensors")
    rank = config["r"]
    generator = torch.Generator().manual_seed(1000 + seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for name, module in base_model(model).named_modules():
        if not name.endswith(".experts"):
            continue
        for parameter in ("gate_up_proj", "down_proj"):
            count, outputs, inputs = _oriented(module, parameter).shape
            if stacked:
                own = f"{name}.base_layer" if parameter == "gate_up_proj" else name
                pairs = {own: (values(count * rank, inputs), values(outputs, rank * count))}
            else:
                names = _EACH.get(json.loads((model / "config.json").read_text())["model_type"], _MEMBERS)[parameter]
                root = name.replace(".mlp.", ".block_sparse_moe.") if "w1" in names or "w2" in names else name
                pairs = {
                    f"{root}.{expert}.{member}": (values(rank, inputs), values(outputs // len(names), rank))
                    for expert in range(count)
                    for member in names
                }
            for own, (a, b) in pairs.items():
                tensors[f"base_model.model.{own}.lora_A.weight"] = a / math.sqrt(inputs)
                tensors[f"base_model.model.{own}.lora_B.weight"] = b * size / rank
    if stacked:
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    save(directory, config, tensors)
    return directory


_MEMBERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_EACH = {"mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}}


def _oriented(experts: Any, parameter: str) -> torch.Tensor:
    """A view [experts, outputs, inputs] of the weights of all experts."""
    weight: torch.Tensor = getattr(experts, parameter).data
    return weight.transpose(1, 2) if getattr(experts, "is_transposed", False) else weight


def _add_to_experts(modules: dict[str, Any], name: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    one = re.match(r"(.*\.experts)\.(\d+)\.(\w+)$", name)
    if one is None:  # PEFT's ParamWrapper.get_delta_weight
        parameter = "gate_up_proj" if name.endswith(".base_layer") else "down_proj"
        weight = _oriented(modules[name.removesuffix(".base_layer")], parameter)
        count = len(weight)
        by_expert = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count)
        weight += scale * torch.einsum("o r e, e r i -> e o i", by_expert[1], by_expert[0])
        return
    experts = modules[one[1].replace(".block_sparse_moe.", ".mlp.")]
    parameter = "down_proj" if one[3] in ("down_proj", "w2") else "gate_up_proj"
    weight = _oriented(experts, parameter)[int(one[2])]
    first = len(weight) // 2 if one[3] in ("up_proj", "w3") else 0
    weight[first : first + len(b)] += scale * b @ a


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
        if ".experts" in name:
            _add_to_experts(modules, name, a, b, config["lora_alpha"] / config["r"])
            continue
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
