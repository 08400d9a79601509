"""What a setting is besides its type and default, carried by its field in the schema."""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")

GROUPS = {
    "model": "Model",
    "models": "Several models",
    "device": "Device",
    "kv": "KV cache",
    "scheduler": "Scheduler",
    "speculation": "Speculative decoding",
    "adapters": "LoRA adapters",
    "parallel": "Parallelism",
    "server": "Server",
    "limits": "Limits and deadlines",
    "text": "Tokenizer and chat",
    "observability": "Logs, metrics and traces",
}

SERVER_GROUPS = ("models", "server", "observability")
"""Groups whose settings are the server's; those of the others are each model's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionInfo:
    """What is known of one setting besides its type and default.

    `ge`, `le`, `gt`, `lt` bound a number. `pattern` must match a whole string, `pattern_help` describes it. `aliases` are
    other names under which every source accepts the setting. `path`: a file or directory that must exist, or a checkpoint
    (a directory or a Hugging Face id). `auto`: None means a value chosen at start. `secret`: the value is never printed.
    `guards`: given empty it is an error, for what it guards would be open. `of_server`: it is the server's, also in a group
    whose settings are each model's own. `live`: what takes a new value while the server runs: the server at once, a new text
    layer with the next request, the engine between two steps, or what says which adapters are served; empty where that needs a
    restart.
    """

    help: str
    group: str
    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    lt: float | None = None
    pattern: str | None = None
    pattern_help: str = ""
    unit: Literal["", "bytes", "seconds", "tokens"] = ""
    path: Literal["", "file", "directory", "file or directory", "checkpoint"] = ""
    aliases: tuple[str, ...] = ()
    auto: bool = False
    secret: bool = False
    guards: bool = False
    of_server: bool = False
    live: Literal["", "server", "text", "engine", "adapters"] = ""

    @property
    def is_of_server(self) -> bool:
        """Whether a server has one value of it, whatever models it serves."""
        return self.of_server or self.group in SERVER_GROUPS


def option(default: T, group: str, help: str, **info: Any) -> T:
    """A dataclass field that carries its `OptionInfo`; typed as its default, as `dataclasses.field` itself is."""
    carried = OptionInfo(help=help, group=group, **info)
    return field(default=default, repr=not carried.secret, metadata={"option": carried})


def option_of(config_field: Field[Any]) -> OptionInfo:
    """The `OptionInfo` of a field of `PagodaConfig`."""
    return cast("OptionInfo", config_field.metadata["option"])
