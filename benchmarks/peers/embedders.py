"""One embedder in a process of its own: `python embedders.py ENGINE MODEL THREADS WORK`, then commands and answers as JSON.

`{"texts": [[…], …]}` in embeds each list with one call, and gives wall and processor seconds of each call out; with
`"vectors": true` the vectors of the last one, too. The first line out says `{"ready": …}`, or `{"error": …}`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PR_SET_PDEATHSIG = 1
MAX_LENGTH = 256


class Embedder(ABC):
    """Texts to vectors of length 1, `[texts, size]` float32."""

    @abstractmethod
    def embed(self, texts: list[str]) -> Any:
        """One call, as a program would make it."""


class Pagoda(Embedder):
    """`LLM.embed`."""

    def __init__(self, model: str, threads: int, **settings: str) -> None:
        from pagoda import LLM

        self._llm = LLM(model, threads=threads, max_num_seqs=256, **settings)

    def embed(self, texts: list[str]) -> Any:
        return np.stack([np.frombuffer(output.pooled.data, dtype=np.float32) for output in self._llm.embed(texts)])


class SentenceTransformers(Embedder):
    """Batches of 32, sorted by length, padded."""

    def __init__(self, model: str, threads: int, **settings: Any) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._model = SentenceTransformer(model, device="cpu", **settings)

    def embed(self, texts: list[str]) -> Any:
        return self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


class FastEmbed(Embedder):
    """fastembed over onnxruntime, its batches sorted by length here: it does not."""

    def __init__(self, model: str, threads: int, work: Path, *, int8: bool = False) -> None:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        directory = _onnx_directory(model, work)
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(directory / "model.onnx", directory / "model_int8.onnx", weight_type=QuantType.QInt8)
        TextEmbedding.add_custom_model(
            model="exported/model",
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(hf="exported/model"),
            dim=384,
            model_file="model_int8.onnx" if int8 else "model.onnx",
        )
        self._model = TextEmbedding("exported/model", threads=threads, specific_model_path=str(directory))

    def embed(self, texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found = list(self._model.embed([texts[index] for index in order], batch_size=32))
        vectors = np.empty((len(texts), len(found[0])), dtype=np.float32)
        vectors[order] = found
        return vectors


class OpenVino(Embedder):
    """The exported model in OpenVINO; batches of 32, sorted by length, padded; pooled in numpy."""

    def __init__(self, model: str, threads: int, work: Path, precision: str) -> None:
        import openvino
        from tokenizers import Tokenizer

        path = _onnx_directory(model, work) / "model.onnx"
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._model = openvino.Core().compile_model(str(path), "CPU", options)
        self._tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_LENGTH)
        self._tokenizer.enable_padding()

    def embed(self, texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = None
        for start in range(0, len(texts), 32):
            part = order[start : start + 32]
            encoded = self._tokenizer.encode_batch([texts[index] for index in part])
            ids = np.array([one.ids for one in encoded], dtype=np.int64)
            mask = np.array([one.attention_mask for one in encoded], dtype=np.int64)
            hidden = self._model([ids, mask, np.zeros_like(ids)])[0]
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            if vectors is None:
                vectors = np.empty((len(texts), pooled.shape[1]), dtype=np.float32)
            vectors[part] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return vectors


def _onnx_directory(model: str, work: Path) -> Path:
    """The model exported by torch, with its tokenizer, made once."""
    import shutil

    import torch
    from transformers import AutoModel

    directory = work / "onnx"
    if (directory / "model.onnx").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    for file in Path(model).glob("*.json"):
        shutil.copy(file, directory)
    loaded = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    ids = torch.ones((2, 16), dtype=torch.int64)
    names = ("input_ids", "attention_mask", "token_type_ids")
    dynamic = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)} for name in names}

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    torch.onnx.export(
        Hidden(),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        str(directory / "model.onnx"),
        input_names=list(names),
        output_names=["last_hidden_state"],
        dynamic_shapes=dynamic,
        dynamo=True,
        external_data=False,
    )
    return directory


ENGINES: dict[str, Callable[[str, int, Path], Embedder]] = {
    "pagoda": lambda model, threads, work: Pagoda(model, threads, dtype="float32"),
    "pagoda-bf16": lambda model, threads, work: Pagoda(model, threads, dtype="bfloat16"),
    "pagoda-int8": lambda model, threads, work: Pagoda(model, threads, quantization="int8"),
    "sentence-transformers": lambda model, threads, work: SentenceTransformers(model, threads),
    "sentence-transformers-bf16": lambda model, threads, work: SentenceTransformers(
        model, threads, model_kwargs={"dtype": "bfloat16"}
    ),
    "fastembed": lambda model, threads, work: FastEmbed(model, threads, work),
    "fastembed-int8": lambda model, threads, work: FastEmbed(model, threads, work, int8=True),
    "openvino": lambda model, threads, work: OpenVino(model, threads, work, "f32"),
    "openvino-bf16": lambda model, threads, work: OpenVino(model, threads, work, "bf16"),
}


def main() -> None:
    """Load, answer, end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    name, model, threads, work = sys.argv[1:]
    try:
        engine = ENGINES[name](model, int(threads), Path(work))
        engine.embed(["a warm-up", "of two texts"])
    except Exception as error:  # the comparison goes on without this engine, and says why
        answer({"error": f"{type(error).__name__}: {error}"[:500]})
        raise
    answer({"ready": name})
    for line in sys.stdin:
        command = json.loads(line)
        wall, cpu = [], []
        for texts in command["texts"]:
            began, used = time.perf_counter(), time.process_time()
            vectors = engine.embed(texts)
            cpu.append(time.process_time() - used)
            wall.append(time.perf_counter() - began)
        found = np.asarray(vectors, dtype=np.float64).tolist() if command.get("vectors") else None
        answer({"wall": wall, "cpu": cpu, "vectors": found})
    answers.close()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
