"""`pagoda doctor`: what this machine is, what is installed, and every setting with its source and the reason for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pagoda.cli.doctor_cluster import cluster_as_text, examine_cluster
from pagoda.cli.doctor_security import examine_security, security_as_lines
from pagoda.config.command_line import parse_command_line
from pagoda.config.schema import PagodaConfig, options, rules
from pagoda.config.sources import LoadedConfig, load
from pagoda.config.values import format_bytes
from pagoda.engine.core.auto import ResolvedSettings, kv_cache_element_bytes, resolve
from pagoda.engine.core.kv_sizing import fit_max_model_len
from pagoda.errors import PagodaError
from pagoda.execution.kv_memory import choose_cpu_kv_cache_bytes
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.models.config import ModelConfig
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.models.weight_size import ELEMENT_BYTES, expected_weight_bytes
from pagoda.platform.hardware import (
    CpuReport,
    GpuReport,
    MemoryReport,
    cpu_report,
    gpu_reports,
    memory_report,
    versions,
)


def run(arguments: Sequence[str]) -> int:
    """Print the report; exit status 1 if the settings cannot work here."""
    parser = argparse.ArgumentParser(
        prog="pagoda doctor",
        description="Show hardware, versions and settings; takes the same settings as `pagoda serve`.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--cluster", action="store_true", help="the Ray cluster and its network, without loading a model"
    )
    flags = ("--json", "--cluster", "-h", "--help")
    own_words = [word for word in parse_command_line(arguments).others if word in flags]
    own = parser.parse_args(own_words)
    settings = [word for word in arguments if word not in own_words]
    report = examine_cluster(settings) if own.cluster else examine(settings)
    text = cluster_as_text if own.cluster else as_text
    print(json.dumps(report, indent=2) if own.json else text(report))
    return 1 if report["problem"] else 0


def examine(settings: Sequence[str]) -> dict[str, Any]:
    """The whole report as plain values.

    Keys: `hardware` (`cpu`, `memory`, `gpus`), `versions`, `settings` (by name: `value`, `source`, `help`), `security`,
    `model`, `choices` (`key`, `value`, `reason`), `kv_cache` (the expected equation), `problem` (a sentence, or None).
    """
    report: dict[str, Any] = {
        "hardware": {"cpu": asdict(cpu_report()), "memory": asdict(memory_report()), "gpus": []},
        "versions": versions(),
        "settings": {},
        "security": None,
        "model": None,
        "choices": [],
        "kv_cache": None,
        "problem": None,
    }
    try:
        loaded = load(settings, vllm=True)
        report["settings"] = _settings(loaded)
        report["security"] = examine_security(loaded.config)
        gpus = () if loaded.config.device == "cpu" else gpu_reports()
        report["hardware"]["gpus"] = [asdict(gpu) for gpu in gpus]
        _examine_model(report, loaded.config, cpu_report(), memory_report(), gpus)
    except PagodaError as error:
        report["problem"] = str(error)
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = ["Hardware", *_hardware_lines(report["hardware"]), "", "Versions"]
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in report["versions"].items()]
    if report["settings"]:
        lines += ["", "Settings"]
    for key, setting in report["settings"].items():
        lines += [f"  {key} = {setting['value']}    [{setting['source']}]", f"      {setting['help']}"]
    if report["security"]:
        lines += ["", "Open", *security_as_lines(report["security"])]
    if report["model"]:
        lines += ["", "Model", *(f"  {name:<18} {value}" for name, value in report["model"].items())]
    if report["choices"]:
        lines += ["", "Chosen for this machine"]
        lines += [f"  {choice['key']} = {choice['value']}    ({choice['reason']})" for choice in report["choices"]]
    if report["kv_cache"]:
        lines += ["", f"Expected {report['kv_cache']}"]
    if report["problem"]:
        lines += ["", f"PROBLEM: {report['problem']}"]
    return "\n".join(lines)


def _settings(loaded: LoadedConfig) -> dict[str, dict[str, str]]:
    settings = {}
    for key, info in options().items():
        value = getattr(loaded.config, key)
        text = ("auto" if info.auto else "none") if value is None else rules().shown(key, value)
        settings[key] = {"value": text, "source": loaded.sources[key], "help": info.help}
    return settings


def _examine_model(
    report: dict[str, Any], config: PagodaConfig, cpu: CpuReport, memory: MemoryReport, gpus: Sequence[GpuReport]
) -> None:
    """Fill in what depends on the checkpoint, if it is on this machine already."""
    is_here = config.model is None or Path(config.model).expanduser().is_dir()
    model = ModelConfig.from_directory(checkpoint_directory(config.model)) if is_here else None
    resolved = resolve(config, checkpoint_dtype=model.dtype if model else None, cpu=cpu, gpus=gpus)
    report["choices"] = [asdict(choice) for choice in resolved.choices]
    if model is None:
        return
    element_bytes = ELEMENT_BYTES[resolved.dtype]
    quantization = choose_quantization(
        config.quantization, config.quantization_group_size, model.quantization, model.linear_input_sizes
    )
    is_packed = resolved.device == "cpu" and config.cpu_kernels != "reference" and resolved.dtype != "float16"
    weight_bytes = expected_weight_bytes(model, resolved.dtype, quantization, packed=is_packed)
    report["model"] = {
        "architecture": model.architecture,
        "parameters": model.num_parameters(),
        "weights": f"{format_bytes(weight_bytes)}: {quantization or model.dtype}, computed in {resolved.dtype}",
        "KV per token": format_bytes(
            model.kv_bytes_per_token(kv_cache_element_bytes(config.kv_cache_dtype, element_bytes))
        ),
        "longest sequence": model.max_context_length,
    }
    if resolved.device == "cpu":
        num_replicas = config.data_parallel_size
        free = max(0, memory.available - num_replicas * weight_bytes) // num_replicas
        _expect_kv_cache(report, config, model, resolved, free)


def _expect_kv_cache(
    report: dict[str, Any], config: PagodaConfig, model: ModelConfig, resolved: ResolvedSettings, free_bytes: int
) -> None:
    block_bytes = model.kv_bytes_per_token(ELEMENT_BYTES[resolved.dtype]) * config.block_size
    choice = choose_cpu_kv_cache_bytes(
        config.kv_cache_memory_bytes,
        memory_available=free_bytes,
        block_bytes=block_bytes,
        block_size=config.block_size,
        max_model_len=config.max_model_len or model.max_context_length,
        max_num_seqs=resolved.max_num_seqs,
    )
    report["choices"].append(asdict(choice))
    report["kv_cache"] = fit_max_model_len(
        block_bytes=block_bytes,
        available_bytes=choice.value,
        block_size=config.block_size,
        model_max_len=model.max_context_length,
        max_model_len=config.max_model_len,
        num_blocks_override=config.num_gpu_blocks_override,
    ).equation


def _hardware_lines(hardware: dict[str, Any]) -> list[str]:
    cpu, memory = hardware["cpu"], hardware["memory"]
    quota = "no quota" if cpu["quota"] is None else f"quota {cpu['quota']:g}"
    limit = "no limit" if memory["limit"] is None else f"limit {format_bytes(memory['limit'])}"
    lines = [
        f"  cpu     {cpu['name']} ({cpu['architecture']})",
        f"  cores   {cpu['usable_cores']} to use: {cpu['physical_cores']} physical, {cpu['logical_cores']} logical, {quota}",
        f"  sets    {' '.join(cpu['instruction_sets']) or 'none known'}",
        f"  memory  {format_bytes(memory['available'])} free of {format_bytes(memory['total'])}, {limit}",
    ]
    for gpu in hardware["gpus"]:
        capability = ".".join(map(str, gpu["capability"]))
        lines.append(f"  gpu {gpu['index']}   {gpu['name']}, {format_bytes(gpu['memory'])}, capability {capability}")
    return lines if hardware["gpus"] else [*lines, "  gpu     none looked for, or none found"]
