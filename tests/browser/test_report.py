"""The page of `pagoda report` in Chromium: accessible, light and dark, at 360 pixels, without a request to any host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pagoda.monitoring.page import as_html
from tests.unit.monitoring.test_report import WELL

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
AXE = os.environ.get("TEST_AXE")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

FINDING = {"code": "c", "severity": "warning", "subject": "model m", "what": "w", "seen": ["1"], "advice": "a" * 200}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_and_fits(tmp_path: Path, scheme: Any) -> None:
    file = tmp_path / "report.html"
    file.write_text(as_html({**WELL, "advice": [FINDING]}))
    with playwright.sync_playwright() as starting:
        browser = starting.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 360, "height": 800}, color_scheme=scheme, bypass_csp=bool(AXE))
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if AXE is not None:
            page.add_script_tag(path=AXE)
            found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})")
            assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found["violations"]] == []
        assert asked == [file.as_uri()]
        browser.close()
