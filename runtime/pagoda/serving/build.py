"""Builds the parts of a server beside its engine: what all protocols share, and the text layer."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.client import EngineClient
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.serving.auth.api_keys import ApiKeys, caller_var
from pagoda.serving.context import ServingContext
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.generation import GenerationRunner
from pagoda.serving.health import ServerHealth
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.metrics.request_meter import RequestMeter
from pagoda.serving.models import ServedModel, ServedModels
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool


def make_context(config: PagodaConfig, client: EngineClient, keys: ApiKeys | None = None) -> ServingContext:
    """What all protocols share; the generator is attached to its runner once the checkpoint is there."""
    keys = ApiKeys.from_config(config) if keys is None else keys
    metrics = Metrics(config.served_model_name, config.metrics_prefix, vllm_names=config.vllm_metric_names)
    metrics.watch(client)
    _report_keys(metrics, keys)
    health = ServerHealth(client)
    runner = GenerationRunner(
        None,
        health,
        request_timeout_seconds=config.request_timeout_seconds,
        observe=lambda job, arrival_time: RequestMeter(metrics, job.params, arrival_time),
    )
    return ServingContext(
        config=config,
        client=client,
        models=ServedModels(ServedModel(config.served_model_name, runner, health, config.model_aliases)),
        runner=runner,
        health=health,
        metrics=metrics,
        keys=keys,
        decoding=DecodingThreads(),
    )


def _report_keys(metrics: Metrics, keys: ApiKeys) -> None:
    metrics.report("api_keys", "Number of API keys in force.", lambda: len(keys))
    if (file := keys.file) is None:
        return
    metrics.report(
        "api_keys_last_reload_successful", "Whether api_keys_file could be used the last time.", lambda: file.is_current
    )
    metrics.report(
        "api_keys_last_reload_success_timestamp_seconds",
        "When the keys in force were last seen in api_keys_file.",
        lambda: file.last_success,
    )


class TextLayer:
    """The tokenizers, and the text layer over them."""

    def __init__(self, config: PagodaConfig, client: EngineClient) -> None:
        self._config = config
        self._client = client
        self._pool: TokenizerPool | None = None
        self._generator: TextGenerator | None = None

    async def start(self) -> None:
        """Find the checkpoint (which may be a download) and load its tokenizer."""
        config = self._config
        directory = await asyncio.to_thread(checkpoint_directory, config.model, config.revision, config.download_dir)
        self._config = replace(config, model=str(directory))
        self._pool = TokenizerPool.from_config(self._config, caller=_caller)
        await self._pool.start()

    def generator(self) -> TextGenerator:
        """The text layer of the served checkpoint, after `start`."""
        assert self._pool is not None
        self._generator = TextGenerator.from_config(self._client, self._pool, self._config)
        return self._generator

    async def shutdown(self) -> None:
        """End the tokenizers, and what compiles grammars."""
        if self._generator is not None:
            await self._generator.shutdown()
        if self._pool is not None:
            await self._pool.shutdown()


def _caller() -> tuple[str, float]:
    caller = caller_var.get()
    return caller.tenant, caller.limits.weight
