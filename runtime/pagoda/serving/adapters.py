"""Which LoRA adapters a model is served with: of `lora_modules`, of `lora_dir`, and loaded over the API.

    lora_dir/                  what is there is served: compared every `SCAN_SECONDS`
      sql/                     adapter `sql`: adapter_config.json, adapter_model.safetensors
      adapters.json            [{"name": "chat", "path": "/adapters/chat-v3"}]     of a ConfigMap, for one

All replicas of a server see the same directory, and so serve the same adapters, also after a restart. What the engine has of
them follows from requests: each carries its adapter.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pagoda.adapters import LoraAdapter
from pagoda.config.lora import LoraModule, check_adapter_name, lora_module_of
from pagoda.errors import (
    CheckpointError,
    ConfigError,
    EngineNotReadyError,
    InvalidRequestError,
    ModelNotFoundError,
    NotSupportedError,
    PagodaError,
    shown,
)
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.models.lora.peft import CONFIG_FILE
from pagoda.models.lora.source import AdapterSource, Signature, signature_of
from pagoda.serving.models import ServedModel

logger = logging.getLogger(__name__)

SCAN_SECONDS = 2.0
LOOKS_BETWEEN_TRIES = 15
"""An adapter that cannot be served is tried again, for the reason may not be in its files."""
MAX_LIST_BYTES = 1 << 20
MAX_ADAPTERS = 65536

Origin = Literal["lora_modules", "API", "lora_dir"]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What `lora_dir` has for a name, and what its files looked like."""

    module: LoraModule
    signature: Signature | None


class AdapterManager:
    """The adapters of one served model, which it puts into `ServedModel.adapters`. Used from the event loop."""

    def __init__(self, model: ServedModel, taken_names: Container[str]) -> None:
        """`taken_names`: of models, which no adapter may have."""
        self.model = model
        self._config = model.config
        self._taken_names = taken_names
        self._source: AdapterSource | None = None
        self._origins: dict[str, Origin] = {}
        self._changes = asyncio.Lock()
        self._seen: dict[str, _Entry] = {}
        self._num_looks = 0
        self._reported: dict[str, str] = {}  # what is wrong with the directory or an entry of it, said once
        self._watching: asyncio.Task[None] | None = None
        self.is_synchronized = True

    def report(self) -> None:
        """Have the metrics of the model's name be those of this version."""
        model = self.model
        if self._config.enable_lora:
            model.metrics.report("lora_adapters", "LoRA adapters that are served.", lambda: len(model.adapters))
        if self._config.lora_dir is not None:
            model.metrics.report(
                "lora_dir_last_sync_successful",
                "Whether all that lora_dir has could be served the last time.",
                lambda: self.is_synchronized,
            )

    # ---- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Serve what the settings name, and nothing that was there before. Raises `ConfigError` for one of `lora_modules` that
        cannot be."""
        self._config, self._source = self.model.config, None
        for known in (self.model.adapters, self._origins, self._seen, self._reported):
            known.clear()
        for module in self._config.adapters:
            try:
                await self.load(module.name, module.path, origin="lora_modules", base_model_name=module.base_model_name)
            except PagodaError as error:
                raise ConfigError(f"lora_modules: {module.name}: {error}") from error
        if self._config.lora_dir is not None:
            await self._reconcile(Path(self._config.lora_dir))
            self._watching = asyncio.create_task(self._watch(Path(self._config.lora_dir)), name="watch-adapters")

    async def stop(self) -> None:
        """Watch nothing more."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    # ---- changes ---------------------------------------------------------------------------------------------------

    async def load(
        self,
        name: str,
        path: str,
        *,
        origin: Origin = "API",
        in_place: bool = False,
        base_model_name: str | None = None,
    ) -> LoraAdapter:
        """Serve the adapter in the directory `path` as `name`, once the engine has it.

        `in_place`: it takes the place of one of that name. Requests that run go on with what they began with. Raises
        `InvalidRequestError` or `CheckpointError` for one that cannot be served; then nothing is changed.
        """
        self._check_enabled()
        self._check_name(name, base_model_name)
        async with self._changes:
            before = self.model.adapters.get(name)
            if before is not None:
                self._check_origin(name, origin)
                if not in_place:
                    raise InvalidRequestError(
                        f"an adapter {name} is served already; unload it, or set load_inplace", "lora_name"
                    )
            elif len(self.model.adapters) >= MAX_ADAPTERS:
                raise InvalidRequestError(f"{MAX_ADAPTERS} adapters are served, as many as may be")
            adapter = await asyncio.to_thread(self._resolve, name, path)
            if before is not None and before.adapter == adapter:
                return adapter
            if len(self.model.adapters) < self._config.num_cpu_loras:  # else others would be dropped for it
                await self.model.client.load_adapter(adapter)
            self.model.adapters[name] = self.model.with_adapter(adapter)
            self._origins[name] = origin
            if before is not None and before.adapter is not None:
                self.model.client.unload_adapter(before.adapter)
        logger.info("adapter %s is served (%s)", adapter, origin)
        return adapter

    async def prepare(self, modules: Sequence[LoraModule]) -> list[LoraAdapter]:
        """Check that `modules` can be what `lora_modules` names from now on, for `commit`; nothing is changed.

        Raises `ConfigError` with all that is wrong. Also where files of an adapter have changed: it is then another version.
        """
        found, problems = [], []
        for module in modules:
            try:
                self._check_name(module.name, module.base_model_name)
                if module.name in self._origins:
                    self._check_origin(module.name, "lora_modules")
                found.append(await asyncio.to_thread(self._resolve, module.name, module.path))
            except PagodaError as error:
                problems.append(f"lora_modules: {module.name}: {error}")
        if problems:
            raise ConfigError("\n".join(problems))
        return found

    def commit(self, adapters: Sequence[LoraAdapter]) -> None:
        """Serve what `prepare` found, and no others that `lora_modules` named before. Their weights are read with the first
        request for each; requests that run go on with what they began with."""
        served = self.model.adapters
        named = {adapter.name for adapter in adapters}
        for name in [name for name, origin in self._origins.items() if origin == "lora_modules" and name not in named]:
            before = served.pop(name).adapter
            del self._origins[name]
            if before is not None:
                self.model.client.unload_adapter(before)
        for adapter in adapters:
            before = served[adapter.name].adapter if adapter.name in served else None
            self._origins[adapter.name] = "lora_modules"
            if before != adapter:
                served[adapter.name] = self.model.with_adapter(adapter)
                if before is not None:
                    self.model.client.unload_adapter(before)

    async def take_over(self, before: AdapterManager) -> None:
        """Serve what was loaded over the API for the version before. Raises what `load` does."""
        for name, origin in list(before._origins.items()):
            adapter = before.model.adapters[name].adapter
            if origin == "API" and name not in self._origins and adapter is not None:
                await self.load(name, adapter.path)

    async def unload(self, name: str, *, origin: Origin = "API") -> None:
        """Serve an adapter no longer; requests that run with it go on. Raises `ModelNotFoundError` for one that is not."""
        self._check_enabled()
        async with self._changes:
            served = self.model.adapters.get(name)
            if served is None or served.adapter is None:
                raise ModelNotFoundError(f"adapter {shown(name)} is not served here")
            self._check_origin(name, origin)
            del self.model.adapters[name], self._origins[name]
            self.model.client.unload_adapter(served.adapter)
        logger.info("adapter %s is served no longer (%s)", name, origin)

    def _check_enabled(self) -> None:
        if not self._config.enable_lora:
            raise NotSupportedError("the model is served without LoRA adapters: set enable_lora")

    def _check_name(self, name: str, base_model_name: str | None) -> None:
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise InvalidRequestError(f"{shown(name)}: {error}", "lora_name") from error
        if name in self._taken_names:
            raise InvalidRequestError(f"{name} is the name of a model", "lora_name")
        if base_model_name is not None and base_model_name not in self.model.names:
            raise InvalidRequestError(
                f"base_model_name={shown(base_model_name)}: the model is {self.model.name}", "base_model_name"
            )

    def _check_origin(self, name: str, origin: Origin) -> None:
        """What the directory says is changed there, and what it does not say it does not change."""
        own = self._origins[name]
        if own != origin and "lora_dir" in (own, origin):
            raise InvalidRequestError(f"adapter {name} is of {own}, and changed there only", "lora_name")

    def _resolve(self, name: str, path: str) -> LoraAdapter:
        if self._source is None:
            config = self._config
            directory = checkpoint_directory(
                config.model, config.revision, config.download_dir, gguf=config.quantization == "gguf"
            )
            self._source = AdapterSource(directory, model_impl=config.model_impl, max_lora_rank=config.max_lora_rank)
        return self._source.resolve(name, path)

    # ---- lora_dir --------------------------------------------------------------------------------------------------

    async def _watch(self, directory: Path) -> None:
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            try:
                await self._reconcile(directory)
            except Exception:  # whatever it is, the next look may be better
                logger.exception("lora_dir could not be looked at")

    async def _reconcile(self, directory: Path) -> None:
        """Serve what the directory has, and nothing else of it. One that cannot be read changes nothing."""
        problems: dict[str, str] = {}
        try:
            entries = await asyncio.to_thread(_entries_of, directory, self.model.names, problems)
        except OSError as error:
            problems[str(directory)] = f"cannot be read: {error.strerror}"
        else:
            await self._follow(entries, problems)
        for key, problem in problems.items():
            if self._reported.get(key) != problem:
                logger.warning("lora_dir: %s: %s", key, problem)
        self._reported = problems
        self.is_synchronized = not problems

    async def _follow(self, entries: Mapping[str, _Entry], problems: dict[str, str]) -> None:
        for name in [name for name, origin in self._origins.items() if origin == "lora_dir" and name not in entries]:
            await self.unload(name, origin="lora_dir")
        self._num_looks += 1
        for name, entry in entries.items():
            if self._seen.get(name) == entry:
                if name not in self._reported:
                    continue
                if self._num_looks % LOOKS_BETWEEN_TRIES:
                    problems[name] = self._reported[name]
                    continue
            self._seen[name] = entry
            try:
                await self.load(name, entry.module.path, origin="lora_dir", in_place=True)
            except EngineNotReadyError:
                del self._seen[name]  # it is for the next time, as the rest
                return
            except PagodaError as error:
                problems[name] = str(error)
        self._seen = {name: entry for name, entry in self._seen.items() if name in entries}


def _entries_of(directory: Path, model_names: Iterable[str], problems: dict[str, str]) -> dict[str, _Entry]:
    """What a directory says is to be served for a model of these names. Raises `OSError` where it cannot be read.

    Names that begin with a dot are left out: a volume of Kubernetes keeps its own behind them.
    """
    modules: list[LoraModule] = []
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (path / CONFIG_FILE).exists():
                modules.append(LoraModule(path.name, str(path)))
            else:
                problems[path.name] = f"there is no {CONFIG_FILE}"
        elif path.suffix == ".json":
            try:
                modules += _listed(path)
            except (OSError, ValueError, RecursionError) as error:
                problems[path.name] = str(error)
    entries: dict[str, _Entry] = {}
    for module in modules[:MAX_ADAPTERS]:
        if module.base_model_name is not None and module.base_model_name not in model_names:
            continue
        if module.name in entries:
            problems[module.name] = "there are two adapters of that name"
            continue
        try:
            signature = signature_of(Path(module.path))
        except CheckpointError:
            signature = None  # why is said when it is loaded
        entries[module.name] = _Entry(module, signature)
    return entries


def _listed(path: Path) -> list[LoraModule]:
    """The adapters in a file: an object, or a list of them. Raises `ValueError`."""
    if path.stat().st_size > MAX_LIST_BYTES:
        raise ValueError(f"the file has more than {MAX_LIST_BYTES} bytes")
    value = json.loads(path.read_text(encoding="utf-8"))
    return [lora_module_of(each) for each in (value if isinstance(value, list) else [value])]
