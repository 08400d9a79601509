"""Settings while the server runs: what they are, where they come from, and changing those that can.

    PATCH /settings, SIGHUP, watched file ─▶ check all ─▶ text layers built beside ─▶ engines, between two steps ─▶ in force
                                              └─ any refusal: nothing has changed

A setting says in the schema how it changes (`OptionInfo.live`): the server reads it anew, a text layer with it takes over with
the next request, or the engine takes it between two steps. What sizes memory does not change without a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pagoda.adapters import LoraAdapter
from pagoda.config.models import changed, checkpoints_in, model_configs, serves_several
from pagoda.config.names import normalized, settings_by_name
from pagoda.config.option import OptionInfo
from pagoda.config.schema import PagodaConfig, option_defaults, options, rules
from pagoda.config.sources import LoadedConfig
from pagoda.engine.health import EngineState
from pagoda.errors import ConfigError, PagodaError
from pagoda.logs import AUDIT_LOGGER, set_level
from pagoda.serving.context import ServingContext
from pagoda.serving.models import ServedModel
from pagoda.serving.text_layer import TextLayer

logger = logging.getLogger(__name__)
audit = logging.getLogger(AUDIT_LOGGER)

WATCH_SECONDS = 2.0
_OF_THE_LIST = ("models", "load_models")
_WITHOUT_ENGINE = (EngineState.UNLOADED, EngineState.DEAD)
_ENGINE_NAMES = {
    "runaway_detection": "repetition_detection",
    "runaway_max_period": "repetition_max_period",
    "runaway_min_tokens": "repetition_min_tokens",
}
"""Settings whose names in `SchedulerLimits` are others."""


@dataclass(slots=True)
class _Change:
    """Of one model: its settings before and after, the text layer that is to take over, and the adapters of its list."""

    model: ServedModel
    before: PagodaConfig
    after: PagodaConfig
    text: TextLayer | None = None
    adapters: list[LoraAdapter] | None = None

    def names(self, live: str) -> list[str]:
        """The settings that differ, of one kind of change."""
        return [name for name in _differing(self.before, self.after) if options()[name].live == live]


class Settings:
    """The settings of a server and of its models. One change after another; each whole or not at all.

    `loaded`: how the server was started. `load`: reads all sources again, as it did then.
    """

    def __init__(
        self, context: ServingContext, loaded: LoadedConfig, load: Callable[[], LoadedConfig] | None = None
    ) -> None:
        self._context = context
        self._loaded = loaded
        self._load = load
        self._turn = asyncio.Lock()
        self._sources: dict[tuple[str, str], str] = {}  # of what was changed, by model and setting
        self._is_several = serves_several(loaded.config)
        self._declared = model_configs(loaded.config) if self._is_several else {}
        self._reloading = asyncio.Lock()
        if self._is_several:
            context.repository.discover = self.look_for_models
        self.generation = 1
        context.metrics.report(
            "settings_generation", "Times that settings were in force anew.", lambda: self.generation
        )

    # ---- reading --------------------------------------------------------------------------------------------------

    def shown(self, model: str | None = None) -> dict[str, Any]:
        """Every setting of the server, or of one model: value, source, default, and whether it can change while it runs."""
        config = self._context.config if model is None else self._context.models.find(model).config
        name = "" if model is None else self._context.models.find(model).name
        found = {}
        for key, info in options().items():
            if model is not None and self._is_several and info.is_of_server:
                continue
            value = getattr(config, key)
            found[key] = {
                "value": rules().shown(key, value) if info.secret else value,
                "default": option_defaults()[key],
                "source": self._source(name, key),
                "can_change": bool(info.live),
                "note": _note(info),
            }
        return found

    def _source(self, model: str, key: str) -> str:
        changed_by = self._sources.get((model, key)) or self._sources.get(("", key))
        if changed_by is not None:
            return changed_by
        if model and self._is_several:
            entry = (self._loaded.config.models or {}).get(model, {})
            if any(settings_by_name().get(normalized(str(written))) == key for written in entry):
                return f"models.{model}"
        return self._loaded.sources[key]

    # ---- changing -------------------------------------------------------------------------------------------------

    async def change(
        self, changes: Mapping[str, Any], source: str, model: str | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """Put `changes`, written as in a file, into force; returns the values before and after.

        `model`: for one of several; None: for the server, and each of its models. Raises `ConfigError` with all that is wrong,
        `EngineNotReadyError`, or what building a text layer raises; then nothing has changed.
        """
        async with self._turn:
            return await self._change(changes, source, model)

    async def _change(self, changes: Mapping[str, Any], source: str, model: str | None) -> dict[str, tuple[Any, Any]]:
        context = self._context
        server_before = context.config
        if model is None:
            server_after = changed(server_before, changes, _refusal)
            of_models = {key: value for key, value in changes.items() if not _is_of_server(key)}
            targets: Iterable[ServedModel] = context.models
        else:
            server_after, of_models, targets = server_before, dict(changes), [context.models.find(model)]
        plans = []
        for target in targets:
            context.repository.check_settled(target)
            after = changed(target.config, of_models, _refusal_of_model if self._is_several else _refusal)
            if not self._is_several:
                after = server_after
            _check_speculation(target, after)
            plans.append(_Change(target, target.config, after))
        await self._prepare(plans, server_before, server_after)
        return self._commit(plans, server_after, source, model)

    async def _prepare(self, plans: list[_Change], server_before: PagodaConfig, server_after: PagodaConfig) -> None:
        """Everything that may fail, which is taken back if any of it does."""
        reconfigured: list[_Change] = []
        level = server_after.log_level if server_after.log_level != server_before.log_level else None
        try:
            for plan in plans:
                if plan.names("text") and plan.model.runner.has_generator:
                    plan.text = TextLayer(plan.after, plan.model.client)
                    await plan.text.start()
                    plan.text.generator()
            for plan in plans:
                if plan.names("adapters"):
                    plan.adapters = await self._context.repository.adapters_of(plan.model).prepare(plan.after.adapters)
            for plan in plans:
                limits = _limits(plan.after, plan.names("engine"))
                if level is not None:
                    limits["log_level"] = level
                if limits and plan.model.health.state not in _WITHOUT_ENGINE:
                    await plan.model.client.reconfigure(limits)
                    reconfigured.append(plan)
        except BaseException:  # raised on, with everything as it was
            for plan in reconfigured:
                with suppress(PagodaError):
                    before = _limits(plan.before, plan.names("engine"))
                    await plan.model.client.reconfigure({**before, "log_level": server_before.log_level})
            for plan in plans:
                if plan.text is not None:
                    await plan.text.shutdown()
            raise

    def _commit(
        self, plans: list[_Change], server_after: PagodaConfig, source: str, model: str | None
    ) -> dict[str, tuple[Any, Any]]:
        """Nothing here can fail, or waits."""
        found: dict[str, tuple[Any, Any]] = {}
        before = self._context.config
        for key in _differing(before, server_after):
            found[key] = (getattr(before, key), getattr(server_after, key))
            self._sources["", key] = source
        self._context.config = server_after
        set_level(server_after.log_level)
        for plan in plans:
            for key in _differing(plan.before, plan.after):
                found[key] = (getattr(plan.before, key), getattr(plan.after, key))
                self._sources[plan.model.name, key] = source
            plan.model.reconfigure(plan.after)
            if plan.adapters is not None:
                self._context.repository.adapters_of(plan.model).commit(plan.adapters)
            self._context.repository.reconfigured(plan.model, plan.text)
        if found:
            self.generation += 1
            what = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in found.items())
            of = f" of model {model}" if model is not None else ""
            audit.info("settings%s, generation %d, changed by %s: %s", of, self.generation, source, what[:2000])
        return found

    # ---- the sources once more ------------------------------------------------------------------------------------

    async def reload(self, why: str) -> None:
        """Read all sources again, and put into force what is other there than when they were read the last time.

        What is wrong, or cannot change, is logged, and nothing changes.
        """
        if self._load is None:
            return
        try:
            async with self._reloading:
                loaded = await asyncio.to_thread(self._load)
                await self._apply(loaded, why)
        except PagodaError as error:
            logger.error("%s: the settings stay as they are: %s", why, error)

    async def look_for_models(self) -> None:
        """Serve what is in `model_dir_root` by now; what is there no longer is served no longer."""
        async with self._reloading:
            await self._follow_models(self._loaded.config, "model_dir_root")

    async def _apply(self, loaded: LoadedConfig, why: str) -> None:
        before, after = self._loaded.config, loaded.config
        differing = _differing(before, after)
        if self._is_several != serves_several(after):
            raise ConfigError("models: a server of one model cannot become one of several while it runs; restart it")
        names = [key for key in differing if key not in _OF_THE_LIST]
        if self._is_several:
            model_configs(after)  # raises before anything is changed
        if names:
            await self.change({key: getattr(after, key) for key in names}, why)
        self._loaded = loaded
        if self._is_several:
            await self._follow_models(after, why)

    async def _follow_models(self, config: PagodaConfig, why: str) -> None:
        """Serve the models that the list has, with the settings that it has, and no others. What one cannot is said, and is
        tried again with the next reading; the others are as the list has them."""
        repository, news = self._context.repository, await asyncio.to_thread(model_configs, config)
        if news == self._declared:
            return
        repository.resize(self._context.config, news)
        wanted = set(config.load_models or (() if config.load_on_demand else news))
        problems = []
        for name in {**self._declared, **news}:
            before, after = self._declared.get(name), news.get(name)
            if before == after:
                continue
            try:
                if after is None:
                    await repository.remove(name)
                    del self._declared[name]
                elif before is None:
                    self._declared[name] = after
                    await repository.add(after, load=name in wanted)
                else:
                    await self._follow_model(name, before, after, why)
                    self._declared[name] = after
                audit.info("model %s %s, by %s", name, _fate(before, after), why)
            except PagodaError as error:
                problems.append(f"{name}: {error}")
        self._context.config = replace(self._context.config, models=config.models)
        if problems:
            raise ConfigError(f"models: {'; '.join(problems)}")

    async def _follow_model(self, name: str, before: PagodaConfig, after: PagodaConfig, why: str) -> None:
        differing = _differing(before, after)
        if all(options()[key].live for key in differing):
            await self.change({key: getattr(after, key) for key in differing}, why, name)
            return
        if before.model_aliases != after.model_aliases:
            raise ConfigError("model_aliases cannot change while the server runs; restart it")
        await self._context.repository.redefine(name, after)

    async def watch(self) -> None:
        """Reload when the configuration file changes, or what `model_dir_root` has, until cancelled; a ConfigMap is a link
        that is set anew."""
        paths = [path for path in (self._loaded.file, self._loaded.config.model_dir_root) if path is not None]
        if self._load is None:
            return
        seen = {path: await asyncio.to_thread(_identity, path) for path in paths}
        while paths:
            await asyncio.sleep(WATCH_SECONDS)
            for path in paths:
                now = await asyncio.to_thread(_identity, path)
                if now != seen[path] and now is not None:
                    seen[path] = now
                    await self.reload(f"file {path}" if path == self._loaded.file else f"directory {path}")


def _identity(path: str) -> tuple[object, ...] | None:
    """What changes when the file does, or when a directory has other checkpoints: one may get its files one by one."""
    try:
        status = Path(path).stat()
        names = tuple(checkpoints_in(path)) if Path(path).is_dir() else ()
    except (OSError, ConfigError):
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size, names


def _fate(before: PagodaConfig | None, after: PagodaConfig | None) -> str:
    if before is None:
        return "is served"
    return "is served no longer" if after is None else "has other settings"


def _differing(before: PagodaConfig, after: PagodaConfig) -> list[str]:
    return [key for key in options() if getattr(before, key) != getattr(after, key)]


def _is_of_server(written: str) -> bool:
    key = settings_by_name().get(normalized(written))
    return key is not None and options()[key].is_of_server


def _refusal(info: OptionInfo) -> str | None:
    return None if info.live else "cannot change while the server runs; restart it with the new value"


def _refusal_of_model(info: OptionInfo) -> str | None:
    return "is the server's: one for all models" if info.is_of_server else _refusal(info)


def _note(info: OptionInfo) -> str:
    return {
        "": "needs a restart",
        "server": "at once",
        "text": "with the next request",
        "engine": "between two steps of the engine",
        "adapters": "with the next request; those that run keep theirs",
    }[info.live]


def _check_speculation(model: ServedModel, after: PagodaConfig) -> None:
    """Drafts may be fewer, none, or as many as at the start again: another method would need another proposer, and memory."""
    old, new = model.speculation, after.speculation
    if new is None or model.config.speculative_config == after.speculative_config:
        return
    if old is None or replace(old, num_speculative_tokens=1) != replace(new, num_speculative_tokens=1):
        raise ConfigError(
            "speculative_config: only num_speculative_tokens can change while the server runs, down from that of the start, "
            "and none turns it off; another method needs a restart"
        )


def _limits(config: PagodaConfig, names: Iterable[str]) -> dict[str, Any]:
    """The settings by their names in `SchedulerLimits`."""
    limits: dict[str, Any] = {}
    for name in names:
        if name == "speculative_config":
            drafts = config.speculation
            limits["num_speculative_tokens"] = 0 if drafts is None else drafts.num_speculative_tokens
        else:
            limits[_ENGINE_NAMES.get(name, name)] = getattr(config, name)
    return limits
