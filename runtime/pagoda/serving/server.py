"""`pagoda serve`: builds every part, and runs them in one event loop beside the engine's own process."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvloop

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.config.sources import LoadedConfig
from pagoda.engine.client import EngineClient
from pagoda.engine.data_parallel import create_engine_client
from pagoda.models.source import checkpoint_directory
from pagoda.observability.logs import configure_logging
from pagoda.observability.metrics import Metrics
from pagoda.observability.request_meter import request_meters
from pagoda.serving.auth import ApiKeys
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import GenerationRunner
from pagoda.serving.health import ServerHealth
from pagoda.serving.listener import listen, raise_open_file_limit
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool

logger = logging.getLogger(__name__)

KSERVE_ARGUMENTS = ("--configure_logging", "false", "--enable_docs_url", "true")
"""KServe parses the process's command line when it is imported; it is shown this one instead of ours."""
ENGINE_HEAD_START_SECONDS = 0.05


def run(loaded: LoadedConfig) -> int:
    """Serve until told to stop; returns the exit status. Raises `ConfigError` for a port that cannot be had."""
    config = loaded.config
    configure_logging(config.log_level, config.log_format, model_name=config.served_model_name, secrets=config.api_keys)
    faults.install(config.fault_injection)
    raise_open_file_limit()
    with listen(config) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, listener))


def make_context(config: PagodaConfig, client: EngineClient) -> ServingContext:
    """What all protocols share; the generator is attached to its runner once the checkpoint is there."""
    metrics = Metrics(config.served_model_name, config.metrics_prefix)
    metrics.watch(client)
    health = ServerHealth(client)
    runner = GenerationRunner(
        None,
        health,
        request_timeout_seconds=config.request_timeout_seconds,
        observe=request_meters(metrics),
    )
    return ServingContext(
        config=config, client=client, runner=runner, health=health, metrics=metrics, keys=ApiKeys(config.api_keys)
    )


async def _serve(config: PagodaConfig, listener: socket.socket) -> int:
    client = create_engine_client(config)
    context = make_context(config, client)
    text = _Text(config, client)
    starting = asyncio.ensure_future(client.start())
    # The engine's process loads its libraries while this one loads KServe.
    await asyncio.sleep(ENGINE_HEAD_START_SECONDS)
    with _command_line(KSERVE_ARGUMENTS):
        from pagoda.serving.kserve_server import PagodaModelServer

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


class _Text:
    """The tokenizers, and the text layer over them."""

    def __init__(self, config: PagodaConfig, client: EngineClient) -> None:
        self._config = config
        self._client = client
        self._pool: TokenizerPool | None = None

    async def start(self) -> None:
        """Find the checkpoint (which may be a download) and load its tokenizer."""
        directory = await asyncio.to_thread(checkpoint_directory, self._config.model)
        self._config = replace(self._config, model=str(directory))
        self._pool = TokenizerPool.from_config(self._config)
        await self._pool.start()

    def generator(self) -> TextGenerator:
        """The text layer of the served checkpoint, after `start`."""
        assert self._pool is not None
        return TextGenerator.from_config(self._client, self._pool, self._config)

    async def shutdown(self) -> None:
        """End the tokenizers."""
        if self._pool is not None:
            await self._pool.shutdown()


@contextmanager
def _command_line(arguments: tuple[str, ...]) -> Iterator[None]:
    """Let the process have another command line for a while."""
    ours = sys.argv
    sys.argv = [ours[0], *arguments]
    try:
        yield
    finally:
        sys.argv = ours
