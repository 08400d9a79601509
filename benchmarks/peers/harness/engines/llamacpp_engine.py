"""llama.cpp through its C interface: each step decodes a token of every running sequence and prompts of new ones, as its
own server does."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import llama_cpp
import numpy as np

from harness.engine import Engine, EngineSettings, Tokens

BATCH_TOKENS = 2048
CACHE_TYPES = {"bf16": "GGML_TYPE_F16", "fp32": "GGML_TYPE_F32", "int8": "GGML_TYPE_F16", "gguf": "GGML_TYPE_F16"}


@dataclass
class _Sequence:
    request_id: int
    slot: int
    pending: list[int]  # prompt tokens, then the last sampled one, that the model has not seen
    output_tokens: int
    position: int = 0
    generated: list[int] = field(default_factory=list)


class LlamaCppEngine(Engine):
    """See `Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(
            settings.converted.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = settings.max_num_seqs
        params.n_ctx = settings.kv_tokens
        params.n_batch = BATCH_TOKENS
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = settings.threads
        params.type_k = params.type_v = getattr(llama_cpp, CACHE_TYPES[settings.weights])
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._free_slots = list(range(settings.max_num_seqs))
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []

    def add(self, request_id: int, prompt: list[int], output_tokens: int) -> None:
        """See `Engine.add`."""
        self._waiting.append(_Sequence(request_id, -1, list(prompt), output_tokens))

    def step(self) -> Tokens:
        """See `Engine.step`."""
        while self._waiting and self._free_slots:
            sequence = self._waiting.pop(0)
            sequence.slot = self._free_slots.pop()
            self._running.append(sequence)
        rows = self._fill_batch()
        if llama_cpp.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        tokens: Tokens = {}
        for row, sequence in rows:
            logits = llama_cpp.llama_get_logits_ith(self._context, row)
            token = int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab_size,))))
            sequence.generated.append(token)
            sequence.pending = [token]
            tokens[sequence.request_id] = [token]
            if len(sequence.generated) == sequence.output_tokens:
                self._end(sequence)
        return tokens

    def _fill_batch(self) -> list[tuple[int, _Sequence]]:
        """Decodes first, then prompts as far as there is room; the rows whose logits are sampled."""
        rows = []
        count = 0
        batch = self._batch
        for sequence in sorted(self._running, key=lambda entry: len(entry.pending)):
            taken = sequence.pending[: BATCH_TOKENS - count]
            del sequence.pending[: len(taken)]
            for token in taken:
                batch.token[count] = token
                batch.pos[count] = sequence.position
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence.slot
                batch.logits[count] = 0
                sequence.position += 1
                count += 1
            if taken and not sequence.pending:
                batch.logits[count - 1] = 1
                rows.append((count - 1, sequence))
        batch.n_tokens = count
        return rows

    def _end(self, sequence: _Sequence) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
        self._free_slots.append(sequence.slot)
        self._running.remove(sequence)

    @property
    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return bool(self._waiting or self._running)


def load(settings: EngineSettings) -> Engine:
    """The engine."""
    return LlamaCppEngine(settings)
