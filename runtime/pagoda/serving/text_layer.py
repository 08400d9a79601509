"""The text layer of a served model: tokenizers, and what is made with them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.interface import EngineClient
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.serving.auth.api_keys import caller_var
from pagoda.text.checkpoint_defaults import pools
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool
from pagoda.text.pooling import TextPooler


class TextLayer:
    """The tokenizers, and the text layer over them."""

    def __init__(self, config: PagodaConfig, client: EngineClient) -> None:
        self._config = config
        self._client = client
        self._pool: TokenizerPool | None = None
        self._generator: TextGenerator | TextPooler | None = None

    async def start(self) -> None:
        """Find the checkpoint (which may be a download) and load its tokenizer."""
        config = self._config
        directory = await asyncio.to_thread(
            checkpoint_directory,
            config.model,
            config.revision,
            config.download_dir,
            gguf=config.quantization == "gguf",
        )
        self._config = replace(config, model=str(directory))
        self._pool = TokenizerPool.from_config(self._config, caller=_caller)
        await self._pool.start()

    @property
    def last_use(self) -> float:
        """When a call of a tokenizer ended last, in monotonic seconds: now, while one runs."""
        return 0.0 if self._pool is None else self._pool.last_use

    def generator(self) -> TextGenerator | TextPooler:
        """The text layer of the served checkpoint, after `start`: of a model that generates, or of one that pools."""
        assert self._pool is not None
        if self._generator is not None:
            return self._generator
        if pools(self._config):
            self._generator = TextPooler(self._client, self._pool, self._config)
        else:
            self._generator = TextGenerator.from_config(self._client, self._pool, self._config)
        return self._generator

    async def shutdown(self, grace: float = 0.0) -> None:
        """End the tokenizers, which have `grace` seconds for what they are at, and what compiles grammars."""
        if self._generator is not None:
            await self._generator.shutdown()
        if self._pool is not None:
            await self._pool.shutdown(grace)


def _caller() -> tuple[str, float]:
    caller = caller_var.get()
    return caller.tenant, caller.limits.weight
