"""/docs: a page out of files of the package, that asks no other host for anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pagoda.serving.http.documentation_page import DIRECTORY
from tests.support.rest_harness import RestHarness

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness(api_keys=("s3cret-key",)) as running:
        yield running


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline = ""
        self.in_script = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.in_script = tag in ("script", "style")
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") or name == "style" for name, _ in attributes)

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.inline += data.strip()


def test_everything_that_the_page_names_is_on_this_server_and_needs_no_key(harness: RestHarness) -> None:
    page = harness.client.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    links = _Links()
    links.feed(page.text)
    assert links.inline == ""  # the policy allows none
    named = [link for link in links.links if not link.startswith("data:")]
    assert len(named) == 4
    for link in named:
        answer = harness.client.get(f"/{link}")
        assert answer.status_code == 200, link
        assert answer.content
    description = re.search(r'url: "(.*?)"', harness.client.get("/docs/initialize.js").text)
    assert description is not None
    assert harness.client.get(f"/{description[1]}").json()["info"]["title"] == "Pagoda"


def test_the_browser_is_told_to_load_nothing_from_elsewhere(harness: RestHarness) -> None:
    for path, media_type in {
        "/docs": "text/html",
        "/docs/swagger-ui.css": "text/css",
        "/docs/swagger-ui-bundle.js": "text/javascript",
        "/docs/initialize.js": "text/javascript",
    }.items():
        headers = harness.client.get(path).headers
        assert headers["content-type"].partition(";")[0] == media_type
        assert headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        sources = {source for value in policy.values() for source in value.split()}
        assert sources == {"'none'", "'self'", "data:"}
        assert policy["script-src"] == "'self'"


def test_files_of_others_lie_beside_their_licences_and_as_they_were_published() -> None:
    for name in ("LICENSE", "swagger-ui-bundle.js.LICENSE.txt", "NOTICE"):
        assert (DIRECTORY / name).read_text(encoding="utf-8").strip()
    version = re.search(r"^SWAGGER_UI := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert f"swagger-ui-dist {version[1]}" in " ".join((DIRECTORY / "NOTICE").read_text(encoding="utf-8").split())
    assert "sourceMappingURL" not in (DIRECTORY / "swagger-ui.css").read_text(encoding="utf-8")


def test_the_page_can_be_switched_off() -> None:
    with RestHarness(disable_fastapi_docs=True) as harness:
        for path in ("/docs", "/docs/swagger-ui-bundle.js", "/openapi.json"):
            assert harness.client.get(path).status_code == 404
