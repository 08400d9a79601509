"""Imports point down the list of docs/architecture.md and form no circle, and what must start quickly imports nothing heavy.

Read out of the source of every module: nothing is imported here. An import inside a function (`LAZY`) or for types only
(`TYPE`) points down like any other; what an import of the module loads (`RUNTIME`) decides whether the module is light.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = (REPOSITORY / "runtime/pagoda", REPOSITORY / "kernels/pagoda_kernels")

# From top to bottom: a module may import its own room and the rooms below it. A module is in the room with the longest name
# that its own name begins with.
ROOMS = (
    "pagoda.__main__",
    "pagoda.cli",
    "pagoda.monitoring",
    "pagoda.benchmarking",
    # Of a server: what puts it together, then the protocols, then what they share.
    *("pagoda.serving.server", "pagoda.serving.frontends", "pagoda.serving.lifecycle", "pagoda.serving.build"),
    *("pagoda.serving.app", "pagoda.serving.server_routes", "pagoda.serving.platform_routes"),
    *("pagoda.serving.sleep_routes", "pagoda.serving.settings_routes"),
    "pagoda.serving.pooling",
    *("pagoda.serving.anthropic", "pagoda.serving.ollama", "pagoda.serving.tgi", "pagoda.serving.ui"),
    "pagoda.serving.openai",
    "pagoda.serving.grpc",
    "pagoda.serving.v2",
    "pagoda.serving.http",
    "pagoda.serving",
    "pagoda.serving.metrics",
    "pagoda",  # the names that `import pagoda` offers
    "pagoda.llm",
    "pagoda.text",
    "pagoda.engine.data_parallel",
    "pagoda.engine.client",
    "pagoda.engine.core",
    "pagoda.engine",
    "pagoda.speculation",
    "pagoda.structured",
    "pagoda.distributed.ray",
    "pagoda.distributed",
    "pagoda.execution",
    "pagoda.models",
    "pagoda.parallel",
    "pagoda.scheduling",
    "pagoda.request",
    "pagoda.adapters",
    "pagoda.tenants",
    "pagoda.sampling",
    "pagoda.pooling",
    "pagoda.structured.spec",  # what a request asks for, beside its other parameters
    "pagoda.config",
    "pagoda.platform",
    *(
        "pagoda.fair_turns",
        "pagoda.faults",
        "pagoda.framing",
        "pagoda.logs",
        "pagoda.process_control",
        "pagoda.timers",
        "pagoda.errors",
        "pagoda.version",
    ),
    "pagoda_kernels.gpu",
    "pagoda_kernels.cpu",
    "pagoda_kernels.reference",
    "pagoda_kernels",
)

# Packages of others that only these rooms may import, at whatever time.
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "kserve": (),  # its clients are tested against; its server is not used
    "fastapi": ("pagoda.serving",),
    "starlette": ("pagoda.serving",),
    "httptools": ("pagoda.serving.http",),
    "prometheus_client": ("pagoda.serving", "pagoda.benchmarking", "pagoda.monitoring"),
    "h2": ("pagoda.serving.grpc",),
    "hyperframe": ("pagoda.serving.grpc",),
    "grpc": ("pagoda.serving.grpc", "pagoda.benchmarking"),
    "google": ("pagoda.serving.grpc",),
    "pydantic": ("pagoda.serving", "pagoda.config.validation"),
    "ray": ("pagoda.distributed.ray",),
    "opentelemetry": ("pagoda.serving.tracing",),
    "triton": ("pagoda_kernels.gpu",),
}

# What no import of `LLM`, or of anything below it, may load: the engine runs on a machine that has none of them.
SERVER_PACKAGES = frozenset(
    {"kserve", "fastapi", "starlette", "httptools", "prometheus_client", "grpc", "google", "pydantic", "ray"}
)

# Rooms and modules of which an import may load torch. Of all others none does, nor of those in `LIGHT`: the API process, the
# commands, the scheduler and what describes a model or a rank start without it. The longer name decides.
LOADS_TORCH = (
    *("pagoda.llm", "pagoda.engine.core.executors", "pagoda.engine.core.loop", "pagoda.engine.core.startup"),
    *("pagoda.execution", "pagoda.models", "pagoda.sampling", "pagoda.parallel", "pagoda_kernels"),
    *("pagoda.distributed", "pagoda.distributed.ray.executor"),
    *("pagoda.benchmarking.engine_runs", "pagoda.cli.bench_latency", "pagoda.cli.bench_throughput"),
)
LIGHT = (
    *("pagoda.distributed.rank_process", "pagoda.distributed.rank_launcher", "pagoda.distributed.node_state"),
    "pagoda.distributed.ray",
    *("pagoda.models.config", "pagoda.models.sharding", "pagoda.models.weight_size", "pagoda.models.checkpoint_source"),
    *("pagoda.models.dummy", "pagoda.models.quantization.config_reader", "pagoda.models.quantization.schemes"),
    *("pagoda.parallel.layout", "pagoda.parallel.interfaces", "pagoda.parallel.rank_info"),
    *("pagoda.sampling.params", "pagoda.sampling.output"),
    *("pagoda.models.pooling_config", "pagoda.models.encoders.config", "pagoda.models.encoders.families"),
    "pagoda.models.lora.peft",
    "pagoda_kernels.gpu.machine_code",
)


RUNTIME, LAZY, TYPE = "runtime", "lazy", "type"


class Import(NamedTuple):
    """`name`: as it is written, with the imported name after the module's; `kind`: RUNTIME, LAZY or TYPE."""

    name: str
    kind: str


def imports_in(source: str) -> Iterator[Import]:
    """Every import statement of a module, a name at a time."""
    yield from _imports(ast.parse(source), RUNTIME)


def _imports(node: ast.AST, kind: str) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, kind) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used here"
        yield from (Import(f"{node.module}.{alias.name}", kind) for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for statement in node.body:
            yield from _imports(statement, TYPE)
        for statement in node.orelse:
            yield from _imports(statement, kind)
    else:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inner = LAZY if is_function and kind == RUNTIME else kind
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, inner)


@cache
def module_files() -> dict[str, Path]:
    """Every module by its full name."""
    modules = {}
    for root in ROOTS:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@cache
def imports() -> dict[str, list[Import]]:
    """What each module imports."""
    return {name: list(imports_in(path.read_text(encoding="utf-8"))) for name, path in module_files().items()}


def module_of(name: str) -> str | None:
    """The module of ours that an imported name is, or is in; None for others' modules."""
    while name and name not in module_files():
        name = name.rpartition(".")[0]
    return name or None


def graph(*kinds: str) -> dict[str, set[str]]:
    """The modules of ours that each module imports in one of these ways."""
    return {
        name: {other for item in found if item.kind in kinds and (other := module_of(item.name)) not in (None, name)}
        for name, found in imports().items()
    }


def room_of(module: str) -> str:
    """The room of a module."""
    while module not in ROOMS:
        module = module.rpartition(".")[0]
        assert module, "a module is in no room"
    return module


def is_in(module: str, rooms: Iterable[str]) -> bool:
    """Whether a module is one of `rooms`, or in one; the room `pagoda` is that package's own module alone."""
    return any(module == room or (room != "pagoda" and module.startswith(room + ".")) for room in rooms)


def longest(module: str, rooms: Iterable[str]) -> int:
    """The length of the longest of `rooms` that a module is in; 0 where it is in none."""
    return max((len(room) for room in rooms if is_in(module, [room])), default=0)


def circles(edges: Mapping[str, set[str]]) -> list[frozenset[str]]:
    """The strongly connected components of more than one node (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[frozenset[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            position = stack.index(node)
            component = frozenset(stack[position:])
            del stack[position:]
            if len(component) > 1:
                found.append(component)

    for node in edges:
        if node not in order:
            visit(node)
    return found


def loaded_by(module: str) -> dict[str, str | None]:
    """Each module of ours that an import of `module` loads, and the one that imports it first."""
    edges = graph(RUNTIME)
    importer: dict[str, str | None] = {}
    pending: list[tuple[str, str | None]] = [(module, None)]
    while pending:
        name, origin = pending.pop()
        if name in importer:
            continue
        importer[name] = origin
        pending += [(other, name) for other in edges[name]]
        if "." in name:
            pending.append((name.rpartition(".")[0], name))  # Python imports the packages around a module too
    return importer


def packages_loaded_by(module: str, packages: frozenset[str]) -> list[str]:
    """How an import of `module` loads any of `packages`: a chain of imports for each."""
    importer = loaded_by(module)
    chains: list[str] = []
    for name in importer:
        for item in imports()[name]:
            if item.kind == RUNTIME and item.name.partition(".")[0] in packages:
                chain = [item.name]
                step: str | None = name
                while step is not None:
                    chain.append(step)
                    step = importer[step]
                chains.append(" <- ".join(chain))
    return chains


def test_the_kinds_of_import_are_told_apart() -> None:
    source = """
import os, a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from c import d
else:
    import e
try:
    import f
except ImportError:
    pass
class G:
    import g
    def method(self):
        import h
        from i import j as k
"""
    assert list(imports_in(source)) == [
        Import("os", RUNTIME),
        Import("a.b", RUNTIME),
        Import("typing.TYPE_CHECKING", RUNTIME),
        Import("c.d", TYPE),
        Import("e", RUNTIME),
        Import("f", RUNTIME),
        Import("g", RUNTIME),
        Import("h", LAZY),
        Import("i.j", LAZY),
    ]


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert circles(edges) == [frozenset("abc")]


def test_every_room_is_there() -> None:
    assert [room for room in (*ROOMS, *LIGHT, *LOADS_TORCH) if room not in module_files()] == []
    assert len(set(ROOMS)) == len(ROOMS)


def test_imports_point_down() -> None:
    floor = {room: index for index, room in enumerate(ROOMS)}
    upward = {
        (module, other)
        for module, others in graph(RUNTIME, LAZY, TYPE).items()
        for other in others
        if floor[room_of(other)] < floor[room_of(module)]
    }
    assert sorted(upward) == []


def test_no_modules_import_each_other() -> None:
    assert [sorted(circle) for circle in circles(graph(RUNTIME, LAZY, TYPE))] == []


def test_packages_of_others_are_imported_in_their_rooms_only() -> None:
    outside = [
        f"{module} imports {item.name}"
        for module, found in imports().items()
        for item in found
        if item.kind != TYPE
        and (package := item.name.partition(".")[0]) in ONLY_IN
        and not is_in(module, ONLY_IN[package])
    ]
    assert outside == []


@pytest.mark.parametrize("room", ROOMS[ROOMS.index("pagoda") :])
def test_the_engine_loads_no_server(room: str) -> None:
    chains = [
        chain
        for module in module_files()
        if room_of(module) == room
        for chain in packages_loaded_by(module, SERVER_PACKAGES)
    ]
    assert chains == []


def test_light_modules_load_no_torch() -> None:
    light = [module for module in module_files() if longest(module, LIGHT) >= longest(module, LOADS_TORCH)]
    assert len(light) > 150, "the lists fit no module"
    assert [chain for module in light for chain in packages_loaded_by(module, frozenset({"torch"}))] == []


def test_a_server_without_traces_loads_nothing_of_opentelemetry() -> None:
    loaded = [
        loaded_by(module) for module in ("pagoda.serving.server", "pagoda.serving.frontends", "pagoda.serving.build")
    ]
    assert not [
        name
        for found in loaded
        for name in found
        if name in ("pagoda.serving.tracing.otel", "pagoda.serving.tracing.export")
    ]
    assert packages_loaded_by("pagoda.serving.tracing.seam", frozenset({"opentelemetry"})) == []
