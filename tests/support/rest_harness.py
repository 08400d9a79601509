"""A REST server of ours on a free port, in a thread of its own, over the fake engine and a real (small) tokenizer."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvloop

from pagoda.config.schema import PagodaConfig, options
from pagoda.config.sources import LoadedConfig
from pagoda.serving.app import create_app
from pagoda.serving.build import make_context
from pagoda.serving.context import ServingContext
from pagoda.serving.http.listener import listen
from pagoda.serving.http.server import HttpServer
from pagoda.serving.settings import Settings
from pagoda.serving.v2.service import V2Service
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool
from tests.support.checkpoints import shared_checkpoint
from tests.support.fake_engine import FakeEngineClient

T = TypeVar("T")


def import_kserve() -> Any:
    """KServe reads the command line when it is imported, which is pytest's here."""
    ours, sys.argv = sys.argv, ["pagoda", "--configure_logging", "false"]
    try:
        import kserve
    finally:
        sys.argv = ours
    return kserve


class RestHarness:
    """The server and its parts; use as a context. `client` talks to it; `engine` can be told what to do."""

    def __init__(
        self, *, is_ready: bool = True, max_model_len: int = 128, checkpoint: str | None = None, **settings: Any
    ) -> None:
        self.config = PagodaConfig(
            model=checkpoint or str(shared_checkpoint()),  # the fake engine needs its tokenizer only
            model_name="demo",
            host="127.0.0.1",
            http_port=0,
            tokenizer_pool_size=1,
            **settings,
        )
        self._is_ready = is_ready
        self._generator: TextGenerator | None = None
        self._max_model_len = max_model_len
        self._loop = uvloop.new_event_loop()  # as the server does; with asyncio each answer waits for a delayed ACK
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.engine: FakeEngineClient
        self.context: ServingContext

    def __enter__(self) -> RestHarness:
        self._thread.start()
        self.run(self._start)
        # Certificates of tests are signed by nobody; localhost is never asked through a proxy.
        self.client = httpx.Client(base_url=self.url, timeout=20, verify=False, trust_env=False)
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.run(self.stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    @property
    def url(self) -> str:
        scheme = "https" if self.config.ssl_certfile else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    def run(self, make: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """The result of a coroutine function, run in the server's loop."""

        async def call() -> T:
            return await make(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(20)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a plain function in the server's loop."""

        async def call() -> None:
            function(*arguments)

        self.run(call)

    async def _start(self) -> None:
        self.engine = FakeEngineClient(max_model_len=self._max_model_len)
        self.context = make_context(self.config, self.engine)
        self.settings = Settings(self.context, LoadedConfig(self.config, dict.fromkeys(options(), "test")))
        self.service = V2Service(self.context.models, self.context.health, self.context.repository)
        app = create_app(self.context, self.service, self.settings)
        self.server = HttpServer(app, self.config, self.context.health)
        listener = listen(self.config.host, self.config.http_port, "http_port")
        self.port = listener.getsockname()[1]
        self._serving = asyncio.ensure_future(self.server.serve(listener, self.server.tls_context()))
        await asyncio.wait((self._serving,), timeout=0.01)
        if self._serving.done():
            self._serving.result()
        self.pool = TokenizerPool.from_config(self.config)
        self.engine.health.enter_phase("weights")
        await self.pool.start()
        if self._is_ready:
            await self.load()

    async def load(self) -> None:
        """Become ready."""
        await self.engine.start()
        self._generator = TextGenerator.from_config(self.engine, self.pool, self.config)
        self.context.models.default.runner.attach(self._generator)
        for adapters in self.context.repository.adapters:
            await adapters.start()
        self.context.models.default.health.text_is_ready()

    async def stop(self) -> None:
        """End the server as it ends by itself, which may come twice."""
        for adapters in self.context.repository.adapters:
            await adapters.stop()
        self.server.close()
        await self._serving
        await self.context.repository.stop_watching()
        await self.context.repository.end_text_layers()
        if self._generator is not None:
            await self._generator.shutdown()
        await self.pool.shutdown()
        await self.context.tracing.close()


def harness_with_template(template: str, directory: Path) -> RestHarness:
    """A harness whose model has this chat template, written to `directory`, and room for long conversations."""
    path = directory / "template.jinja"
    path.write_text(template)
    return RestHarness(max_model_len=4096, chat_template=str(path))
