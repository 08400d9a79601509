"""A REST server of ours on a free port, in a thread of its own, over the fake engine and a real (small) tokenizer."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx

from pagoda.config.schema import PagodaConfig
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.serving.app import create_app
from pagoda.serving.build import make_context
from pagoda.serving.context import ServingContext
from pagoda.serving.http.listener import listen
from pagoda.serving.http.server import HttpServer
from pagoda.serving.v2.service import V2Service
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool
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


@cache
def checkpoint() -> Path:
    """A tiny checkpoint, of which the fake engine needs the tokenizer only."""
    return write_dummy_checkpoint(Path(tempfile.mkdtemp()) / "tiny", DummySpec(num_layers=1))


class RestHarness:
    """The server and its parts; use as a context. `client` talks to it; `engine` can be told what to do."""

    def __init__(self, *, is_ready: bool = True, max_model_len: int = 128, **settings: Any) -> None:
        self.config = PagodaConfig(
            model=str(checkpoint()), model_name="demo", host="127.0.0.1", http_port=0, tokenizer_pool_size=1, **settings
        )
        self._is_ready = is_ready
        self._max_model_len = max_model_len
        self._loop = asyncio.new_event_loop()
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
        self.run(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

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

    def eventually(self, condition: Callable[[], bool], seconds: float = 10.0) -> bool:
        """Whether `condition` comes true within `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    async def _start(self) -> None:
        self.engine = FakeEngineClient(max_model_len=self._max_model_len)
        self.context = make_context(self.config, self.engine)
        self.service = V2Service(self.context.models, self.context.health)
        app = create_app(self.context, self.service)
        self.server = HttpServer(app, self.config, self.context.health)
        listener = listen(self.config)
        self.port = listener.getsockname()[1]
        self._serving = asyncio.ensure_future(self.server.serve(listener))
        await asyncio.wait((self._serving,), timeout=0.01)
        if self._serving.done():
            self._serving.result()
        self.pool = TokenizerPool.from_config(self.config)
        self.engine.health.enter_stage("weights")
        await self.pool.start()
        if self._is_ready:
            await self.load()

    async def load(self) -> None:
        """Become ready."""
        await self.engine.start()
        self.context.runner.attach(TextGenerator.from_config(self.engine, self.pool, self.config))
        self.context.health.text_is_ready()

    async def _stop(self) -> None:
        self.server.close()
        await self._serving
        await self.pool.shutdown()
