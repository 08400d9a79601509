"""`pagoda serve`: builds every part, and runs them in one event loop beside the engine's own process."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import replace

import uvloop

from pagoda import faults
from pagoda.config.models import model_configs, serves_several
from pagoda.config.schema import PagodaConfig
from pagoda.config.sources import LoadedConfig
from pagoda.engine.client.interface import EngineClient
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.data_parallel.client import create_engine_client
from pagoda.logs import configure_logging
from pagoda.platform.terminal import has_colors
from pagoda.process_control import uncollected
from pagoda.serving.auth.api_keys import ApiKeys
from pagoda.serving.greeting import CurrentStderr, Greeting
from pagoda.serving.http.listener import listen, raise_open_file_limit
from pagoda.serving.model_check import check_model
from pagoda.serving.tracing.setup import check_tracing

logger = logging.getLogger(__name__)


def run(loaded: LoadedConfig, core: PrelaunchedProcess, load: Callable[[], LoadedConfig] | None = None) -> int:
    """Serve until a signal, with an engine in `core`; returns the exit status. `load`: reads the settings again.

    Raises `ConfigError` for a port that is taken, for a file of API keys that cannot be used, and for traces that cannot be
    exported.
    """
    config = loaded.config
    is_several = serves_several(config)
    if is_several:
        model_configs(config)  # raises before anything is begun
    else:
        check_model(config)
    check_tracing(config)
    keys = ApiKeys.from_config(config)
    greeting = Greeting.on_terminal(config, sys.stderr)
    handler = configure_logging(
        config.log_level,
        config.log_format,
        model_name=None if is_several else config.served_model_name,
        secrets=config.api_keys,
        is_secret=keys.is_known,
        quiet_paths=config.disable_access_log_for_endpoints,
        access_log=not config.disable_uvicorn_access_log,
        stream=CurrentStderr() if greeting is not None else None,
        colors=has_colors(sys.stderr),
    )
    if greeting is not None:
        handler.addFilter(greeting.lets_pass)
    for note in loaded.notes:
        logger.warning("%s", note)
    faults.install(config.fault_injection)
    raise_open_file_limit()
    with (
        listen(config.host, config.http_port, "http_port") as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        try:
            serve = _serve_several if is_several else _serve
            return runner.run(serve(loaded, listener, core, keys, greeting, load))
        finally:
            if greeting is not None:
                greeting.close()


async def _serve(
    loaded: LoadedConfig,
    listener: socket.socket,
    core: PrelaunchedProcess,
    keys: ApiKeys,
    greeting: Greeting | None,
    reload: Callable[[], LoadedConfig] | None,
) -> int:
    """Of one model. The engine gets its settings before this process imports its servers, for nothing else runs meanwhile."""
    config = loaded.config
    client = create_engine_client(_of_engine(loaded, greeting), core)
    starting = asyncio.ensure_future(client.start())
    configured = asyncio.ensure_future(client.configured.wait())
    await asyncio.wait((starting, configured), return_when=asyncio.FIRST_COMPLETED)
    configured.cancel()
    with uncollected():
        from pagoda.serving.build import make_context
        from pagoda.serving.frontends import serve
        from pagoda.serving.settings import Settings
    context = make_context(config, client, keys, _make_engine(loaded, greeting))
    if greeting is not None:
        greeting.follow(context.health)

    async def load() -> None:
        await context.repository.start_only(starting)
        _freeze()
        if greeting is not None:
            greeting.ready(client.ready)

    try:
        return await serve(context, load, listener, Settings(context, loaded, reload), greeting)
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await context.repository.shutdown()


async def _serve_several(
    loaded: LoadedConfig,
    listener: socket.socket,
    core: PrelaunchedProcess,
    keys: ApiKeys,
    greeting: Greeting | None,
    reload: Callable[[], LoadedConfig] | None,
) -> int:
    """Of several models, each in an engine of its own that comes and goes; `core` is for the first that is loaded."""
    from pagoda.serving.build import make_context_of_several
    from pagoda.serving.frontends import serve
    from pagoda.serving.model_budget import share_out
    from pagoda.serving.settings import Settings

    config = loaded.config
    models = model_configs(config)
    budget = share_out(config, models)
    for line in budget.lines():
        logger.info("%s", line)
    at_start = list(config.load_models or (() if config.load_on_demand else models))[: budget.places]
    launched = dict.fromkeys(at_start[:1], core)
    clients = [
        create_engine_client(
            _of_engine(replace(loaded, config=one), greeting), launched.get(name), name=f"engine of {name}"
        )
        for name, one in models.items()
    ]
    context = make_context_of_several(config, models, clients, keys, budget, _make_engine(loaded, greeting))
    if not at_start:
        context.repository.keep_process(core)
    if greeting is not None:
        greeting.follow(context.health)

    async def load() -> None:
        await context.repository.start(at_start)
        _freeze()
        if greeting is not None:
            greeting.ready_with([(model.name, model.health.state.value) for model in context.models])

    try:
        return await serve(context, load, listener, Settings(context, loaded, reload), greeting)
    finally:
        await context.repository.shutdown()


def _freeze() -> None:
    gc.collect()
    gc.freeze()  # what is there now stays; collections need not look at it again


def _make_engine(loaded: LoadedConfig, greeting: Greeting | None) -> Callable[[PagodaConfig, str], EngineClient]:
    return lambda config, name: create_engine_client(_of_engine(replace(loaded, config=config), greeting), name=name)


def _of_engine(loaded: LoadedConfig, greeting: Greeting | None) -> PagodaConfig:
    """The settings of the engine's process. Where a greeting says what it does, its lines would only break into that."""
    if greeting is None or loaded.sources["log_level"] != "default":
        return loaded.config
    return replace(loaded.config, log_level="warning")
