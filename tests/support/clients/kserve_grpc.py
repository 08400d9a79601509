"""KServe's gRPC client, in a process of its own: `kserve_grpc.py ADDRESS MODEL PROMPT [KEY]` prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np

sys.argv, ARGUMENTS = sys.argv[:1], sys.argv[1:]  # kserve parses the command line when it is imported
from kserve import InferInput, InferRequest  # noqa: E402
from kserve.inference_client import InferenceGRPCClient  # noqa: E402
from kserve.protocol.grpc import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc  # noqa: E402

PARAMETERS = {"max_tokens": 8, "ignore_eos": True, "stop": "never there", "top_k": 1}


def request_of(model: str, prompt: str, *, is_raw: bool, **parameters: Any) -> InferRequest:
    tensor = InferInput("text_input", [1], "BYTES", data=None if is_raw else [prompt])
    if is_raw:
        tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=object), binary_data=True)
    return InferRequest(model, [tensor], request_id="42", parameters=PARAMETERS | parameters)


def result_of(response: Any) -> dict[str, Any]:
    tensors = {output.name: output.as_numpy() for output in response.outputs}
    text = tensors["text_output"].flatten()[0]
    return {
        "text": text.decode() if isinstance(text, bytes) else text,
        "output_ids": tensors["output_ids"].tolist(),
        "numbers": [int(tensors[name][0]) for name in ("num_input_tokens", "num_output_tokens")],
        "id": response.id,
    }


async def run(address: str, model: str, prompt: str, headers: list[tuple[str, str]]) -> dict[str, Any]:
    async with InferenceGRPCClient(address, retries=0, timeout=30) as client:
        report: dict[str, Any] = {
            "live": await client.is_server_live(headers=headers),
            "ready": await client.is_server_ready(headers=headers),
            "model_ready": await client.is_model_ready(model, headers=headers),
            "typed": result_of(await client.infer(request_of(model, prompt, is_raw=False), headers=headers)),
            "raw": result_of(await client.infer(request_of(model, prompt, is_raw=True), headers=headers)),
        }
        try:
            await client.infer(request_of(model, prompt, is_raw=False, no_such=1), headers=headers)
        except grpc.RpcError as error:
            report["error"] = [str(error.code()), error.details()]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        load = grpc_predict_v2_pb2.RepositoryModelLoadRequest(model_name=model)
        loaded = await stub.RepositoryModelLoad(load, metadata=headers)
        report["loaded"] = [loaded.model_name, loaded.isLoaded]
    return report


def main() -> None:
    address, model, prompt, *rest = ARGUMENTS
    headers = [("authorization", f"Bearer {rest[0]}")] if rest else []
    json.dump(asyncio.run(run(address, model, prompt, headers)), sys.stdout)


if __name__ == "__main__":
    main()
