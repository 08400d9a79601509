"""Chat templates that anyone may have made, in a process of their own: one clear error, and the next chat is rendered."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import threading
import time

import pytest

from pagoda.errors import ConfigError, InvalidRequestError
from pagoda.text import template_process
from pagoda.text.chat_template import ChatTemplate
from pagoda.text.template_process import TemplateProcess, _read
from tests.support.child_processes import children_running

# What the first message says is what the template does.
TEMPLATE = """
{%- set what = messages[0].content -%}{%- set huge = 3000000000 -%}
{%- if what == 'endless' -%}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif what == 'recursive' -%}{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}
{%- elif what == 'repeated' -%}{{ ('x' * huge)|length }}
{%- elif what == 'wide' -%}{{ 'x'|center(huge)|length }}
{%- elif what == 'doubled' -%}{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}
{%- elif what == 'list' -%}{% set ns = namespace(x=[1]) %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}
{%- elif what == 'printed' -%}{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}
{%- elif what == 'asked' -%}{{ ('x' * n)|length }}
{%- else -%}{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}
{%- endif -%}
"""


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def renderer():
    renderer = TemplateProcess(ChatTemplate({"default": TEMPLATE}, {"bos_token": "<s>"}))
    yield renderer
    renderer.close()


def children() -> set[int]:
    return {child.pid for child in children_running("pagoda.text.template_process")}


@pytest.mark.parametrize("what", ["endless", "repeated", "wide", "doubled", "list", "printed", "recursive"])
def test_a_request_that_takes_too_much_is_refused_and_the_same_process_goes_on(renderer, what):
    before = children()
    with pytest.raises(InvalidRequestError, match=r"the chat template (takes more|refused)") as refused:
        renderer.render(says(what))
    assert refused.value.param == "messages"
    assert renderer.render(says("hi")) == "<s>hi"
    assert children() == before


def test_a_process_that_does_not_answer_is_replaced(renderer, monkeypatch):
    monkeypatch.setattr(template_process, "_GRACE_SECONDS", 0.1)
    (stuck,) = children()
    os.kill(stuck, signal.SIGSTOP)
    with pytest.raises(InvalidRequestError, match="more time or memory"):
        renderer.render(says("hi"))
    monkeypatch.undo()
    assert renderer.render(says("hi")) == "<s>hi"
    assert children() != {stuck}


def test_what_variables_ask_for_is_bounded_too(renderer):
    assert renderer.render(says("asked"), template_variables={"n": 1000}) == "1000"
    with pytest.raises(InvalidRequestError, match="more memory"):
        renderer.render(says("asked"), template_variables={"n": 1 << 40})


def test_renders_as_in_this_process(renderer):
    here = ChatTemplate({"default": TEMPLATE}, {"bos_token": "<s>"})
    messages = [*says('a "塔" \ud83d'), {"role": "assistant", "content": None}, *says("🙂\x00")]
    assert renderer.render(messages) == here.render(messages)
    with pytest.raises(InvalidRequestError, match="needs a role") as refused:
        renderer.render([{"content": "x"}])
    assert refused.value.param == "messages"
    with pytest.raises(InvalidRequestError, match="is not JSON"):
        renderer.render([{"role": "user", "content": object()}])


def test_a_large_conversation_fits(renderer):
    text = "words of 25 characters, " * 40_000
    assert renderer.render([*says("a"), *says(text)]) == f"<s>a{text}"
    many = says("m") * 20_000
    assert renderer.render(many) == "<s>" + "m" * 20_000


def test_threads_take_turns(renderer):
    prompts: dict[int, str] = {}

    def render(number: int) -> None:
        prompts[number] = renderer.render(says(f"{number}"))

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prompts == {number: f"<s>{number}" for number in range(8)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages|nofilter }}", "No filter named"),
        ("{{" + "(" * 300 + "1" + ")" * 300 + "}}", "compiled"),
    ],
)
def test_a_template_that_cannot_be_compiled_ends_the_start(source, message):
    before = children()
    with pytest.raises(ConfigError, match=message):
        TemplateProcess(ChatTemplate({"default": source}))
    assert children() == before


def test_close_ends_the_process():
    before = children()
    renderer = TemplateProcess(ChatTemplate({"default": "{{ messages[0].content }}"}))
    started = children() - before
    renderer.close()
    assert len(started) == 1
    assert children() == before


def test_an_answer_comes_through_a_descriptor_of_any_number() -> None:
    """In a server with a thousand connections a new one is above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    source, sink = os.pipe()
    high = fcntl.fcntl(source, fcntl.F_DUPFD, 1500)
    try:
        os.write(sink, b"answer")
        assert _read(high, 6, time.monotonic() + 5) == b"answer"
        with pytest.raises(TimeoutError, match="did not answer"):
            _read(high, 1, time.monotonic())
    finally:
        for descriptor in (source, sink, high):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
