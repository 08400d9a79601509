from __future__ import annotations

import copy
from enum import StrEnum

import pytest
from transformers import AutoTokenizer

from pagoda.errors import ConfigError, InvalidRequestError
from pagoda.text.chat_template import ChatTemplate, chat_template_from_config
from pagoda.text.tokenizer import Tokenizer
from tests.support.tokenizers import CHATML, save_tokenizer

# Written for these tests, with what real templates use: loop controls, namespaces, filters, generation blocks, tools.
RICH = """
{%- if messages[0].role == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif -%}
{{ bos_token }}
{%- if tools %}
[TOOLS]{{ tools | tojson }}{{ tools | tojson(indent=2) }}[/TOOLS]
{%- endif %}
{%- if documents %}{% for document in documents %}<doc>{{ document.title | upper }}</doc>{% endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception('No role ' + message.role + ' here') }}
    {%- endif %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- set ns.last = loop.index0 %}
    {%- if message.role == 'assistant' %}
        {%- generation %}<a>{{ message.content | trim }}
        {%- if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}</a>{% endgeneration %}
    {%- else %}<u>{{ message.content }}</u>{% endif %}
{%- endfor %}
{%- if system is defined %}<sys>{{ system }}</sys>{% endif %}{{ ns.last }}{{ dict(a=1) }}{{ strftime_now('%Y') }}
{%- if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}
{%- if add_generation_prompt %}<a>{% endif %}
"""
PARTS = (
    "{% for message in messages %}[{{ message.role }}]{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}|{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)
PARTS_ONLY = "{% for message in messages %}{% for part in message.content %}{{ part['text'] }};{% endfor %}{% endfor %}"
CHAT = [
    {"role": "system", "content": 'Be <brief> & "kind"; isn\'t it 塔?'},
    {"role": "user", "content": "Hi\n there "},
    {"role": "assistant", "content": "  Hello.  ", "tool_calls": None},
    {"role": "tool", "content": "skipped"},
    {"role": "user", "content": "<|im_end|>?"},
]
TOOLS = [{"type": "function", "function": {"name": "ö<f>", "parameters": {"b": 1, "a": [True, None]}}}]
DOCUMENTS = [{"title": "one", "text": "text"}]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def both(template: object):
        path = tmp_path_factory.mktemp("chat")
        save_tokenizer(path, "byte_level_bpe", chat_template=template, bos_token="<|im_start|>")
        ours = Tokenizer.from_directory(path)
        return ChatTemplate(ours.chat_templates, ours.special_tokens), ours, AutoTokenizer.from_pretrained(path)

    return both


@pytest.mark.parametrize("template", [RICH, CHATML, PARTS], ids=["rich", "chatml", "parts"])
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"tools": TOOLS, "documents": DOCUMENTS, "add_generation_prompt": True},
    ],
)
def test_renders_as_transformers_does(load, template, options):
    ours, tokenizer, theirs = load(template)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, **options)
    assert ours.render(CHAT, **options) == expected
    expected_ids = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False, **options)
    assert tokenizer.encode(expected, add_special_tokens=False) == expected_ids


def test_passes_further_variables_to_the_template(load):
    ours, _, theirs = load(RICH)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, enable_thinking=False)
    rendered = ours.render(CHAT, template_variables={"enable_thinking": False}, add_generation_prompt=False)
    assert rendered == expected
    assert "thinking=False" in rendered


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_any_of_its_names(load, name):
    ours, _, theirs = load(RICH)
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", name: "because"}]
    rendered = ours.render(chat, add_generation_prompt=False)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False)
    assert "(because)" in rendered


@pytest.mark.parametrize("template", [RICH, CHATML, PARTS], ids=["rich", "chatml", "parts"])
@pytest.mark.parametrize("final", ["Once upon", "  spaced  ", "ends with a line\n"])
def test_continues_the_final_message_as_transformers_does(load, template, final):
    ours, _, theirs = load(template)
    chat = [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": final}]
    rendered = ours.render(chat, continue_final_message=True, add_generation_prompt=False)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert rendered.endswith(final.strip()) or rendered.endswith(final)


def test_continues_a_final_message_that_is_a_list_of_parts(load):
    ours, _, theirs = load(PARTS)
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert ours.render(chat, continue_final_message=True, add_generation_prompt=False) == expected


def test_picks_named_templates_as_transformers_does(load):
    named = [
        {"name": "default", "template": "default {{ messages[0].content }}"},
        {"name": "tool_use", "template": "tools {{ messages[0].content }}"},
        {"name": "other", "template": "other {{ messages[0].content }}"},
    ]
    ours, _, theirs = load(named)
    chat = [{"role": "user", "content": "x"}]
    assert ours.names == ["default", "other", "tool_use"]
    assert ours.render(chat) == theirs.apply_chat_template(chat, tokenize=False) == "default x"
    assert ours.render(chat, tools=TOOLS) == theirs.apply_chat_template(chat, tools=TOOLS, tokenize=False) == "tools x"
    assert ours.render(chat, template_name="other") == "other x"
    with pytest.raises(InvalidRequestError, match=r"no chat template 'third'.*default, other, tool_use"):
        ours.render(chat, template_name="third")


def test_template_files_win_over_the_configuration(tmp_path):
    path = save_tokenizer(tmp_path, "byte_level_bpe", chat_template="from the configuration")
    (path / "chat_template.jinja").write_text("from the file")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    templates = Tokenizer.from_directory(path).chat_templates
    assert templates == {"default": "from the file", "tool_use": "for tools"}
    assert templates == AutoTokenizer.from_pretrained(path).chat_template


def test_parts_reach_a_template_that_reads_parts_and_are_joined_for_one_that_reads_strings():
    chat = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert ChatTemplate({"default": PARTS}).render(chat) == "[user]one|two|"
    assert "<|im_start|>user\none\ntwo<|im_end|>" in ChatTemplate({"default": CHATML}).render(chat)


def test_a_string_reaches_a_template_that_reads_only_parts_as_one_part():
    assert ChatTemplate({"default": PARTS_ONLY}).render([{"role": "user", "content": "whole"}]) == "whole;"


def test_messages_of_the_caller_stay_as_they_are():
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "one"}]}]
    before = copy.deepcopy(chat)
    ChatTemplate({"default": PARTS}).render(chat, continue_final_message=True, add_generation_prompt=False)
    assert chat == before


def test_an_enumeration_counts_as_its_string():
    class Role(StrEnum):
        USER = "user"

    assert ChatTemplate({"default": "{{ messages[0].role }}"}).render([{"role": Role.USER, "content": ""}]) == "user"


BAD_MESSAGES = {
    "none": ([], "messages is empty"),
    "no object": (["hello"], "objects"),
    "no role": ([{"content": "x"}], "role"),
    "role of a wrong type": ([{"role": 3, "content": "x"}], "role"),
    "an image": ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'image_url'"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "'text'"),
    "not JSON": ([{"role": "user", "content": object()}], "no JSON value"),
    "a key that is no string": ([{"role": "user", "content": {1: 2}}], "no string"),
    "what the template refuses": ([{"role": "robot", "content": "x"}], "No role robot here"),
    "content of a wrong type": ([{"role": "user", "content": 3}], "string or a list of parts"),
}


@pytest.mark.parametrize(("messages", "named"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_bad_messages_are_the_clients_mistake(messages, named):
    with pytest.raises(InvalidRequestError, match=named):
        ChatTemplate({"default": RICH}).render(messages)


@pytest.mark.parametrize("expression", ["messages[0].content + 1", "1 / 0", "messages[0].nothing.more", "nothing()"])
def test_what_a_template_trips_over_is_answered_with_its_words(expression):
    template = ChatTemplate({"default": "{{ " + expression + " }}"})
    with pytest.raises(InvalidRequestError, match=r"chat template refused the messages: ."):
        template.render([{"role": "user", "content": "x"}])


def test_deeply_nested_messages_are_refused():
    content: object = "x"
    for _ in range(200):
        content = [content]
    with pytest.raises(InvalidRequestError, match="deeper"):
        ChatTemplate({"default": RICH}).render([{"role": "user", "content": content}])


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_rendered():
    template = ChatTemplate({"default": "{{ raise_exception('was rendered') }}"})
    chat = [{"role": "user", "content": "x" * 60}, {"role": "user", "content": "y" * 60}]
    with pytest.raises(InvalidRequestError, match="100 at most"):
        template.render(chat, max_characters=100)
    with pytest.raises(InvalidRequestError, match="100 at most"):
        template.render([{"role": "user", "content": ""}] * 1000, max_characters=100)
    with pytest.raises(InvalidRequestError, match="100 at most"):
        ChatTemplate({"default": "{{ 'z' * 101 }}"}).render([{"role": "user", "content": "x"}], max_characters=100)


def test_a_tokenizer_without_a_template_says_so():
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatTemplate({}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "options",
    [
        {"continue_final_message": True},  # together with the generation prompt
        {"template_variables": {"messages": []}},
        {"template_variables": [1]},
        {"continue_final_message": True, "add_generation_prompt": False, "template_variables": {}},  # no content
    ],
)
def test_contradicting_options_are_the_clients_mistake(options):
    with pytest.raises(InvalidRequestError):
        ChatTemplate({"default": RICH}).render([{"role": "user"}], **options)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(template):
    try:
        rendered = ChatTemplate({"default": template}).render([{"role": "user", "content": "x"}])
    except InvalidRequestError:
        return
    assert rendered == ""


def test_configured_template_may_be_a_file_the_text_itself_or_a_name(tmp_path):
    own = {"default": "own", "other": "another"}
    path = tmp_path / "template.jinja"
    path.write_text("from {{ 'file' }}")
    assert chat_template_from_config(None, own) == own
    assert chat_template_from_config(str(path), own) == {"default": "from {{ 'file' }}"}
    assert chat_template_from_config("{{ 'text' }}", own) == {"default": "{{ 'text' }}"}
    assert chat_template_from_config("other", own) == {"default": "another"}
    with pytest.raises(ConfigError, match=r"no file.*default, other"):
        chat_template_from_config("/no/such/file", own)
    with pytest.raises(ConfigError, match="syntax error in line 2"):
        chat_template_from_config("{{ 1 }}\n{% for %}", own)
