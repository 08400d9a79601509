"""tritonclient over gRPC, in a process of its own: `triton_grpc.py sync|aio ADDRESS MODEL PROMPT [KEY]` prints JSON.

What comes out does not depend on the way: `text` of ModelInfer, `streamed` from deltas, `numbers`, `metadata`, `errors`.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

PARAMETERS = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "stop": "never there"}
SECONDS = 30


def inputs_of(module: Any, *prompts: str) -> list[Any]:
    tensor = module.InferInput("text_input", [len(prompts)], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode() for prompt in prompts], dtype=object))
    return [tensor]


def result_of(result: Any) -> dict[str, Any]:
    return {
        "text": [item.decode() for item in result.as_numpy("text_output")],
        "output_ids": result.as_numpy("output_ids").tolist(),
        "finish_reason": [item.decode() for item in result.as_numpy("finish_reason")],
        "numbers": [int(result.as_numpy(name)[0]) for name in ("num_input_tokens", "num_output_tokens")],
        "id": result.get_response().id,
    }


def error_of(error: InferenceServerException) -> list[str]:
    return [str(error.status()), error.message()]


def run_sync(address: str, model: str, prompt: str, headers: dict[str, str]) -> dict[str, Any]:
    module = tritonclient.grpc
    with module.InferenceServerClient(address) as client:
        report: dict[str, Any] = {
            "live": client.is_server_live(headers=headers),
            "ready": client.is_server_ready(headers=headers),
            "model_ready": client.is_model_ready(model, headers=headers),
            "metadata": client.get_model_metadata(model, headers=headers, as_json=True),
            "decoupled": client.get_model_config(model, headers=headers).config.model_transaction_policy.decoupled,
            "index": client.get_model_repository_index(headers=headers, as_json=True),
        }
        client.load_model(model, headers=headers)
        options: dict[str, Any] = {"parameters": PARAMETERS, "headers": headers, "client_timeout": SECONDS}
        report["infer"] = result_of(
            client.infer(
                model, inputs_of(module, prompt), request_id="42", priority=1, timeout=SECONDS * 10**6, **options
            )
        )
        wanted = [module.InferRequestedOutput("num_output_tokens"), module.InferRequestedOutput("text_output")]
        partial = client.infer(model, inputs_of(module, prompt, prompt), outputs=wanted, **options).get_response()
        report["requested"] = [output.name for output in partial.outputs]
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer(
            model, inputs_of(module, prompt), lambda result, error: answers.put((result, error)), **options
        )
        result, error = answers.get(timeout=SECONDS)
        report["async_infer"] = error_of(error) if error else result_of(result)
        try:
            client.infer(model, inputs_of(module, prompt), parameters={"no_such": 1.5}, headers=headers)
        except InferenceServerException as caught:
            report["error"] = error_of(caught)
        client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
        client.async_stream_infer(
            model,
            inputs_of(module, prompt),
            request_id="s",
            parameters=PARAMETERS,
            enable_empty_final_response=True,
        )
        pieces, is_final = [], False
        while not is_final:
            result, error = answers.get(timeout=SECONDS)
            if error:
                raise error
            is_final = result.get_response().parameters["triton_final_response"].bool_param
            if result.get_response().outputs:
                pieces.append(result_of(result))
        client.async_stream_infer(model, inputs_of(module, prompt), parameters={"max_tokens": 0})
        report["stream_error"] = answers.get(timeout=SECONDS)[1].message()
        client.stop_stream()
        report["streamed"] = pieces
        report["statistics"] = [
            client.get_inference_statistics(name, headers=headers, as_json=True)["model_stats"] for name in (model, "")
        ]
        return report


async def run_aio(address: str, model: str, prompt: str, headers: dict[str, str]) -> dict[str, Any]:
    module = tritonclient.grpc.aio
    async with module.InferenceServerClient(address) as client:
        report: dict[str, Any] = {
            "live": await client.is_server_live(headers=headers),
            "ready": await client.is_server_ready(headers=headers),
            "model_ready": await client.is_model_ready(model, headers=headers),
        }
        options: dict[str, Any] = {"parameters": PARAMETERS, "headers": headers, "client_timeout": SECONDS}
        report["infer"] = result_of(await client.infer(model, inputs_of(module, prompt), request_id="42", **options))
        try:
            await client.infer(model, inputs_of(module, prompt), parameters={"no_such": 1.5}, headers=headers)
        except InferenceServerException as caught:
            report["error"] = error_of(caught)

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": model,
                "inputs": inputs_of(module, prompt),
                "request_id": "s",
                "parameters": PARAMETERS,
                "enable_empty_final_response": True,
            }

        pieces = []
        async for result, error in client.stream_infer(requests(), headers=headers):
            if error:
                raise error
            if result.get_response().outputs:
                pieces.append(result_of(result))
        report["streamed"] = pieces
        return report


def main() -> None:
    way, address, model, prompt, *rest = sys.argv[1:]
    headers = {"authorization": f"Bearer {rest[0]}"} if rest else {}
    if way == "sync":
        report = run_sync(address, model, prompt, headers)
    else:
        report = asyncio.run(run_aio(address, model, prompt, headers))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
