"""`pagoda serve`: builds every part, and runs them in one event loop beside the engine's own process."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.config.sources import LoadedConfig
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.data_parallel.client import create_engine_client
from pagoda.logs import configure_logging
from pagoda.process_control import uncollected
from pagoda.serving.deferred_imports import deferred_imports
from pagoda.serving.http.listener import listen, raise_open_file_limit

logger = logging.getLogger(__name__)

KSERVE_ARGUMENTS = ("--configure_logging", "false", "--enable_docs_url", "true")
"""KServe parses the process's command line when it is imported; it is shown this one instead of ours."""
UNUSED_BY_US = ("kubernetes", "pandas")
"""What KServe imports for its client of clusters, and for requests as data frames."""
ENGINE_HEAD_START_SECONDS = 0.02


def run(loaded: LoadedConfig, core: PrelaunchedProcess) -> int:
    """Serve until told to stop, with an engine in `core`; returns the exit status.

    Raises `ConfigError` for a port that cannot be had.
    """
    config = loaded.config
    configure_logging(config.log_level, config.log_format, model_name=config.served_model_name, secrets=config.api_keys)
    faults.install(config.fault_injection)
    raise_open_file_limit()
    with listen(config) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, listener, core))


async def _serve(config: PagodaConfig, listener: socket.socket, core: PrelaunchedProcess) -> int:
    client = create_engine_client(config, core)
    starting = asyncio.ensure_future(client.start())
    # The engine gets its settings before this process loads its libraries, KServe above all: nothing else runs meanwhile.
    await asyncio.sleep(ENGINE_HEAD_START_SECONDS)
    with uncollected(), deferred_imports(*UNUSED_BY_US), _command_line(KSERVE_ARGUMENTS):
        from pagoda.serving.build import TextLayer, make_context
        from pagoda.serving.kserve.server import PagodaModelServer
    context = make_context(config, client)
    text = TextLayer(config, client)

    async def load() -> None:
        await asyncio.gather(starting, text.start())
        context.runner.attach(text.generator())
        context.health.text_is_ready()
        gc.collect()
        gc.freeze()  # what is there now stays; collections need not look at it again
        logger.info("model %r is ready: %s", context.model_name, client.ready and client.ready.kv_equation)

    try:
        return await PagodaModelServer(context, load).serve(listener)
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await text.shutdown()
        await client.shutdown()


@contextmanager
def _command_line(arguments: tuple[str, ...]) -> Iterator[None]:
    """Let the process have another command line for a while."""
    ours = sys.argv
    sys.argv = [ours[0], *arguments]
    try:
        yield
    finally:
        sys.argv = ours
