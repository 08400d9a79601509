"""`/docs` in a real browser: Swagger UI out of the server's own files, under its policy, and a request sent from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.test_ui import CHROMIUM, browser
from tests.support.server import ServerProcess

__all__ = ["browser"]  # the fixture

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as running:
        running.wait_until_ready()
        yield running


def test_a_request_is_tried_out_and_no_other_host_is_asked(server: ServerProcess, browser: Any) -> None:
    page = browser.new_page()
    hosts: set[str] = set()
    faults: list[str] = []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    page.click("#operations-server-version_version_get button.opblock-summary-control")
    page.click("button.execute")
    page.wait_for_selector(".live-responses-table .response-col_status:has-text('200')")
    assert '"version"' in page.text_content(".live-responses-table .highlight-code, .live-responses-table .microlight")
    assert faults == []
    assert hosts == {f"127.0.0.1:{server.port}"}
    page.close()
