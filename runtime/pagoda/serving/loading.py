"""One served model brought up and down: its engine and its text layer, side by side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import suppress

from pagoda.engine.health import EngineState
from pagoda.errors import PagodaError
from pagoda.serving.adapters import AdapterManager
from pagoda.serving.models import ServedModel
from pagoda.serving.text_layer import TextLayer

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""For texts that a tokenizer has when another text layer takes over."""


class ModelLoader:
    """Loads and unloads a model, not both at a time. A load that fails leaves the model dead, with the cause in its health."""

    def __init__(self, model: ServedModel, adapters: AdapterManager) -> None:
        self._model = model
        self.adapters = adapters
        self.text: TextLayer | None = None
        self._is_text_ready = False
        self._ending: set[asyncio.Task[None]] = set()  # text layers that others have taken the place of

    async def load(self, starting: Awaitable[None] | None = None) -> None:
        """Return when the model is ready. `starting`: its engine, where that was started already.

        Raises what the engine or the text layer does.
        """
        model = self._model
        text = self.text = TextLayer(model.config, model.client)
        engine = asyncio.ensure_future(starting or model.client.start())
        tokenizers = asyncio.ensure_future(text.start())
        try:
            await asyncio.gather(engine, tokenizers)
            model.runner.attach(text.generator())
            await self.adapters.start()
        except BaseException as error:  # raised on, when both have ended
            engine.cancel()
            await asyncio.gather(engine, tokenizers, return_exceptions=True)
            await self.end_text()
            if isinstance(error, Exception) and starting is None:
                await self._fail(error)
            raise
        self._is_text_ready = True
        model.health.text_is_ready()
        ready = model.ready
        logger.info("model %r is ready: %s", model.name, ready and ready.kv_equation)

    def replace_text(self, text: TextLayer) -> None:
        """Have requests from now on use `text`; the one before ends with the requests that it has."""
        before, self.text = self.text, text
        self._model.runner.attach(text.generator())
        if before is not None:
            ending = asyncio.create_task(self._end_when_unused(before), name="old-text-layer")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def _end_when_unused(self, text: TextLayer) -> None:
        """Requests hold the generator that they began with: it goes with the last of those that were running."""
        try:
            await self._model.runner.wait_for_those_running()
        finally:
            await text.shutdown(GRACE_SECONDS)

    async def unload(self, cause: str) -> None:
        """End the engine and the tokenizers; requests that still run fail."""
        await self.adapters.stop()
        await self._model.client.unload(cause)
        await self.end_text()
        self._model.health.is_unloading = False

    async def shutdown(self) -> None:
        """End everything for good."""
        await self.adapters.stop()
        await self.end_text()
        await self._model.client.shutdown()

    async def _fail(self, error: Exception) -> None:
        """The model is dead: of its engine's failure, or of another that ended it before it was ready."""
        cause = str(error) if isinstance(error, PagodaError) else f"{type(error).__name__}: {error}"
        if self._model.health.state is not EngineState.DEAD:
            await self._model.client.unload(cause)
            self._model.health.fail(cause)
        logger.error("model %r was not loaded: %s", self._model.name, cause)

    async def end_text(self) -> None:
        """End the tokenizers, those that others have taken the place of, too."""
        for ending in list(self._ending):
            ending.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        self._model.runner.detach()
        if self._is_text_ready:
            self._is_text_ready = False
            self._model.health.text_is_gone()
        text, self.text = self.text, None
        if text is not None:
            with suppress(PagodaError):
                await text.shutdown()
