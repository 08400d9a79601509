"""A task of MTEB that needs no download, by a running server and by sentence-transformers: does retrieval find the same?

    pagoda serve .models/all-MiniLM-L6-v2 &
    .peers/embedders/bin/python benchmarks/peers/retrieval.py --url http://localhost:8080 --model .models/all-MiniLM-L6-v2

The corpus are bodies of docstrings of the standard library, each to be found by its first sentence. Exits with 1 where
nDCG@10 differs by more than 0.001.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from typing import Any, ClassVar

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from openai import OpenAI

MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "csv",
    "datetime",
    "difflib",
    "email.message",
    "fractions",
    "functools",
)
MODULES += (
    "gzip",
    "heapq",
    "http.client",
    "io",
    "itertools",
    "json",
    "logging",
    "os",
    "pathlib",
    "random",
    "re",
    "shutil",
)
MODULES += (
    "socket",
    "sqlite3",
    "statistics",
    "string",
    "subprocess",
    "tempfile",
    "textwrap",
    "threading",
    "urllib.parse",
)


def documented() -> dict[str, tuple[str, str]]:
    """First sentence and rest of the docstring of each function, class and method that has both, by its name."""
    found = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        members = [(f"{module_name}.{name}", member) for name, member in inspect.getmembers(module)]
        members += [
            (f"{owner}.{name}", member)
            for owner, kind in members
            if inspect.isclass(kind) and kind.__module__ == module_name
            for name, member in vars(kind).items()
        ]
        for name, member in members:
            text = member.__doc__ if callable(member) and isinstance(member.__doc__, str) else ""
            first, _, rest = inspect.cleandoc(text).partition("\n\n")
            if 4 <= len(first.split()) <= 40 and len(rest.split()) >= 12:
                found.setdefault(rest, (name, first))
    return {name: (first, rest) for rest, (name, first) in found.items()}


class DocstringRetrieval(AbsTaskRetrieval):
    """The rest of a docstring, found by its first sentence."""

    metadata = TaskMetadata(
        name="DocstringRetrieval",
        description="Bodies of docstrings of the standard library, found by their first sentences.",
        type="Retrieval",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        dataset={"path": "none", "revision": "none"},
    )

    def load_data(self, **settings: Any) -> None:
        """Out of the interpreter that runs this."""
        del settings
        pairs = documented()
        corpus = [{"id": name, "title": "", "text": rest} for name, (_, rest) in pairs.items()]
        queries = [{"id": name, "text": first} for name, (first, _) in pairs.items()]
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_list(corpus),
                    "queries": Dataset.from_list(queries),
                    "relevant_docs": {name: {name: 1} for name in pairs},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class Served(AbsEncoder):
    """`/v1/embeddings` by the OpenAI SDK; what is too long for the model is cut there, as sentence-transformers cuts it."""

    mteb_model_meta: ClassVar[ModelMeta] = ModelMeta.create_empty({"name": "pagoda/served"})

    def __init__(self, url: str, max_length: int) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none")
        self._model = self._client.models.list().data[0].id
        self._max_length = max_length

    def encode(self, inputs: Any, **settings: Any) -> Any:
        """Batches of texts to vectors, [texts, size]."""
        del settings
        vectors = []
        for batch in inputs:
            answer = self._client.embeddings.create(
                model=self._model, input=batch["text"], extra_body={"truncate_prompt_tokens": self._max_length}
            )
            vectors += [item.embedding for item in answer.data]
        return np.array(vectors, dtype=np.float32)


def main() -> None:
    """Both scores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://localhost:8080")
    parser.add_argument("--model", required=True, help="directory of the checkpoint that the server has")
    arguments = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    local = SentenceTransformer(arguments.model, device="cpu")
    scores = {}
    for name, model in (
        ("Pagoda", Served(arguments.url, local.max_seq_length)),
        ("sentence-transformers", local),
    ):
        result = mteb.evaluate(model, DocstringRetrieval(), cache=None, show_progress_bar=False)
        (score,) = result.task_results[0].scores["test"]
        scores[name] = score["ndcg_at_10"]
        print(f"{name:24} nDCG@10 {score['ndcg_at_10']:.5f}, recall@1 {score['recall_at_1']:.5f}", flush=True)
    print(f"{len(documented())} documents and as many queries, mteb {mteb.__version__}")
    sys.exit(max(scores.values()) - min(scores.values()) > 1e-3)


if __name__ == "__main__":
    main()
