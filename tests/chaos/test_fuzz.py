"""Requests made from the OpenAPI document, right and wrong ones: each is answered as the document says, and nothing breaks.

gRPC's messages are fuzzed in tests/serving/test_grpc_bad_input.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.chaos import SETTINGS, watched
from tests.support.notes import Note
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

NUM_EXAMPLES = 60
CHECKS = [status_code_conformance, content_type_conformance]
# What the server may say of itself: 501 is a feature that it does not have, 504 the deadline that a body asks for.
HONEST_STATUSES = (501, 504)
THE_MODEL = {"model_name": "demo", "model_version": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    # Short answers, or a fuzzer that leaves out max_tokens waits for hundreds of tokens each time.
    with ServerProcess(**SETTINGS, default_max_tokens=4) as running:
        running.wait_until_ready()
        yield running


def cases(operation: Any) -> st.SearchStrategy[Any]:
    """Requests of one operation, mostly to the model that is there, valid and invalid ones."""
    wanted = {parameter.name for parameter in operation.path_parameters}
    path = {name: value for name, value in THE_MODEL.items() if name in wanted}
    return st.one_of(
        *(
            operation.as_strategy(generation_mode=mode, path_parameters=parameters)
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            for parameters in ((path, None) if path else (None,))
        )
    )


async def test_no_request_makes_the_server_do_what_its_document_does_not_say(server: ServerProcess, note: Note) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    statuses: Counter[int] = Counter()

    def fuzz(operation: Any) -> None:
        @settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=cases(operation))
        def ask(case: Any) -> None:
            response = case.call(timeout=60)
            statuses[response.status_code] += 1
            assert response.status_code < 500 or response.status_code in HONEST_STATUSES, (
                response.status_code,
                response.text,
                case.as_curl_command(),
            )
            # OpenAPI 3.1 knows a stream of events as a string and no more.
            is_stream = response.headers.get("content-type", [""])[0].startswith("text/event-stream")
            case.validate_response(response, checks=CHECKS if is_stream else [*CHECKS, response_schema_conformance])

        ask()

    for operation in operations:
        fuzz(operation)
    counts = ", ".join(f"{number} * {status}" for status, number in sorted(statuses.items()))
    note(f"{statuses.total()} requests to {len(operations)} operations: {counts}")
    assert statuses.total() > len(operations)
    async with watched(server) as (_, observer):
        await observer.until_idle()
        assert (await observer.metrics())["engine_restarts_total"] == 0
    assert "Traceback" not in server.log
