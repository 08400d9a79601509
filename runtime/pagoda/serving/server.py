"""`pagoda serve`: builds every part, and runs them in one event loop beside the engine's own process."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket

import uvloop

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.config.sources import LoadedConfig
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.data_parallel.client import create_engine_client
from pagoda.logs import configure_logging
from pagoda.process_control import uncollected
from pagoda.serving.auth.api_keys import ApiKeys
from pagoda.serving.http.listener import listen, raise_open_file_limit
from pagoda.serving.model_check import check_model

logger = logging.getLogger(__name__)


def run(loaded: LoadedConfig, core: PrelaunchedProcess) -> int:
    """Serve until a signal, with an engine in `core`; returns the exit status.

    Raises `ConfigError` for a port that is taken, and for a file of API keys that cannot be used.
    """
    config = loaded.config
    check_model(config)
    keys = ApiKeys.from_config(config)
    configure_logging(
        config.log_level,
        config.log_format,
        model_name=config.served_model_name,
        secrets=config.api_keys,
        is_secret=keys.is_known,
        quiet_paths=config.disable_access_log_for_endpoints,
        access_log=not config.disable_uvicorn_access_log,
    )
    for note in loaded.notes:
        logger.warning("%s", note)
    faults.install(config.fault_injection)
    raise_open_file_limit()
    with listen(config) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, listener, core, keys))


async def _serve(config: PagodaConfig, listener: socket.socket, core: PrelaunchedProcess, keys: ApiKeys) -> int:
    client = create_engine_client(config, core)
    starting = asyncio.ensure_future(client.start())
    # The engine gets its settings before this process imports its servers, for nothing else runs meanwhile.
    configured = asyncio.ensure_future(client.configured.wait())
    await asyncio.wait((starting, configured), return_when=asyncio.FIRST_COMPLETED)
    configured.cancel()
    with uncollected():
        from pagoda.serving.build import TextLayer, make_context
        from pagoda.serving.frontends import serve
    context = make_context(config, client, keys)
    text = TextLayer(config, client)

    async def load() -> None:
        await asyncio.gather(starting, text.start())
        context.runner.attach(text.generator())
        context.health.text_is_ready()
        gc.collect()
        gc.freeze()  # what is there now stays; collections need not look at it again
        logger.info("model %r is ready: %s", context.model_name, client.ready and client.ready.kv_equation)

    try:
        return await serve(context, load, listener)
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await text.shutdown()
        await client.shutdown()
