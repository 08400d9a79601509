"""Keys, TLS and limits of the gRPC port."""

from __future__ import annotations

import datetime
import ipaddress
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pagoda.errors import ConfigError
from pagoda.serving.grpc.messages import message_class
from tests.support.grpc_harness import GrpcHarness, infer_request, texts_of

KEY = "sk-the-right-one"


@pytest.fixture(scope="module")
def guarded() -> Iterator[GrpcHarness]:
    with GrpcHarness(api_keys=(KEY, "sk-another")) as running:
        yield running


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}", "Bearer sk-another"])
def test_a_known_key_lets_in(guarded: GrpcHarness, authorization: str) -> None:
    response = guarded.infer(infer_request("hi"), metadata=[("authorization", authorization)])
    assert texts_of(response) == ["HI"]


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", KEY)],
        [("authorization", f"Basic {KEY}")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", "Bearer ")],
        [("x-api-key", KEY)],
        [("authorization-bin", KEY.encode())],
    ],
)
@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelMetadata", "RepositoryIndex"])
def test_no_key_or_a_wrong_one_is_unauthenticated(
    guarded: GrpcHarness, caplog: pytest.LogCaptureFixture, method: str, metadata: list[Any]
) -> None:
    caplog.set_level(logging.DEBUG)
    name = "ModelInferRequest" if method == "ModelStreamInfer" else f"{method}Request"
    request = message_class(name)()
    call = guarded.stub(method)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([request]), metadata=metadata, timeout=10)) if method == "ModelStreamInfer" else call(
            request, metadata=metadata, timeout=10
        )
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert KEY not in caught.value.details()
    assert KEY not in caplog.text


def test_probes_need_no_key(guarded: GrpcHarness) -> None:
    assert guarded.stub("ServerReady")(message_class("ServerReadyRequest")()).ready
    assert guarded.stub("ServerLive")(message_class("ServerLiveRequest")()).live
    assert guarded.stub("ModelReady")(message_class("ModelReadyRequest")(name="demo")).ready
    health = health_pb2_grpc.HealthStub(guarded.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pagoda test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    directory = tmp_path_factory.mktemp("tls")
    certificate_file, key_file = directory / "tls.crt", directory / "tls.key"
    certificate_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


def test_tls_serves_who_trusts_the_certificate_and_nobody_in_the_clear(certificate: tuple[Path, Path]) -> None:
    certificate_file, key_file = certificate
    with GrpcHarness(ssl_certfile=str(certificate_file), ssl_keyfile=str(key_file)) as harness:
        trusting = grpc.ssl_channel_credentials(certificate_file.read_bytes())
        with grpc.secure_channel(harness.address, trusting) as channel:
            response = harness.stub("ModelInfer", channel)(infer_request("hi"), timeout=10)
            assert texts_of(response) == ["HI"]
        with grpc.insecure_channel(harness.address) as channel, pytest.raises(grpc.RpcError) as caught:
            harness.stub("ModelInfer", channel)(infer_request("hi"), timeout=5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_certificate_that_cannot_be_read_is_named(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    missing = GrpcHarness(ssl_certfile=str(tmp_path / "none.crt"), ssl_keyfile=str(certificate[1]))
    with pytest.raises(ConfigError, match=r"ssl_certfile: cannot read .*none\.crt"):
        missing.__enter__()
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    broken = GrpcHarness(ssl_certfile=str(garbage), ssl_keyfile=str(certificate[1]))
    with pytest.raises(ConfigError, match="ssl_certfile"):
        broken.__enter__()


def test_a_message_as_large_as_allowed_is_taken_and_one_byte_more_is_not() -> None:
    with GrpcHarness(max_grpc_message_bytes=4096) as harness:
        request = infer_request("hi")
        padding = request.parameters["sequence_id"]
        padding.string_param = "x" * 4000
        padding.string_param += "x" * (4096 - request.ByteSize())
        assert request.ByteSize() == 4096
        assert texts_of(harness.infer(request)) == ["HI"]
        padding.string_param += "x"
        with pytest.raises(grpc.RpcError) as caught:
            harness.infer(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        compressible = infer_request("hi", id="x" * 100_000)
        with pytest.raises(grpc.RpcError) as caught:
            harness.infer(compressible, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert texts_of(harness.infer(infer_request("ok"))) == ["OK"]
