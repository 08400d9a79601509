"""The served models: each an object with all that a request to it needs, looked up by name by every protocol."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.errors import ModelNotFoundError, NotSupportedError, shown
from pagoda.logs import model_name_var
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.generation import MAX_SEQUENCES_PER_REQUEST, AdapterRunner, GenerationRunner
from pagoda.serving.health import ModelHealth
from pagoda.serving.inference_headers import inference_headers_var
from pagoda.serving.json_decoding import NO_LIMITS, JsonLimits
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.text.pooling import TextPooler

if TYPE_CHECKING:
    from pagoda.engine.client.interface import EngineClient
    from pagoda.engine.messages import EngineReady
    from pagoda.text.generation import TextGenerator

MAX_POOLED_PER_REQUEST = 2048
"""Inputs of a request that pools, as with OpenAI."""
MAX_POOLED_CHARACTERS = 1 << 20


class ServedModel:
    """A model by one name, and by `aliases`; answers have its name. Exists from the first second, loaded or not.

    `config`: its settings. `speculation`: as it was loaded. `client`: its engine. `runner`: runs its requests, over the text
    layer. `version`: as the V2 protocol has it in paths and answers; a new version that takes over is another object, and a
    request is of the one that it found. `adapters`: by their names, each as a model that computes its requests with the
    `adapter`, and whose `parent` this is; `AdapterManager` says which there are.
    """

    def __init__(
        self,
        config: PagodaConfig,
        client: EngineClient,
        runner: GenerationRunner,
        health: ModelHealth,
        metrics: Metrics,
        version: str = "1",
    ) -> None:
        self.name = config.served_model_name
        self.aliases = config.model_aliases
        self.version = version
        self.config = config
        self.speculation = config.speculation
        self.client = client
        self.runner = runner
        self.health = health
        self.metrics = metrics
        self.adapters: dict[str, ServedModel] = {}
        self.adapter: LoraAdapter | None = None
        self.parent: str | None = None

    def configure(self, config: PagodaConfig) -> None:
        """Run with `config` from the next load on; the name stays."""
        self.speculation = config.speculation
        self._configure(config)

    def _configure(self, config: PagodaConfig) -> None:
        self.config = config
        self.client.configure(config)
        self.client.health.drain(config.drain)

    def reconfigure(self, config: PagodaConfig) -> None:
        """Other settings are in force, of those that may change while the model is loaded."""
        self._configure(config)
        self.runner.request_timeout_seconds = config.request_timeout_seconds
        self.health.wakes_on_request = config.wake_on_request

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the model's own first."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))

    @property
    def listed(self) -> Iterator[tuple[str, ServedModel]]:
        """What clients are shown: the model under each of its names, and its adapters."""
        yield from ((name, self) for name in self.names)
        yield from self.adapters.items()

    @property
    def root(self) -> str:
        """Where the weights are from: the checkpoint, or the directory of the adapter."""
        return self.adapter.path if self.adapter is not None else self.config.model or self.name

    def take_over(self, before: ServedModel) -> None:
        """Be what the model's name stands for, in place of the version `before`, which keeps its requests.

        What others hold of the model, its health and its metrics, is this one's from now on.
        """
        own = self.health
        for model, health in ((self, before.health), (before, own)):
            model.health = model.runner.health = health
            health.wakes_on_request = model.config.wake_on_request
            for name, one in model.adapters.items():
                assert one.adapter is not None
                model.adapters[name] = model.with_adapter(one.adapter)
        self.metrics.follow(self.client)
        before.health.follow(before.client)
        self.health.follow(self.client)

    def with_adapter(self, adapter: LoraAdapter) -> ServedModel:
        """The same model as the one that requests for `adapter` are for."""
        model = copy.copy(self)
        model.name, model.aliases, model.adapters = adapter.name, (), {}
        model.adapter, model.parent = adapter, self.name
        model.runner = AdapterRunner(self.runner, adapter)
        return model

    @property
    def ready(self) -> EngineReady | None:
        """The engine's limits, once it has started."""
        return self.client.ready

    @property
    def has_files(self) -> bool:
        """Whether the checkpoint is known to be here."""
        return self.runner.has_generator or (self.config.model is not None and Path(self.config.model).exists())

    @property
    def directory(self) -> Path:
        """The checkpoint: a directory or a GGUF file. Raises `EngineNotReadyError` where it is not known yet."""
        if not self.runner.has_generator and self.has_files:
            return Path(self.config.model or "")
        return Path(self.text.directory or "")

    @property
    def text(self) -> TextGenerator | TextPooler:
        """The text layer; raises `EngineNotReadyError` while the model loads."""
        return self.runner.generator

    @property
    def generator(self) -> TextGenerator:
        """The text layer of a model that generates; raises `NotSupportedError` for one that pools, too."""
        text = self.text
        if isinstance(text, TextPooler):
            raise NotSupportedError(f"this model does not generate; it is served for {', '.join(text.tasks)}", "model")
        return text

    @property
    def json_limits(self) -> JsonLimits:
        """What a body may hold: prompts that fit the model's context, as many as a request may have."""
        ready = self.ready
        if ready is None or not self.health.is_ready:
            return NO_LIMITS
        if isinstance(self.text, TextPooler):
            # Longer texts than the model takes may be cut.
            longest = max(MAX_POOLED_CHARACTERS, self.text.pool.max_characters or 0)
            return JsonLimits(longest, MAX_POOLED_PER_REQUEST * ready.max_model_len)
        return JsonLimits(self.text.pool.max_characters, MAX_SEQUENCES_PER_REQUEST * ready.max_model_len)


class ModelRegistry:
    """The served models by their names; iterates over them, in order. The first one is asked where a request names none."""

    def __init__(self, models: Sequence[ServedModel], *, names_model: bool = False) -> None:
        """`names_model`: log lines and errors of a request are those of its model, for there are others."""
        self._models = list(models)
        self._retiring: list[ServedModel] = []
        self._names_model = names_model
        self._by_name: dict[str, ServedModel] = {}
        self._index()

    def _index(self) -> None:
        self._by_name = {name: model for model in self._models for name in model.names}

    def replace(self, before: ServedModel, model: ServedModel) -> None:
        """Requests that come from now on are for `model`; those of the version `before` count until `retired`."""
        self._models[self._models.index(before)] = model
        self._retiring.append(before)
        self._index()

    def retired(self, model: ServedModel) -> None:
        """The version has no requests any more."""
        self._retiring.remove(model)

    def add(self, model: ServedModel) -> None:
        """Serve one more."""
        self._models.append(model)
        self._index()

    def remove(self, model: ServedModel) -> None:
        """Serve one less."""
        self._models.remove(model)
        self._index()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(tuple(self._models))

    def __len__(self) -> int:
        return len(self._models)

    @property
    def default(self) -> ServedModel:
        """The model of requests that name none. Raises `ModelNotFoundError` where there is no model yet."""
        if not self._models:
            raise ModelNotFoundError("no model is served here yet")
        return self._models[0]

    def asked(self, name: str | None) -> ServedModel:
        """The model that a request is for whose body names `name`, ready or not; raises `ModelNotFoundError`.

        A gateway's header that names one takes precedence.
        """
        name = inference_headers_var.get().model or name
        model = self.default if name is None else self.find(name)
        if self._names_model:
            model_name_var.set(model.name)
        return model

    def find(self, name: str) -> ServedModel:
        """The model of that name, ready or not; raises `ModelNotFoundError`."""
        model = self._by_name.get(name)
        if model is None:
            model = next((each.adapters[name] for each in self._models if name in each.adapters), None)
        if model is None:
            # Probes are public, and tell whoever has no key nothing of what is served.
            raise ModelNotFoundError(f"model {shown(name)} is not served here{self._known()}")
        return model

    @property
    def num_running(self) -> int:
        """Jobs of all models that are running."""
        return sum(model.runner.num_running for model in (*self._models, *self._retiring))

    async def wait_until_idle(self) -> None:
        """Return once no job is running."""
        for model in (*self._models, *self._retiring):
            await model.runner.wait_until_idle()

    def stop(self) -> None:
        """Abort every running job: the server's grace period is over."""
        for model in (*self._models, *self._retiring):
            model.runner.stop()

    def _known(self) -> str:
        if not caller_var.get().scopes:
            return ""
        if not self._models:
            return "; no model is, yet"
        if len(self._models) == 1:
            return f"; the served model is {self.default.name!r}"
        return f"; the served models are {', '.join(model.name for model in self._models)}"

    @property
    def json_limits(self) -> JsonLimits:
        """What a body may hold whose model is not known yet."""
        limits = [model.json_limits for model in self._models]
        if len(limits) <= 1:
            return limits[0] if limits else NO_LIMITS
        characters = [one.max_characters for one in limits]
        token_ids = [one.max_token_ids for one in limits]
        return JsonLimits(
            None if None in characters else max(filter(None, characters)),
            None if None in token_ids else max(filter(None, token_ids)),
        )
