"""Print the V2 messages of another project's stubs as JSON: `{message: {field: [number, type, repeated]}}`.

Run in a process of its own (`tritonclient` or `kserve` as argument): both define package `inference` in the one default pool.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto


def messages(prefix: str, protos: Any) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for proto in protos:
        name = prefix + proto.name
        found[name] = {
            field.name: [
                field.number,
                field.type_name or field.type,
                field.label == field.LABEL_REPEATED,
            ]
            for field in proto.field
        }
        found |= messages(name + ".", proto.nested_type)
    return found


def described(descriptor: Any) -> dict[str, Any]:
    proto = FileDescriptorProto()
    descriptor.CopyToProto(proto)
    assert isinstance(next(iter(proto.message_type)), DescriptorProto)
    return {
        "messages": messages("", proto.message_type),
        "methods": {
            f"{service.name}.{method.name}": [
                method.input_type,
                method.output_type,
                method.client_streaming,
                method.server_streaming,
            ]
            for service in proto.service
            for method in service.method
        },
        "enums": {enum.name: {value.name: value.number for value in enum.value} for enum in proto.enum_type},
    }


def main() -> None:
    if sys.argv[1] == "kserve":
        from kserve.protocol.grpc import grpc_predict_v2_pb2

        files = [grpc_predict_v2_pb2.DESCRIPTOR]
    else:
        from tritonclient.grpc import model_config_pb2, service_pb2

        files = [service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR]
    merged: dict[str, dict[str, Any]] = {"messages": {}, "methods": {}, "enums": {}}
    for file in files:
        for kind, content in described(file).items():
            merged[kind] |= content
    json.dump(merged, sys.stdout)


if __name__ == "__main__":
    main()
