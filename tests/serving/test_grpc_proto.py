"""Our proto: on the wire the same as Triton's and KServe's, checked in up to date, and no trouble beside their stubs."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from pagoda.serving.grpc.messages import POOL, message_class
from tests.support.clients.dump_descriptors import described

ROOT = Path(__file__).resolve().parents[2]
# Messages of which we declare a part (Triton's configuration) or more than the other side has.
OUR_EXTRA_FIELDS = {
    ("kserve", "InferParameter"): {"double_param", "uint64_param"},
    ("kserve", "RepositoryModelLoadRequest"): {"name_or_repository", "model_name", "parameters"},
    ("kserve", "RepositoryModelUnloadRequest"): {"name_or_repository", "model_name", "parameters"},
    ("tritonclient", "RepositoryModelLoadRequest"): {"name_or_repository"},
    ("tritonclient", "RepositoryModelUnloadRequest"): {"name_or_repository"},
    ("tritonclient", "RepositoryModelLoadResponse"): {"model_name", "isLoaded"},
    ("tritonclient", "RepositoryModelUnloadResponse"): {"model_name", "isUnloaded"},
}


def ours() -> dict[str, Any]:
    return described(POOL.FindFileByName("grpc_predict_v2.proto"))


@cache
def theirs(client: str) -> dict[str, Any]:
    script = ROOT / "tests" / "support" / "clients" / "dump_descriptors.py"
    result = subprocess.run([sys.executable, str(script), client], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("client", ["tritonclient", "kserve"])
def test_every_field_has_the_number_and_type_of_the_clients(client: str) -> None:
    mine, other = ours(), theirs(client)
    shared = mine["messages"].keys() & other["messages"].keys()
    assert len(shared) >= 25
    for name in shared:
        extra = OUR_EXTRA_FIELDS.get((client, name), set())
        for field, description in mine["messages"][name].items():
            if field not in extra:
                assert other["messages"][name].get(field) == description, f"{name}.{field}"
    for name, signature in mine["methods"].items():
        assert other["methods"].get(name, signature) == signature
    for name in mine["enums"].keys() & other["enums"].keys():
        assert mine["enums"][name] == other["enums"][name]


def test_every_kserve_method_is_offered_and_streaming_besides() -> None:
    methods = ours()["methods"].keys()
    assert methods >= theirs("kserve")["methods"].keys()
    assert "GRPCInferenceService.ModelStreamInfer" in methods
    assert "GRPCInferenceService.RepositoryIndex" in methods


@pytest.mark.parametrize(("field_number", "client"), [(1, "kserve"), (2, "tritonclient")])
@pytest.mark.parametrize("message", ["RepositoryModelLoadRequest", "RepositoryModelUnloadRequest"])
def test_both_places_of_the_model_name_are_understood(message: str, field_number: int, client: str) -> None:
    assert theirs(client)["messages"][message]["model_name"][0] == field_number
    wire = bytes([field_number << 3 | 2, 4]) + b"demo"
    request = message_class(message).FromString(wire)
    assert (request.model_name or request.name_or_repository) == "demo"


def test_checked_in_descriptor_set_is_what_protoc_makes_of_the_source() -> None:
    pytest.importorskip("grpc_tools")
    command = [sys.executable, str(ROOT / "proto" / "generate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "order"),
    [
        ("kserve.protocol.grpc.grpc_predict_v2_pb2", "theirs_first"),
        ("tritonclient.grpc.service_pb2", "theirs_first"),
        ("tritonclient.grpc.service_pb2", "ours_first"),
    ],
)
def test_foreign_stubs_can_be_imported_beside_ours(module: str, order: str) -> None:
    imports = ["import pagoda.serving.grpc.messages as ours", f"import {module} as theirs"]
    if order == "theirs_first":
        imports.reverse()
    code = "; ".join(imports) + (
        "; raw = theirs.ModelInferRequest(model_name='m', id='7').SerializeToString()"
        "; print(ours.ModelInferRequest.FromString(raw).id)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "7", result.stderr


def test_pool_describes_all_services_for_reflection() -> None:
    for name in ("inference.GRPCInferenceService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"):
        proto = FileDescriptorProto()
        POOL.FindServiceByName(name).file.CopyToProto(proto)
        assert proto.service
