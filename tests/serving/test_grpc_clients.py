"""The clients people have, each in a process of its own, against our server: the same text through every door."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.grpc_harness import GrpcHarness

CLIENTS = Path(__file__).resolve().parents[1] / "support" / "clients"
KEY = "sk-client"
PROMPT = "één hello world"
ANSWER = "ÉÉN HELL"
IDS = [ord(character) for character in ANSWER]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcHarness]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps([{"key": KEY, "scopes": ["infer", "read", "admin"]}]))
    with GrpcHarness(api_keys_file=str(keys)) as running:
        yield running


def run_client(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(CLIENTS / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_triton_inference(report: dict[str, Any]) -> None:
    assert report["infer"] == {
        "text": [ANSWER],
        "output_ids": [IDS],
        "finish_reason": ["length"],
        "numbers": [len(PROMPT), 8],
        "id": "42",
    }
    code, message = report["error"]
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert "no_such" in message
    pieces = report["streamed"]
    assert "".join(piece["text"][0] for piece in pieces) == ANSWER
    assert [piece["output_ids"] for piece in pieces] == [[[token_id]] for token_id in IDS]
    assert [piece["numbers"][1] for piece in pieces] == list(range(1, 9))
    assert {piece["id"] for piece in pieces} == {"s"}


def test_tritonclient_infers_streams_and_reads_metadata(harness: GrpcHarness) -> None:
    report = run_client("triton_grpc.py", "sync", harness.address, "demo", PROMPT, KEY)
    check_triton_inference(report)
    assert report["live"] is report["ready"] is report["model_ready"] is report["decoupled"] is True
    assert report["async_infer"]["text"] == [ANSWER]
    assert report["requested"] == ["num_output_tokens", "text_output"]
    assert report["metadata"]["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": ["-1"]}
    assert report["index"] == {"models": [{"name": "demo", "version": "1", "state": "READY"}]}
    assert "max_tokens" in report["stream_error"]
    (of_model,), (of_every_model,) = report["statistics"]
    assert of_model == of_every_model
    assert (of_model["name"], of_model["version"]) == ("demo", "1")
    count = of_model["inference_count"]
    assert int(count) >= 5
    success = of_model["inference_stats"]["success"]
    assert success["count"] == count
    assert int(success["ns"]) > 0


def test_tritonclient_aio_infers_and_streams(harness: GrpcHarness) -> None:
    report = run_client("triton_grpc.py", "aio", harness.address, "demo", PROMPT, KEY)
    check_triton_inference(report)
    assert report["live"] is report["ready"] is report["model_ready"] is True


def test_kserve_client_infers_in_both_tensor_forms(harness: GrpcHarness) -> None:
    report = run_client("kserve_grpc.py", harness.address, "demo", PROMPT, KEY)
    expected = {"text": ANSWER, "output_ids": [IDS], "numbers": [len(PROMPT), 8], "id": "42"}
    assert report["typed"] == expected
    assert report["raw"] == expected
    assert report["live"] is report["ready"] is report["model_ready"] is True
    assert report["error"][0] == "StatusCode.INVALID_ARGUMENT"
    assert report["loaded"] == ["demo", True]
