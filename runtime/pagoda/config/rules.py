"""What a value must be: types and bounds of single settings, and what must hold between them.

Needs the standard library only: Python callers of the engine get the same errors as the command line does, without pydantic.
The bounds are those of the schema, which hands its tables in; nothing is listed here a second time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pagoda.config.kv_events import KVEventsConfig
from pagoda.config.lora import parse_lora_module
from pagoda.config.option import OptionInfo
from pagoda.config.sizes import exact_bytes
from pagoda.config.speculation import HEAD_METHODS, MODEL_METHODS, SpeculativeConfig
from pagoda.errors import ConfigError

SCOPES = ("infer", "read", "admin")
"""Of an API key."""

_MAX_SHOWN_CHARACTERS = 200
_API_KEY = re.compile(r"[!-~]{1,512}")
_HASHED_KEY = re.compile(r"sha256:[0-9a-fA-F]{64}")
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "none"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: the setting, its value as it may be shown, where it came from, and what is allowed."""

    key: str
    value: str
    allowed: str
    source: str = ""

    def __str__(self) -> str:
        origin = f" ({self.source})" if self.source else ""
        return (
            f"{self.key}={self.value}{origin}: {self.allowed}" if self.value else f"{self.key}{origin}: {self.allowed}"
        )


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise one `ConfigError` that lists all problems; return if there are none."""
    lines = [str(problem) for problem in problems]
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError(f"{len(lines)} settings are wrong:\n" + "\n".join(f"  {line}" for line in lines))


@dataclass(frozen=True, slots=True)
class Rules:
    """What the settings of a schema must be: `types`, `infos` and `defaults` of each by its name."""

    types: Mapping[str, Any]
    infos: Mapping[str, OptionInfo]
    defaults: Mapping[str, Any]

    def shown(self, key: str, value: object) -> str:
        """`value` as it may be printed: a secret's is not, and of a long one the beginning."""
        info = self.infos.get(key)
        if info is not None and info.secret:
            return "<secret>" if value else "()"
        if info is not None and info.unit == "bytes" and isinstance(value, int):
            return exact_bytes(value)
        text = value if isinstance(value, str) else repr(value)
        return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[: _MAX_SHOWN_CHARACTERS - 3]}..."

    def allowed_values(self, key: str) -> str:
        """What the setting `key` may be, in words: "an integer of at least 1, or auto"."""
        info, annotation = self.infos[key], self.types[key]
        parts = []
        for member in _members(annotation):
            if get_origin(member) is Literal:
                parts.append("one of " + ", ".join(map(str, get_args(member))))
            elif member is NoneType:
                parts.append("auto" if info.auto else "none")
            elif get_origin(member) is tuple:
                words = get_args(get_args(member)[0])
                parts.append(f"a list of {', '.join(words) or 'strings'}")
            elif get_origin(member) is not None:
                parts.append("a JSON object")
            else:
                parts.append(_TYPE_NAMES[member] + _bounds(info))
                if info.unit == "bytes":
                    parts.append("a size such as 512MiB")
        return ", or ".join(parts)

    def choices(self, key: str) -> tuple[str, ...]:
        """The words of which the setting `key` is one; empty when its value is free."""
        return tuple(str(word) for m in _members(self.types[key]) if get_origin(m) is Literal for word in get_args(m))

    def value_problems(self, values: Mapping[str, Any]) -> list[Problem]:
        """All problems of a complete set of values (every setting by name), each alone first, then between settings."""
        problems = [
            Problem(key, self.shown(key, value), f"must be {self.allowed_values(key)}")
            for key, value in values.items()
            if not _fits(self.types[key], value, self.infos[key])
        ]
        wrong = {problem.key for problem in problems}
        sound = {key: default if key in wrong else values[key] for key, default in self.defaults.items()}
        return problems + self.relation_problems(sound)

    def relation_problems(self, values: Mapping[str, Any]) -> list[Problem]:
        """Problems between settings, and settings of parts that this version does not have; each value alone is sound."""
        problems = []

        def refuse(key: str, allowed: str) -> None:
            problems.append(Problem(key, self.shown(key, values[key]), allowed))

        if values["block_size"] & (values["block_size"] - 1):
            refuse("block_size", "must be a power of two")
        tokens, sequences = values["max_num_batched_tokens"], values["max_num_seqs"]
        if tokens is not None and sequences is not None and tokens < sequences:
            refuse(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs={sequences}: a step gives every running sequence one token or more",
            )
        if values["models"] is not None or values["model_dir_root"] is not None:
            if values["model"] is not None:
                refuse("model", "must not be given beside models or model_dir_root; put it into models")
            if values["data_parallel_size"] > 1:
                refuse("data_parallel_size", "must be 1 with several models")
        else:
            for key in ("load_models", "load_on_demand", "max_loaded_models", "idle_unload_seconds"):
                if values[key] != self.defaults[key]:
                    refuse(key, "needs models or model_dir_root: one model is loaded as long as the server runs")
        if values["models"] is not None and not all(
            isinstance(entry, Mapping) and key and not any(map(str.isspace, key))
            for key, entry in values["models"].items()
        ):
            refuse("models", "must map names without spaces to objects of settings")
        elif values["models"] is not None and not values["models"]:
            refuse("models", "must have an entry")
        if (values["ssl_certfile"] is None) != (values["ssl_keyfile"] is None):
            given, missing = (
                ("ssl_certfile", "ssl_keyfile") if values["ssl_certfile"] else ("ssl_keyfile", "ssl_certfile")
            )
            refuse(given, f"needs {missing} too")
        inflight, largest = (
            values["max_inflight_body_bytes"],
            max(values["max_body_bytes"], values["max_grpc_message_bytes"]),
        )
        if inflight is not None and inflight < 2 * largest:
            refuse(
                "max_inflight_body_bytes",
                f"must be at least {exact_bytes(2 * largest)}, twice the larger of max_body_bytes and max_grpc_message_bytes: "
                "an API key may hold as much as is free",
            )
        if values["http_port"] == values["grpc_port"] != 0:
            refuse("grpc_port", "must differ from http_port")
        if any(not key for key in values["api_keys"]):
            refuse("api_keys", "must not hold an empty key")
        elif any(_API_KEY.fullmatch(key) is None for key in values["api_keys"]):
            refuse("api_keys", "must hold keys of visible ASCII characters without spaces, at most 512 of them")
        elif any(key.startswith("sha256:") and _HASHED_KEY.fullmatch(key) is None for key in values["api_keys"]):
            refuse("api_keys", "must have 64 hexadecimal digits after sha256:")
        elif len(set(values["api_keys"])) < len(values["api_keys"]):
            refuse("api_keys", "must not hold a key twice")
        if not set(values["anonymous_scopes"]) <= set(SCOPES):
            refuse("anonymous_scopes", f"must hold some of {', '.join(SCOPES)}")
        elif values["anonymous_scopes"] and not values["api_keys"] and values["api_keys_file"] is None:
            refuse("anonymous_scopes", "needs api_keys or api_keys_file: without keys everybody may do everything")
        if values["data_parallel_size"] > 1 and (
            values["distributed_executor_backend"] == "ray" or values["ray_address"] is not None
        ):
            refuse("data_parallel_size", "must be 1 with Ray: replicas run on one machine")
        if values["distributed_executor_backend"] == "mp" and values["ray_address"] is not None:
            refuse(
                "ray_address",
                "must be none with distributed_executor_backend=mp, which uses no Ray cluster; use ray or auto",
            )
        if values["num_scheduler_steps"] > 1 and values["pipeline_parallel_size"] > 1:
            refuse(
                "num_scheduler_steps",
                f"must be 1 with pipeline_parallel_size={values['pipeline_parallel_size']}: the first stage does not know the "
                "tokens that the last one samples",
            )
        if values["runaway_max_period"] * 2 > values["runaway_min_tokens"]:
            refuse("runaway_max_period", f"must be at most half of runaway_min_tokens={values['runaway_min_tokens']}")
        if values["quantization_group_size"] not in (None, 32, 64, 128):
            refuse("quantization_group_size", "must be 32, 64 or 128, or auto")
        if values["quantization_group_size"] is not None and values["quantization"] != "int4":
            refuse("quantization_group_size", "needs quantization=int4: nothing else is quantized in groups at load")
        if values["speculative_config"] is not None:
            try:
                method = SpeculativeConfig.parse(values["speculative_config"]).method
            except ValueError as error:
                refuse("speculative_config", str(error))
            else:
                if method in MODEL_METHODS and values["num_scheduler_steps"] > 1:
                    refuse("num_scheduler_steps", f"must be 1 with method {method}, which follows every step")
                if method in HEAD_METHODS and values["pipeline_parallel_size"] > 1:
                    refuse(
                        "pipeline_parallel_size",
                        f"must be 1 with method {method}: its head reads hidden states of layers of several stages",
                    )
        objectives = values["inference_objectives"]
        if objectives is not None:
            if not all(type(priority) is int and abs(priority) < 1 << 31 for priority in objectives.values()):
                refuse("inference_objectives", "must have integers of 32 bits as priorities")
            elif values["scheduling_policy"] != "priority":
                refuse("inference_objectives", "needs scheduling_policy=priority")
        if values["kv_events_config"] is not None:
            try:
                KVEventsConfig.parse(values["kv_events_config"])
            except (TypeError, ValueError) as error:
                refuse("kv_events_config", str(error))
        self._check_adapters(values, refuse)
        return problems

    @staticmethod
    def _check_adapters(values: Mapping[str, Any], refuse: Callable[[str, str], None]) -> None:
        if values["max_cpu_loras"] is not None and values["max_cpu_loras"] < values["max_loras"]:
            refuse("max_cpu_loras", f"must be at least max_loras={values['max_loras']}")
        names = set()
        for text in values["lora_modules"]:
            try:
                name = parse_lora_module(text).name
            except ValueError as error:
                refuse("lora_modules", str(error))
                return
            if name in names:
                refuse("lora_modules", f"must not hold the name {name} twice")
            names.add(name)
        for key in ("lora_modules", "lora_dir"):
            if values[key] and not values["enable_lora"]:
                refuse(key, "needs enable_lora")

    def path_problems(self, values: Mapping[str, Any]) -> list[Problem]:
        """Files and directories that are named but not there; each value alone is sound.

        Left out of construction: a configuration may be built on one machine and used on another.
        """
        problems = []
        for key, info in self.infos.items():
            value = values[key]
            if value is None or not info.path:
                continue
            if info.path == "file" and not Path(value).is_file():
                problems.append(Problem(key, self.shown(key, value), "there is no such file"))
            elif info.path == "file or directory" and not Path(value).exists():
                problems.append(Problem(key, self.shown(key, value), "there is no such file or directory"))
            elif info.path == "checkpoint" and not Path(value).expanduser().exists():
                if not value.startswith(("/", ".", "~")):
                    continue  # it may be a Hugging Face id
                problems.append(Problem(key, self.shown(key, value), "there is no such directory or GGUF file"))
            elif info.path == "directory" and not Path(value).expanduser().is_dir():
                problems.append(Problem(key, self.shown(key, value), "there is no such directory"))
        return problems


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _bounds(info: OptionInfo) -> str:
    if info.pattern is not None:
        return f" {info.pattern_help}"
    low = f"at least {info.ge:g}" if info.ge is not None else f"greater than {info.gt:g}" if info.gt is not None else ""
    high = f"at most {info.le:g}" if info.le is not None else f"less than {info.lt:g}" if info.lt is not None else ""
    bounds = " and ".join(part for part in (low, high) if part)
    return f" of {bounds}" if bounds.startswith("at least") else f" {bounds}" if bounds else ""


def _fits(annotation: Any, value: Any, info: OptionInfo) -> bool:
    return any(_fits_member(member, value, info) for member in _members(annotation))


def _fits_member(member: Any, value: Any, info: OptionInfo) -> bool:
    origin = get_origin(member)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(member)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits_member(get_args(member)[0], item, info) for item in value)
    if origin is not None:
        return isinstance(value, Mapping)
    if member is str:
        return isinstance(value, str) and (info.pattern is None or re.fullmatch(info.pattern, value) is not None)
    if member in (int, float):
        return _is_number(member, value) and _within(value, info)
    return isinstance(value, member)


def _is_number(member: type, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (member is float and isinstance(value, float) and math.isfinite(value))


def _within(value: float, info: OptionInfo) -> bool:
    return (
        (info.ge is None or value >= info.ge)
        and (info.gt is None or value > info.gt)
        and (info.le is None or value <= info.le)
        and (info.lt is None or value < info.lt)
    )
