"""A gRPC stream that nobody reads holds back what is generated for it, and is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.support.grpc_harness import GrpcHarness, infer_request
from tests.support.waiting import wait_until

# Small windows, so that a stream is full after 64 KiB and not after some megabytes.
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
MUCH = infer_request("x" * 60, parameters={"n": 64, "max_tokens": 60})


@pytest.mark.parametrize("is_half_closed", [True, False])
def test_a_stream_that_nobody_reads_ends_and_so_do_its_requests(is_half_closed: bool) -> None:
    no_more = threading.Event()

    def requests() -> Iterator[Any]:
        yield MUCH
        if not is_half_closed:
            no_more.wait(60)

    with (
        GrpcHarness(send_timeout_seconds=0.5) as harness,
        grpc.insecure_channel(harness.address, options=NARROW) as channel,
    ):
        responses = harness.stub("ModelStreamInfer", channel)(requests())
        next(responses)
        wait_until(lambda: bool(harness.generator.left))
        # Whoever comes back to it hears why; and the server has kept nothing but what was on its way.
        with pytest.raises(grpc.RpcError) as caught:
            list(responses)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        no_more.set()
        assert harness.infer(infer_request("good")).outputs


def test_a_reader_that_is_only_slow_gets_everything() -> None:
    with GrpcHarness() as harness, grpc.insecure_channel(harness.address, options=NARROW) as channel:
        num_read = 0
        for _ in harness.stub("ModelStreamInfer", channel)(iter([MUCH]), timeout=120):
            num_read += 1
            if num_read % 500 == 0:
                time.sleep(0.1)
        assert num_read == 60 * 64
        assert not harness.generator.left
