"""A REST and a gRPC server of several models over fake engines, each of which comes and goes as a real one would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from pagoda.config.models import model_configs
from pagoda.config.schema import PagodaConfig, options
from pagoda.config.sources import LoadedConfig
from pagoda.serving.app import create_app
from pagoda.serving.build import make_context_of_several
from pagoda.serving.grpc.server import GrpcServer
from pagoda.serving.http.listener import listen
from pagoda.serving.http.server import HttpServer
from pagoda.serving.settings import Settings
from pagoda.serving.v2.service import V2Service
from tests.support.checkpoints import shared_checkpoint
from tests.support.fake_engine import FakeEngineClient
from tests.support.rest_harness import RestHarness


class SeveralHarness(RestHarness):
    """`names`: models, all of one checkpoint; `entries`: more of their settings. `engines`: those of the models by name.

    `held`: models whose engines do not come up before the test lets them (`may_load`). `made`: engines of other versions, in
    the order in which they were made; `on_made` sees each.
    """

    def __init__(
        self,
        *names: str,
        entries: dict[str, dict[str, Any]] | None = None,
        max_model_len: int = 4096,
        held: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(max_model_len=max_model_len, is_ready=not held)
        self._held = held
        checkpoint = str(shared_checkpoint())
        models = {name: {"model": checkpoint, **(entries or {}).get(name, {})} for name in names}
        self.config = PagodaConfig(
            models=models or None, host="127.0.0.1", http_port=0, grpc_port=0, tokenizer_pool_size=1, **settings
        )
        self.engines: dict[str, FakeEngineClient] = {}
        self.made: list[FakeEngineClient] = []
        self.on_made: Callable[[FakeEngineClient], None] = lambda engine: None

    async def _start(self) -> None:
        models = model_configs(self.config)
        self.engines = {name: FakeEngineClient(max_model_len=self._max_model_len) for name in models}
        for name in self._held:
            self.engines[name].may_load.clear()
        self.context = make_context_of_several(
            self.config, models, list(self.engines.values()), make_engine=self._make_engine
        )
        self.repository = self.context.repository
        self.settings = Settings(self.context, self._load_config(), self._load_config)
        self.service = V2Service(self.context.models, self.context.health, self.repository)
        self.server = HttpServer(
            create_app(self.context, self.service, self.settings), self.config, self.context.health
        )
        listener = listen(self.config.host, self.config.http_port, "http_port")
        self.port = listener.getsockname()[1]
        self._serving = asyncio.ensure_future(self.server.serve(listener, self.server.tls_context()))
        self.grpc = GrpcServer(self.context, self.service)
        await self.grpc.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc.port}")
        at_start = self.config.load_models or (() if self.config.load_on_demand else models)
        self.starting = asyncio.ensure_future(self.repository.start(at_start))
        if self._is_ready:
            await self.starting

    async def stop(self) -> None:
        self.channel.close()
        await self.grpc.stop(0)
        self.server.close()
        await self._serving
        await self.repository.shutdown()

    def _make_engine(self, config: PagodaConfig, name: str) -> FakeEngineClient:
        engine = FakeEngineClient(max_model_len=self._max_model_len)
        self.made.append(engine)
        if "version" not in name:
            self.engines[config.served_model_name] = engine
        self.on_made(engine)
        return engine

    def _load_config(self) -> LoadedConfig:
        return LoadedConfig(self.config, dict.fromkeys(options(), "test"))

    def reload(self, **settings: Any) -> None:
        """Have the sources say something else, and be read again."""
        self.config = replace(self.config, **settings)
        self.run(self.settings.reload, "the test")

    def state(self, name: str) -> str:
        """The state of a model."""
        return str(self.engines[name].health.state)

    def complete(self, model: str, **body: Any) -> Any:
        return self.client.post("/v1/completions", json={"model": model, "prompt": "a b c", "max_tokens": 4, **body})
