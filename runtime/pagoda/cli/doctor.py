"""`pagoda doctor`: what this machine is, what is installed, and every setting with its source and the reason for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pagoda.cli.doctor_cluster import cluster_as_text, examine_cluster
from pagoda.cli.doctor_security import examine_security, security_as_lines
from pagoda.cli.parser import CommandParser
from pagoda.config.command_line import parse_command_line
from pagoda.config.schema import PagodaConfig, option_defaults, options, rules
from pagoda.config.sources import LoadedConfig, load
from pagoda.config.values import format_bytes
from pagoda.engine.core.auto import ResolvedSettings, kv_cache_element_bytes, resolve
from pagoda.engine.core.kv_sizing import fit_max_model_len, fitting_block_size
from pagoda.errors import PagodaError
from pagoda.execution.kv_memory import choose_cpu_kv_cache_bytes
from pagoda.models.checkpoint_files import is_checkpoint
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
from pagoda.serving.model_check import check_model


def run(arguments: Sequence[str]) -> int:
    """Print the report; exit status 1 if the settings cannot work here."""
    parser = CommandParser(
        prog="pagoda doctor",
        usage="pagoda doctor [MODEL] [--json] [--changed] [--cluster] [SETTINGS]",
        description="Show hardware, versions and settings; takes the same settings as `pagoda serve`.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--changed", action="store_true", help="only the settings that differ from their defaults")
    parser.add_argument(
        "--cluster", action="store_true", help="the Ray cluster and its network, without loading a model"
    )
    own_words = [word for word in parse_command_line(arguments).others if word in _FLAGS]
    own = parser.parse_args(own_words)
    settings = [word for word in arguments if word not in own_words]
    if own.changed:
        report, text = examine_changed(settings), changed_as_text
    elif own.cluster:
        report, text = examine_cluster(settings), cluster_as_text
    else:
        report, text = examine(settings), as_text
    print(json.dumps(report, indent=2) if own.json else text(report))
    return 1 if report["problem"] else 0


_FLAGS = ("--json", "--changed", "--cluster", "-h", "--help")


def examine_changed(arguments: Sequence[str]) -> dict[str, Any]:
    """The `settings` that somebody chose and that are not what they would be without, each with its `default`; `problem` as in
    `examine`, as far as small files tell.
    """
    report: dict[str, Any] = {"settings": {}, "problem": None}
    try:
        loaded = load(arguments, vllm=True, flags=_FLAGS)
        for key, setting in _settings(loaded).items():
            default = _shown(key, option_defaults()[key])
            if setting["source"] not in ("default", "derived") and setting["value"] != default:
                report["settings"][key] = {**setting, "default": default}
        check_model(loaded.config)
    except PagodaError as error:
        report["problem"] = str(error)
    return report


def changed_as_text(report: dict[str, Any]) -> str:
    """The same as text."""
    lines = [
        f"{key} = {setting['value']}    [{setting['source']}; default {setting['default']}]"
        for key, setting in report["settings"].items()
    ]
    if report["problem"]:
        lines.append(f"PROBLEM: {report['problem']}")
    return "\n".join(lines) or "every setting has its default"


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
        loaded = load(settings, vllm=True, flags=_FLAGS)
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
        settings[key] = {
            "value": _shown(key, getattr(loaded.config, key)),
            "source": loaded.sources[key],
            "help": info.help,
        }
    return settings


def _shown(key: str, value: Any) -> str:
    return ("auto" if options()[key].auto else "none") if value is None else rules().shown(key, value)


def _examine_model(
    report: dict[str, Any], config: PagodaConfig, cpu: CpuReport, memory: MemoryReport, gpus: Sequence[GpuReport]
) -> None:
    """Fill in what depends on the checkpoint, if it is on this machine already."""
    is_here = config.model is None or is_checkpoint(Path(config.model).expanduser())
    model = (
        ModelConfig.from_directory(
            checkpoint_directory(config.model, gguf=config.quantization == "gguf"), model_impl=config.model_impl
        )
        if is_here
        else None
    )
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
    element_bytes = ELEMENT_BYTES[resolved.dtype]
    groups = model.kv_groups(config.block_size, config.max_model_len)
    config = replace(config, block_size=fitting_block_size(config.block_size, groups, 1, element_bytes))
    groups = model.kv_groups(config.block_size, config.max_model_len)
    block_bytes = groups.block_bytes(range(model.num_layers), 1, config.block_size, element_bytes)
    longest, step_tokens = config.max_model_len or model.max_context_length, resolved.max_num_batched_tokens
    choice = choose_cpu_kv_cache_bytes(
        config.kv_cache_memory_bytes,
        memory_available=free_bytes,
        block_bytes=block_bytes,
        block_size=config.block_size,
        rules=groups.rules,
        max_num_seqs=resolved.max_num_seqs,
        max_model_len=longest,
        max_step_tokens=step_tokens,
    )
    report["choices"].append(asdict(choice))
    report["kv_cache"] = fit_max_model_len(
        block_bytes=block_bytes,
        available_bytes=choice.value,
        block_size=config.block_size,
        model_max_len=model.max_context_length,
        max_model_len=config.max_model_len,
        num_blocks_override=config.num_gpu_blocks_override,
        rules=groups.rules,
        max_step_tokens=step_tokens,
        one_group_factor=groups.one_group_factor(config.block_size),
        state_bytes=groups.state_bytes(),
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
