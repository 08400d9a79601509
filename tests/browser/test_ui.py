"""The web page in a real browser, against the demo model: what people do in its three rooms, while the engine is killed.

Needs Chromium (`TEST_CHROMIUM`, else the one in PATH) and playwright; with `TEST_AXE` naming axe-core's `axe.min.js`, the
pages are checked against WCAG 2.2 AA.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pagoda
from tests.support.server import ServerProcess

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
AXE = os.environ.get("TEST_AXE")
SCREENSHOTS = os.environ.get("TEST_SCREENSHOTS")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

HOSTILE = [
    "<script>window.hurt = 1</script>",
    "<img src=x onerror='window.hurt = 1'>",
    "<svg onload='window.hurt = 1'><animate onbegin='window.hurt = 1'/></svg>",
    "[here](javascript:window.hurt=1)",
    "[here](JaVaScRiPt:window.hurt=1) [data](data:text/html,<script>window.hurt=1</script>)",
    "![picture](https://elsewhere.example/pixel.png)",
    "<iframe srcdoc='<script>parent.hurt = 1</script>'></iframe>",
    "```html\n<script>window.hurt = 1</script>\n```",
    "| <b onmouseover=window.hurt=1>a</b> | b |\n|---|---|\n| <style>*{display:none}</style> | c |",
    "# <a href='javascript:window.hurt=1'>title</a>\n> <form action=https://elsewhere.example><input name=x></form>",
    '[a](https://ok.example/"onclick=window.hurt=1) **<i onclick=window.hurt=1>b</i>** `<u>`',
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hurt=1>",
]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    model = Path(pagoda.__file__).parent / "demo_model"
    with ServerProcess(model=model, speculative_config='{"method": "ngram", "num_speculative_tokens": 3}') as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as starting:
        launched = starting.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(server: ServerProcess, browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, bypass_csp=bool(AXE))
    opened = context.new_page()
    faults: list[str] = []
    hosts: set[str] = set()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    opened.goto(f"http://127.0.0.1:{server.port}/ui")
    opened.wait_for_selector("#state .dot.ready")
    opened.wait_for_selector("#talk select option", state="attached")
    yield opened
    assert faults == []
    assert hosts == {f"127.0.0.1:{server.port}"}
    context.close()


def ask(page: Any, text: str) -> None:
    page.fill("#talk form textarea", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#talk form button.primary:not([disabled])")


def check_accessible(page: Any) -> None:
    if AXE is None:
        return
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})")
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found["violations"]] == []


def shoot(page: Any, name: str) -> None:
    if SCREENSHOTS is not None:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


@contextmanager
def at_work(server: ServerProcess) -> Iterator[None]:
    """Conversations with the server, for pictures of an engine that has something to do."""
    if SCREENSHOTS is None:
        yield
        return

    def talk(number: int) -> None:
        said = [{"role": "user", "content": f"Who are you, and what is the number {number}?"}]
        for _ in range(4):
            body = {"messages": said, "max_tokens": 60 + 20 * (number % 5), "ignore_eos": True}
            answer = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            said += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "Tell me more."}]

    with ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(talk, number) for number in range(16)]
        time.sleep(4)  # so that there is something to see
        yield
        for each in asked:
            each.result()


def test_a_chat_with_tokens_edit_and_retry(page: Any) -> None:
    ask(page, "Who are you?")
    assert "demo model" in page.text_content(".message.assistant")
    assert "first token" in page.text_content(".message.assistant p.quiet")
    page.click(".who button:has-text('Tokens')")
    page.hover(".tokens span >> nth=2")
    assert "%" in page.text_content("#alternatives")
    page.focus(".tokens")
    before = page.text_content("#alternatives")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#alternatives") != before
    check_accessible(page)
    shoot(page, "ui-talk")
    page.click(".who button:has-text('Retry')")
    page.wait_for_selector("#talk form button.primary:not([disabled])")
    assert page.locator(".message").count() == 2
    page.click(".who button:has-text('Edit')")
    assert page.input_value("#talk form textarea") == "Who are you?"
    assert page.locator(".message").count() == 0


def test_two_settings_side_by_side_and_a_schema(page: Any) -> None:
    page.click("button:has-text('Side by side')")
    page.click("summary >> nth=0")
    page.locator('textarea[placeholder*=\'"type": "object"\']').first.fill(
        '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    )
    ask(page, "How many?")
    answers = page.locator(".message.assistant")
    assert answers.count() == 2
    assert answers.first.text_content().count("{") == 1


def test_bad_json_in_the_schema_is_a_sentence(page: Any) -> None:
    page.click("summary >> nth=0")
    page.locator('textarea[placeholder*=\'"type": "object"\']').first.fill("{")
    ask(page, "Anything?")
    assert "the JSON schema is not JSON" in page.text_content(".message .error")


def test_the_engine_at_work_and_its_death(page: Any, server: ServerProcess) -> None:
    page.click("button:has-text('Side by side')")
    ask(page, "Once upon a time, tell me a story.")
    page.click("#tab-watch")
    page.wait_for_selector("#watch td:has-text('KV cache:')")
    check_accessible(page)
    with at_work(server):
        page.select_option("select[aria-label='Seconds shown']", "10")
        shoot(page, "ui-watch")
    page.click("button:has-text('Pause')")
    page.click("button:has-text('Go on')")
    os.kill(server.engine_pid(), signal.SIGKILL)
    page.wait_for_selector("#state .dot.starting")
    assert "starting" in page.text_content("#state-text")
    page.wait_for_selector("#state .dot.ready", timeout=60_000)
    page.click("#tab-manage")
    page.wait_for_selector("#manage td:has-text('SIGKILL')")
    page.wait_for_selector("#manage td:has-text('max_num_seqs')")
    page.wait_for_selector("#manage p:has-text('no API keys')")
    page.wait_for_selector("#manage p:has-text('No adapters are served')")
    check_accessible(page)
    shoot(page, "ui-manage")
    page.click("#tab-talk")
    ask(page, "Who are you?")
    assert "demo model" in page.locator(".message.assistant").last.text_content()


def test_hostile_output_is_inert(page: Any) -> None:
    inert = """async (corpus) => {
        const { render } = await import("/ui/markdown.js");
        const box = document.createElement("div");
        for (const text of corpus) box.append(render(text));
        document.body.append(box);
        const bad = [...box.querySelectorAll("*")].filter((node) =>
            /^(script|img|svg|iframe|style|form|input|object|embed|math|link|meta)$/i.test(node.tagName)
            || [...node.attributes].some((each) => /^on|^style$|^src/i.test(each.name))
            || (node.href && !/^(https?|mailto):/i.test(node.href)));
        for (const node of box.querySelectorAll("*")) { node.click?.(); node.dispatchEvent(new Event("mouseover")); }
        await new Promise((resolve) => setTimeout(resolve, 200));
        return [bad.map((node) => node.outerHTML), window.hurt ?? null];
    }"""
    page.evaluate("window.open = () => null; addEventListener('click', (event) => event.preventDefault(), true)")
    assert page.evaluate(inert, HOSTILE) == [[], None]


def test_markdown_becomes_what_it_says(page: Any) -> None:
    text = "# A\n\nb **c** `d` *e*\n\n- one\n- two\n\n1. x\n2. y\n\n```js\nlet a;\n```\n\n| p | q |\n|---|---|\n| 1 | 2 |\n\n[l](https://e.example)"
    made = page.evaluate(
        """async (text) => { const { render } = await import("/ui/markdown.js");
        const box = document.createElement("div"); box.append(render(text));
        const found = box.querySelectorAll("h3, strong, code, em, ul li, ol li, td, a");
        return [...found].map((node) => `${node.tagName} ${node.textContent}`); }""",
        text,
    )
    assert made == [
        *("H3 A", "STRONG c", "CODE d", "EM e", "LI one", "LI two", "LI x", "LI y"),
        *("CODE let a;", "TD 1", "TD 2", "A l"),
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_360_pixels(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    for room in ("talk", "watch", "manage"):
        page.click(f"#tab-{room}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        check_accessible(page)


def test_the_rooms_by_keyboard(page: Any) -> None:
    page.focus("#tab-talk")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-watch", "aria-selected") == "true"
    page.keyboard.press("ArrowLeft")
    page.focus("#talk form textarea")
    page.keyboard.type("Who are you?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant p.quiet")
