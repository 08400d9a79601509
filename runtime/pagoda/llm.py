"""Generation without a server: the engine runs in this process, one step at a time.

    llm = LLM("./Qwen3-0.6B", max_model_len=4096)
    for output in llm.generate(["Once upon a time", "The sky is"], SamplingParams(max_tokens=32)):
        print(output.outputs[0].text)

Imports neither KServe nor gRPC nor pydantic: torch, transformers and their dependencies are enough.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from pagoda.adapters import LoraAdapter, LoRARequest
from pagoda.config.schema import PagodaConfig
from pagoda.config.sources import from_kwargs
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import PhaseListener, start_core
from pagoda.engine.messages import EngineOutputs, EngineStats
from pagoda.errors import ConfigError, InvalidRequestError, NotSupportedError, PagodaError, QueueFullError
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.models.lora.source import AdapterSource
from pagoda.pooling.params import PoolingParams
from pagoda.request import EngineRequest, GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.text.chat_template import Message
from pagoda.text.checkpoint_defaults import pools, read_checkpoint_defaults
from pagoda.text.offline_pooling import OfflinePooler
from pagoda.text.operations import TextOperations
from pagoda.text.output import CompletionOutput, GenerationChunk, PoolingOutput, RequestOutput
from pagoda.text.output_processor import RequestTextState
from pagoda.text.progress import TokenProgress
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.validation import RequestLimits, validate_request

Prompt = str | list[int]


@dataclass(eq=False, slots=True)
class _Sequence:
    """One running sequence, and its chunks that were not taken yet."""

    request: EngineRequest
    state: RequestTextState
    chunks: deque[GenerationChunk] = field(default_factory=deque)
    error: PagodaError | None = None


class LLM:
    """A model and its engine in this process. Used from one thread.

    `model` is a checkpoint directory or a Hugging Face id (None: the built-in demo model); every setting of the server
    that concerns the engine is accepted by its name (`max_model_len=4096`). `on_phase(name, detail)` is called at each
    stage of loading. Raises `ConfigError` or `CheckpointError`, saying what to change.
    """

    def __init__(self, model: str | None = None, *, on_phase: PhaseListener | None = None, **settings: Any) -> None:
        self._start(from_kwargs({"model": model, **settings}), on_phase)

    @classmethod
    def from_config(cls, config: PagodaConfig, on_phase: PhaseListener | None = None) -> LLM:
        """The same from a configuration that was read elsewhere, such as from a command line."""
        llm = cls.__new__(cls)
        llm._start(config, on_phase)
        return llm

    def _start(self, config: PagodaConfig, on_phase: PhaseListener | None) -> None:
        if config.data_parallel_size > 1:
            raise ConfigError(f"data_parallel_size={config.data_parallel_size}: must be 1 without a server")
        directory = str(
            checkpoint_directory(config.model, config.revision, config.download_dir, gguf=config.quantization == "gguf")
        )
        # No stream waits for single tokens here: prompts may have the whole step.
        threshold = config.long_prefill_token_threshold or 0
        self.config = config = replace(config, model=directory, long_prefill_token_threshold=threshold)
        is_pooling = pools(config)
        defaults = None if is_pooling else read_checkpoint_defaults(config)
        self._text = TextOperations(
            directory if config.tokenizer is None else str(checkpoint_directory(config.tokenizer)),
            chat_template=config.chat_template,
            trust_remote_code=config.trust_remote_code,
        )
        self._default_sampling = {} if defaults is None else defaults.sampling
        self._core: EngineCore = start_core(config, on_phase)
        self._limits = RequestLimits(
            max_model_len=self._core.ready.max_model_len,
            vocab_size=self._core.ready.vocab_size,
            eos_token_ids=() if defaults is None else defaults.eos_token_ids(self._text.tokenizer),
            default_max_tokens=None if defaults is None else defaults.max_tokens,
        )
        self._pooler = OfflinePooler(self._core, self._text.tokenizer, config, self._raw_step) if is_pooling else None
        self._adapter_source = AdapterSource(
            directory, model_impl=config.model_impl, max_lora_rank=config.max_lora_rank
        )
        self._request_numbers = itertools.count()
        self._sequences: dict[str, _Sequence] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        return self._text.tokenizer

    @property
    def stats(self) -> EngineStats:
        """The engine's figures as of now."""
        return self._core.stats()

    @property
    def max_model_len(self) -> int:
        """Most tokens that a prompt and its completion may have together."""
        return self._limits.max_model_len

    def default_sampling_params(self, **given: Any) -> SamplingParams:
        """`SamplingParams` with what the checkpoint recommends, and `given` in place of it."""
        return SamplingParams(**{**self._default_sampling, **given})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete all prompts, batched, and return what came of them in their order.

        `prompts`: one or several texts or lists of token ids. `sampling_params`: for all, or one for each; None: what the
        checkpoint recommends. `lora_request`: the adapter that computes all of them, or one for each (None: the model alone);
        needs `enable_lora`. `progress` shows a bar. A prompt that cannot be served raises `InvalidRequestError` before
        anything runs; one that fails later has the finish reason ERROR and leaves the others alone.
        """
        listed: list[Prompt] = _as_prompts(prompts)
        params = self._params_for(len(listed), sampling_params)
        adapters = self._adapters_for(len(listed), lora_request)
        outputs, sequences = [], []
        for prompt, sampling, adapter in zip(listed, params, adapters, strict=True):
            output, own = self._prepare(prompt, sampling, adapter)
            outputs.append(output)
            sequences += [(output, sequence) for sequence in own]
        with self._aborting([sequence for _, sequence in sequences]), TokenProgress(len(sequences), progress) as bar:
            self._run_to_end(sequences, bar)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        progress: bool = False,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; `template_arguments` as in `ChatTemplate.render`, the rest as of `generate`.

        Raises `InvalidRequestError` when the model has no chat template.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_one else messages
        prompts = [self.encode_chat(conversation, **template_arguments) for conversation in conversations]
        return self.generate(prompts, sampling_params, lora_request=lora_request, progress=progress)

    def encode_chat(self, messages: Sequence[Message], **template_arguments: Any) -> list[int]:
        """Token ids of a conversation, ready for `generate` or `stream`."""
        return self._text.render_chat_and_encode(messages, add_special_tokens=False, **template_arguments)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> Generator[GenerationChunk, None, None]:
        """Complete one prompt, chunk by chunk. Closing the generator, or leaving its loop, aborts what still runs.

        Raises `InvalidRequestError` for a prompt that cannot be served, and the error that a sequence failed with.
        """
        (sampling,) = self._params_for(1, sampling_params)
        (adapter,) = self._adapters_for(1, lora_request)
        _, sequences = self._prepare(prompt, sampling, adapter)
        with self._aborting(sequences):
            waiting = deque(sequences)
            while any(sequence.chunks or not sequence.state.finished for sequence in sequences):
                self._submit_some(waiting)
                self._step()
                for sequence in sequences:
                    if sequence.error is not None:
                        raise sequence.error
                    while sequence.chunks:
                        yield sequence.chunks.popleft()

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[PoolingOutput]:
        """The vectors of texts, batched, in their order: `output.embedding`.

        `dimensions`: keep so many numbers (Matryoshka); `normalize`: to length 1, None: as the checkpoint does;
        `prompt_name`: the instruction that the checkpoint has under this name, put before each text;
        `truncate_prompt_tokens`: cut longer texts to so many tokens, -1: to as many as the model takes; `lora_request` as of
        `generate`.
        Raises `InvalidRequestError`, before anything runs, for what cannot be served, and `NotSupportedError` where the model
        is not served for it (`task`).
        """
        pooler = self._pooling_for("embed")
        return pooler.encode(
            prompts,
            PoolingParams("embed", normalize=normalize, dimensions=dimensions),
            before=pooler.prompts.before(prompt_name),
            truncate_prompt_tokens=truncate_prompt_tokens,
            adapter=self._adapters_for(1, lora_request)[0],
        )

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[PoolingOutput]:
        """The probabilities of the model's `labels` for each text: `output.probs`. Raises as `embed`."""
        return self._pooling_for("classify").encode(
            prompts,
            PoolingParams("classify"),
            truncate_prompt_tokens=truncate_prompt_tokens,
            adapter=self._adapters_for(1, lora_request)[0],
        )

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingOutput]:
        """How well documents belong to a query, or each to one of several: `output.score`. Raises as `embed`.

        `instruction`: of a language model that scores, what is asked of the documents.
        """
        return self._pooling_for("score").score(
            queries, documents, instruction=instruction, truncate_prompt_tokens=truncate_prompt_tokens
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's outputs; empty for other models."""
        return () if self._pooler is None else self._pooler.labels

    def close(self) -> None:
        """Give the model's memory back. The object is of no use after this."""
        self._core.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pooling_for(self, task: str) -> OfflinePooler:
        if self._pooler is None:
            raise NotSupportedError(f"this model is served for generate; load it with task={task!r}")
        return self._pooler

    def _raw_step(self) -> EngineOutputs:
        with _interrupts_deferred():
            return self._core.step()

    def _params_for(
        self, count: int, sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if sampling_params is None:
            return [self.default_sampling_params()] * count
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        if len(sampling_params) != count:
            raise InvalidRequestError(f"there are {count} prompts and {len(sampling_params)} sampling_params")
        return list(sampling_params)

    def _adapters_for(
        self, count: int, lora_request: LoRARequest | Sequence[LoRARequest | None] | None
    ) -> list[LoraAdapter | None]:
        """The adapter of each prompt as its files are now. Raises `CheckpointError` for one that does not fit the model."""
        if lora_request is None:
            return [None] * count
        if not self.config.enable_lora:
            raise NotSupportedError("the model was loaded without enable_lora", "lora_request")
        asked = [lora_request] * count if isinstance(lora_request, LoRARequest) else list(lora_request)
        if len(asked) != count:
            raise InvalidRequestError(f"there are {count} prompts and {len(asked)} lora_requests")
        found = {
            each: self._adapter_source.resolve(each.lora_name, each.lora_path) for each in asked if each is not None
        }
        return [None if each is None else found[each] for each in asked]

    def _prepare(
        self, prompt: Prompt, sampling: SamplingParams, adapter: LoraAdapter | None
    ) -> tuple[RequestOutput, list[_Sequence]]:
        """Tokenize and check one prompt; nothing has reached the engine yet."""
        if self._pooler is not None:
            raise NotSupportedError("this model does not generate; it embeds, classifies or scores")
        text = prompt if isinstance(prompt, str) else None
        prompt_token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        request_id = str(next(self._request_numbers))
        request = GenerationRequest(request_id=request_id, params=sampling, prompt=prompt, adapter=adapter)
        requests = validate_request(request, prompt_token_ids, self.tokenizer, self._limits)
        output = RequestOutput(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=prompt_token_ids,
            outputs=[CompletionOutput(index=index) for index in range(sampling.n)],
        )
        sequences = [
            _Sequence(engine_request, RequestTextState(self.tokenizer, prompt_token_ids, sampling, index=index))
            for index, engine_request in enumerate(requests)
        ]
        return output, sequences

    def _run_to_end(self, sequences: list[tuple[RequestOutput, _Sequence]], bar: TokenProgress) -> None:
        waiting = deque(sequence for _, sequence in sequences)
        running = sequences
        while running:
            self._submit_some(waiting)
            self._step()
            still_running = []
            for output, sequence in running:
                while sequence.chunks:
                    chunk = sequence.chunks.popleft()
                    output.outputs[chunk.index].add(chunk)
                    bar.count_tokens(len(chunk.token_ids))
                if not sequence.state.finished:
                    still_running.append((output, sequence))
                    continue
                bar.count_sequence()
                if sequence.error is not None:
                    completion = output.outputs[sequence.state.index]
                    completion.finish_reason, completion.error = FinishReason.ERROR, str(sequence.error)
            running = still_running

    def _submit_some(self, waiting: deque[_Sequence]) -> None:
        """Hand sequences to the engine while its queue takes them."""
        while waiting:
            sequence = waiting[0]
            try:
                self._core.add_request(sequence.request)
            except QueueFullError:
                if not self._core.has_work:
                    raise
                return
            except PagodaError as error:
                sequence.error, sequence.state.finished = error, True
            else:
                self._sequences[sequence.request.request_id] = sequence
            waiting.popleft()

    def _step(self) -> None:
        """Run one step of the engine and hand its outputs to their sequences."""
        with _interrupts_deferred():
            outputs = self._core.step().outputs
            for output in outputs:
                sequence = self._sequences.get(output.request_id)
                if sequence is None:  # its end, after an abort
                    continue
                try:
                    sequence.chunks.append(sequence.state.process(output))
                except PagodaError as error:
                    sequence.error = error
                if sequence.state.finished:
                    del self._sequences[output.request_id]
                if sequence.state.must_abort:
                    self._core.abort([output.request_id])

    @contextmanager
    def _aborting(self, sequences: list[_Sequence]) -> Iterator[None]:
        """Aborts the sequences that are still in the engine at the end of the block."""
        try:
            yield
        finally:
            left = [sequence.request.request_id for sequence in sequences]
            self._core.abort([request_id for request_id in left if self._sequences.pop(request_id, None) is not None])


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [list(prompts)]  # type: ignore[arg-type]  # one prompt of ids
    return list(prompts)  # type: ignore[arg-type]


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, so that the engine is never left in the middle of a step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted: list[FrameType | None] = []
    previous = signal.signal(signal.SIGINT, lambda _, frame: interrupted.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted and callable(previous):
        previous(signal.SIGINT, interrupted[0])
