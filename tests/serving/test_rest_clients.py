"""tritonclient over HTTP (plain and asyncio), KServe's REST client, curl and Java's HttpClient, against our V2 routes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.support.rest_harness import RestHarness, import_kserve

PROMPTS = ["Once upon a time", "grün 🙂"]
PARAMETERS = {"max_tokens": 6, "temperature": 0.5, "seed": 1}
OUTPUTS = ("text_output", "output_ids", "finish_reason", "num_output_tokens")


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running


@pytest.fixture(scope="module")
def expected(harness: RestHarness) -> list[str]:
    body = {
        "inputs": [{"name": "text_input", "shape": [2], "datatype": "BYTES", "data": PROMPTS}],
        "parameters": PARAMETERS,
    }
    answer = harness.client.post("/v2/models/demo/infer", json=body).json()
    return answer["outputs"][0]["data"]


def texts(array: Any) -> list[str]:
    return [element.decode() if isinstance(element, bytes) else element for element in array.tolist()]


def triton_input(is_binary: bool) -> Any:
    tensor = triton.InferInput("text_input", [2], "BYTES")
    tensor.set_data_from_numpy(np.array(PROMPTS, dtype=object), binary_data=is_binary)
    return tensor


def triton_outputs(form: str) -> Any:
    if form == "not given":
        return None
    return [triton.InferRequestedOutput(name, binary_data=form == "binary") for name in OUTPUTS]


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("form", ["binary", "JSON", "not given"])
def test_tritonclient_infers(harness: RestHarness, expected: list[str], is_binary: bool, form: str) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{harness.port}") as client:
        result = client.infer(
            "demo", [triton_input(is_binary)], outputs=triton_outputs(form), request_id="7", parameters=PARAMETERS
        )
    assert result.get_response()["id"] == "7"
    assert texts(result.as_numpy("text_output")) == expected
    assert result.as_numpy("output_ids").shape == (2, 6)
    assert result.as_numpy("output_ids").dtype == np.int64
    assert texts(result.as_numpy("finish_reason")) == ["length", "length"]
    assert result.as_numpy("num_output_tokens").tolist() == [6, 6]


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("form", ["binary", "JSON", "not given"])
async def test_asyncio_tritonclient_infers(
    harness: RestHarness, expected: list[str], is_binary: bool, form: str
) -> None:
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{harness.port}") as client:
        result = await client.infer(
            "demo", [triton_input(is_binary)], model_version="1", outputs=triton_outputs(form), parameters=PARAMETERS
        )
    assert texts(result.as_numpy("text_output")) == expected


def test_tritonclient_sends_ids_and_sampling_as_tensors(harness: RestHarness) -> None:
    ids = triton.InferInput("input_ids", [2, 3], "INT64")
    ids.set_data_from_numpy(np.array([[70, 71, 72], [80, 81, 82]], dtype=np.int64))
    limit = triton.InferInput("max_tokens", [2, 1], "INT32")
    limit.set_data_from_numpy(np.array([[2], [3]], dtype=np.int32))
    temperature = triton.InferInput("temperature", [1], "FP16")
    temperature.set_data_from_numpy(np.array([0.5], dtype=np.float16))
    with triton.InferenceServerClient(f"127.0.0.1:{harness.port}") as client:
        result = client.infer("demo", [ids, limit, temperature])
    assert result.as_numpy("output_ids").tolist() == [[70, 71, -1], [80, 81, 82]]


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_tritonclient_may_pack_requests(harness: RestHarness, expected: list[str], packing: str) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{harness.port}") as client:
        result = client.infer(
            "demo",
            [triton_input(True)],
            parameters=PARAMETERS,
            request_compression_algorithm=packing,
            response_compression_algorithm=packing,
        )
    assert texts(result.as_numpy("text_output")) == expected


def test_tritonclient_asks_about_the_server(harness: RestHarness) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{harness.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("demo")
        assert client.is_model_ready("demo", "1")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "pagoda"
        assert client.get_model_metadata("demo")["inputs"][0]["name"] == "text_input"
        assert client.get_model_repository_index()[0]["state"] == "READY"
        client.load_model("demo")
        with pytest.raises(InferenceServerException, match="cannot be unloaded"):
            client.unload_model("demo")


def test_tritonclient_shows_our_sentence(harness: RestHarness) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{harness.port}") as client:
        with pytest.raises(InferenceServerException, match="model 'other' is not served here") as caught:
            client.infer("other", [triton_input(True)])
        assert caught.value.status() == "404"
        with pytest.raises(InferenceServerException, match="unknown parameter 'max_token'"):
            client.infer("demo", [triton_input(False)], parameters={"max_token": 1})


def test_tritonclients_timeout_is_in_microseconds(harness: RestHarness) -> None:
    harness.engine.step_seconds = 0.05
    try:
        with triton.InferenceServerClient(f"127.0.0.1:{harness.port}") as client:
            with pytest.raises(InferenceServerException, match="deadline") as caught:
                client.infer("demo", [triton_input(True)], timeout=100_000, parameters={"max_tokens": 50})
            assert caught.value.status() == "504"
    finally:
        harness.engine.step_seconds = 0.0


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "JSON"])
def test_kserves_client_infers(harness: RestHarness, expected: list[str], is_binary: bool) -> None:
    kserve = import_kserve()

    async def ask() -> Any:
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
        tensor = kserve.InferInput("text_input", [2], "BYTES")
        tensor.set_data_from_numpy(np.array(PROMPTS, dtype=object), binary_data=is_binary)
        parameters = {**PARAMETERS, "binary_data_output": is_binary}
        request = kserve.InferRequest("demo", [tensor], request_id="9", parameters=parameters)
        assert await client.is_server_ready(harness.url)
        assert await client.is_server_live(harness.url)
        assert await client.is_model_ready(harness.url, "demo")
        answer = await client.infer(harness.url, request, model_name="demo")
        with pytest.raises(httpx.HTTPStatusError, match="model 'other' is not served here"):
            await client.infer(harness.url, request, model_name="other")
        await client.close()
        return answer

    answer = asyncio.run(ask())
    assert answer.id == "9"
    assert texts(answer.get_output_by_name("text_output").as_numpy()) == expected
    assert answer.get_output_by_name("output_ids").as_numpy().shape == (2, 6)


UPGRADING_JAVA = """
import java.net.URI;
import java.net.http.*;

class Ask {
    public static void main(String[] arguments) throws Exception {
        var body = HttpRequest.BodyPublishers.ofString(arguments[1]);
        var request = HttpRequest.newBuilder(URI.create(arguments[0])).POST(body).build();
        for (int count = 0; count < 2; count++) {
            var answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.body());
        }
    }
}
"""


@pytest.mark.parametrize("program", ["curl", "java"])
def test_clients_that_offer_http_2_are_served_with_their_body(
    harness: RestHarness, tmp_path: Path, program: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    url, body = f"{harness.url}/v2/models/demo/generate", '{"text_input": "a", "max_tokens": 2}'
    if program == "curl":
        command = ["curl", "--silent", "--http2", "--data", body, url, url]
    else:
        source = tmp_path / "Ask.java"
        source.write_text(UPGRADING_JAVA)
        command = ["java", "-XX:TieredStopAtLevel=1", str(source), url, body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.count('"text_output":"aa"') == 2, done
