"""tritonclient asks a model that pools, in a process of its own: `triton_embedding.py http|grpc ADDRESS MODEL TEXT…`; JSON."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
from tritonclient.utils import InferenceServerException


def main(protocol: str, address: str, model: str, *texts: str) -> None:
    tritonclient = importlib.import_module(f"tritonclient.{protocol}")
    client = tritonclient.InferenceServerClient(address)
    given = tritonclient.InferInput("text_input", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
    names = ("embedding", "num_input_tokens")
    answer = client.infer(model, [given], outputs=[tritonclient.InferRequestedOutput(name) for name in names])
    embedding = answer.as_numpy("embedding")
    error = ""
    try:
        client.infer(model, [given], outputs=[tritonclient.InferRequestedOutput("text_output")])
    except InferenceServerException as refusal:
        error = str(refusal)
    client.close()
    report = {
        "embedding": embedding.tolist(),
        "dtype": str(embedding.dtype),
        "num_input_tokens": answer.as_numpy("num_input_tokens").tolist(),
        "error": error,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
