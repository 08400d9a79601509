"""Message classes and method table of `inference.GRPCInferenceService`, in a descriptor pool of their own.

protobuf's default pool can hold one definition of `inference.ModelInferRequest`, and importing kserve or tritonclient takes
that place; so ours are made from a descriptor set (compiled from proto/grpc_predict_v2.proto) in `POOL`. The pool also
knows the health and reflection services, so that reflection can describe everything the server offers.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

SERVICE_NAME = "inference.GRPCInferenceService"
DESCRIPTOR_SET = "grpc_predict_v2.binpb"


def _make_pool() -> DescriptorPool:
    pool = DescriptorPool()
    described = FileDescriptorSet.FromString(files("pagoda.serving.grpc").joinpath(DESCRIPTOR_SET).read_bytes())
    for file in described.file:
        pool.AddSerializedFile(file.SerializeToString())
    for module in (health_pb2, reflection_pb2):
        descriptor: FileDescriptor = module.DESCRIPTOR
        pool.AddSerializedFile(descriptor.serialized_pb)
    return pool


POOL = _make_pool()


@cache
def message_class(name: str) -> Any:
    """The class of message `inference.<name>`."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


def service_methods() -> list[MethodDescriptor]:
    """Every method of the service; input and output types are in `POOL`."""
    service: ServiceDescriptor = POOL.FindServiceByName(SERVICE_NAME)
    return list(service.methods)


InferTensorContents = message_class("InferTensorContents")
ModelConfigResponse = message_class("ModelConfigResponse")
ModelInferRequest = message_class("ModelInferRequest")
ModelInferResponse = message_class("ModelInferResponse")
ModelMetadataResponse = message_class("ModelMetadataResponse")
ModelReadyResponse = message_class("ModelReadyResponse")
ModelStatisticsResponse = message_class("ModelStatisticsResponse")
ModelStreamInferResponse = message_class("ModelStreamInferResponse")
RepositoryIndexResponse = message_class("RepositoryIndexResponse")
RepositoryModelLoadResponse = message_class("RepositoryModelLoadResponse")
RepositoryModelUnloadResponse = message_class("RepositoryModelUnloadResponse")
ServerLiveResponse = message_class("ServerLiveResponse")
ServerMetadataResponse = message_class("ServerMetadataResponse")
ServerReadyResponse = message_class("ServerReadyResponse")
