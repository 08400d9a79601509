"""The web page in a real browser, against the demo model: what people do in its three rooms, while the engine is killed.

Needs Chromium (`TEST_CHROMIUM`, else the one in PATH) and playwright; with `TEST_AXE` naming axe-core's `axe.min.js`, the
pages are checked against WCAG 2.2 AA.
"""

from __future__ import annotations

import json
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
from tests.support.lora_adapters import write_adapter
from tests.support.server import ServerProcess

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
AXE = os.environ.get("TEST_AXE")
SCREENSHOTS = os.environ.get("TEST_SCREENSHOTS")
DEMO_MODEL = Path(pagoda.__file__).parent / "demo_model"

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
    drafts = '{"method": "ngram", "num_speculative_tokens": 3}'
    with ServerProcess(model=DEMO_MODEL, speculative_config=drafts, enable_lora="true") as running:
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


def test_an_answer_is_stopped(page: Any) -> None:
    page.click("summary >> nth=0")
    page.get_by_label("More of the request's body").first.fill('{"ignore_eos": true, "max_tokens": 600}')
    page.fill("#talk form textarea", "Tell me a story.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant p.quiet")
    page.keyboard.press("Escape")
    page.wait_for_selector(".message.assistant p.quiet:has-text('ended by stopped')")
    assert page.is_disabled("#talk form button:has-text('Stop')")


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
    page.click("#tab-talk")
    ask(page, "Who are you?")
    assert "demo model" in page.locator(".message.assistant").last.text_content()


def test_the_last_minutes_are_looked_at_and_saved(page: Any, tmp_path: Path) -> None:
    ask(page, "Who are you?")
    page.click("#tab-watch")
    lane = page.locator("canvas[aria-label='Requests over time']")
    said = page.locator("#watch p[aria-live]")
    for moved in range(300):  # the latencies come half a second after the last step at most
        lane.hover(position={"x": 20 + moved % 2, "y": 5})
        if "first token after" in said.text_content() and "ended: stop" in said.text_content():
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError(said.text_content())
    with page.expect_download() as downloaded:
        page.click("button:has-text('Save trace')")
    file = tmp_path / "trace.json"
    downloaded.value.save_as(file)
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["ph"] for event in events} >= {"M", "X", "C", "i"}
    assert {event["name"] for event in events} >= {"step: prefill", "step: decode", "ended: stop"}
    assert page.text_content("#watch .at") == "now"
    scrub = page.get_by_label("Seconds back")
    scrub.focus()
    page.keyboard.press("ArrowLeft")
    assert scrub.input_value() == "-0.5"
    assert page.get_by_text("Go on").get_attribute("aria-pressed") == "true"
    page.wait_for_function("document.querySelector('#watch .at').textContent !== 'now'")
    page.click("button:has-text('Go on')")
    page.wait_for_function("document.querySelector('#watch .at').textContent === 'now'")


def test_adapters_and_settings_are_changed(page: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "sql", DEMO_MODEL)
    page.on("dialog", lambda dialog: dialog.accept("9" if dialog.type == "prompt" else None))
    page.click("#tab-manage")
    page.get_by_label("Name", exact=True).fill("sql")
    page.get_by_label("Path").fill(str(tmp_path / "none"))
    page.keyboard.press("Enter")
    page.wait_for_selector("#manage p.error:has-text('none')")
    page.get_by_label("Path").fill(str(tmp_path / "sql"))
    page.keyboard.press("Enter")
    page.wait_for_selector("#manage td:has-text('sql')")
    check_accessible(page)
    shoot(page, "ui-manage")
    page.get_by_label("Filter settings by name").fill("max_num_seqs")
    page.click("button[aria-label^='Change max_num_seqs']")
    page.wait_for_selector("#manage tr:has-text('max_num_seqs'):has-text('PATCH'):has-text('9')")
    page.click("#tab-talk")
    page.wait_for_selector("#talk select option[value='sql']", state="attached")
    page.select_option("#talk select >> nth=0", "sql")
    ask(page, "Who are you?")
    assert page.locator(".message .error").count() == 0
    page.click("#tab-manage")
    page.click("button[aria-label='Unload the adapter sql']")
    page.wait_for_selector("#manage p:has-text('No adapters are served')")


def test_with_keys_the_page_asks_for_one(browser: Any) -> None:
    with ServerProcess(model=DEMO_MODEL, api_key="secret-of-a-test") as server:
        server.wait_for_log("is ready:")
        page = browser.new_page(bypass_csp=bool(AXE))
        page.goto(f"http://127.0.0.1:{server.port}/ui")
        page.wait_for_selector("#notice:has-text('An API key is needed')")
        check_accessible(page)
        page.keyboard.type("secret-of-a-test")  # the field has the focus
        page.keyboard.press("Enter")
        page.wait_for_selector("#notice:has-text('may not look at the engine')")  # it is for inference only
        page.wait_for_selector("#talk select option", state="attached")
        ask(page, "Who are you?")
        assert "demo model" in page.text_content(".message.assistant")
        assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
        page.close()


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
    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement?.matches(selector) ?? false", selector):
                return
        raise AssertionError(f"{selector} is not reached by Tab")

    page.keyboard.type("Who are you?")  # the field of the first room has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant p.quiet")
    page.wait_for_selector("#talk form button.primary:not([disabled])")
    tab_to("#tab-talk")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-watch", "aria-selected") == "true"
    tab_to("#watch button")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.textContent") == "Go on"
    tab_to("#tab-watch")
    page.keyboard.press("ArrowRight")
    tab_to("#manage button")
    assert page.evaluate("document.activeElement.textContent") == "Unload"
