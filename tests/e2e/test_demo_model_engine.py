"""The demo model through the whole engine: whether its answers are right shows whether the right KV blocks were read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagoda import LLM, SamplingParams
from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.sampling.output import FinishReason
from pagoda.text.output import RequestOutput
from tests.support.demo_questions import IDENTITY, WEATHER_TOOL, FactSheet, Message, ask

NUM_FACTS = 170  # about 1500 tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def engine(**settings: Any) -> LLM:
    values = {"dtype": "float32", "threads": 1, "kv_cache_memory_bytes": "64MiB", "device": "cpu", **settings}
    return LLM(str(demo_checkpoint()), **values)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine() as made:
        yield made


def answer_of(output: RequestOutput) -> str:
    assert output.outputs[0].finish_reason == FinishReason.STOP, output
    return output.outputs[0].text


def answer(llm: LLM, messages: list[Message], **template_arguments: Any) -> str:
    (output,) = llm.chat(messages, GREEDY, **template_arguments)
    return answer_of(output)


def right_share(outputs: list[RequestOutput], questions: list[tuple[list[Message], str]]) -> float:
    """Share of right answers. The model itself errs once in some fifty; an engine that reads a wrong block always errs."""
    answers = [answer_of(output) for output in outputs]
    return sum(said == expected for said, (_, expected) in zip(answers, questions, strict=True)) / len(questions)


def test_facts_are_recalled_however_far_back_their_block_lies(llm: LLM) -> None:
    questions = [FactSheet.draw(position, NUM_FACTS).ask(position) for position in range(4, NUM_FACTS, 15)]
    assert len(llm.encode_chat(questions[0][0])) > 1300
    assert right_share(llm.chat([messages for messages, _ in questions], GREEDY), questions) >= 0.8


@pytest.mark.parametrize("chunk", [48, 333])
def test_facts_are_recalled_across_a_prompt_computed_in_chunks(chunk: int) -> None:
    questions = [FactSheet.draw(7, NUM_FACTS).ask(position) for position in (10, 60, 110, 150)]
    with engine(max_num_batched_tokens=chunk, max_num_seqs=4, enable_prefix_caching=False) as llm:
        assert right_share(llm.chat([messages for messages, _ in questions], GREEDY), questions) >= 0.75


def test_later_questions_on_the_same_sheet_read_the_first_ones_blocks(llm: LLM) -> None:
    sheet = FactSheet.draw(12, NUM_FACTS)
    questions = [sheet.ask(position) for position in (20, 60, 90, 115, 140, 160)]
    outputs = [llm.chat(messages, GREEDY)[0] for messages, _ in questions]
    assert outputs[0].num_cached_tokens < 64  # the template's head at most
    assert all(output.num_cached_tokens > 1200 for output in outputs[1:])
    assert right_share(outputs, questions) >= 0.8


def test_sheets_that_differ_in_one_value_do_not_share_what_follows_it(llm: LLM) -> None:
    sheet = FactSheet.draw(9, NUM_FACTS)
    questions = []
    for position in (40, 80, 120):
        key = list(sheet.facts)[position]
        changed = FactSheet({**sheet.facts, key: 1099 - sheet.facts[key]})
        questions += [sheet.ask(position), changed.ask(position)]
    outputs = [llm.chat(messages, GREEDY)[0] for messages, _ in questions]
    assert right_share(outputs, questions) >= 0.8


def test_requests_preempted_for_lack_of_blocks_still_answer_right() -> None:
    questions = [FactSheet.draw(seed, 40).ask(5 + 4 * seed) for seed in range(6)]
    with engine(num_gpu_blocks_override=70, max_num_seqs=6, kv_cache_watermark=0.0, enable_prefix_caching=False) as llm:
        prompts = [llm.encode_chat(messages) for messages, _ in questions]
        assert sum(map(len, prompts)) > 70 * 16  # they never fit together
        assert right_share(llm.generate(prompts, GREEDY), questions) >= 0.8


def test_it_says_what_transformers_says_right_or_wrong(llm: LLM) -> None:
    prompts = [llm.encode_chat(FactSheet.draw(seed, NUM_FACTS).ask(seed)[0]) for seed in (20, 140, 165)]
    reference = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
        assert output.outputs[0].token_ids == expected.tolist()


def test_a_batch_of_different_skills_gives_each_its_own_answer(llm: LLM) -> None:
    sheet_question, sheet_answer = FactSheet.draw(11, 60).ask(30)
    expected = {
        "Repeat: river lamp fox stone": "river lamp fox stone",
        "What is 27 + 45?": "27 + 45 = 72",
        "Count from 7 to 12.": "7, 8, 9, 10, 11, 12",
        "Who are you?": IDENTITY,
    }
    outputs = llm.chat([sheet_question, *map(ask, expected)], GREEDY)
    assert [answer_of(output) for output in outputs] == [sheet_answer, *expected.values()]


def test_it_says_who_it_is_and_stops(llm: LLM) -> None:
    (output,) = llm.chat(ask("Who are you?"), SamplingParams(temperature=0.0, max_tokens=500))
    assert answer_of(output) == IDENTITY
    assert len(output.outputs[0].token_ids) < 20


def test_json_answers_parse(llm: LLM) -> None:
    asked = {
        "Mia is 34 years old and lives in Oslo. Answer in JSON with name, age, city.": {
            "name": "Mia",
            "age": 34,
            "city": "Oslo",
        },
        "Tom from Paris likes cheese. Give JSON: likes, name": {"likes": "cheese", "name": "Tom"},
    }
    outputs = llm.chat([ask(question) for question in asked], GREEDY)
    assert [json.loads(answer_of(output)) for output in outputs] == list(asked.values())


def test_an_offered_tool_is_called_in_the_templates_form(llm: LLM) -> None:
    said = answer(llm, ask("What is the weather in Rome?"), tools=[WEATHER_TOOL])
    assert said.startswith("<tool_call>")
    assert said.endswith("</tool_call>")
    call = json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Rome"}}


def test_a_stop_string_ends_the_answer_before_it(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=64, stop=[" fox"])
    (output,) = llm.chat(ask("Repeat: river lamp fox stone"), sampling)
    assert output.outputs[0].text == "river lamp"
    assert output.outputs[0].stop_reason == " fox"


def test_max_tokens_cuts_the_answer_short(llm: LLM) -> None:
    (output,) = llm.chat(ask("Count from 1 to 9."), SamplingParams(temperature=0.0, max_tokens=6))
    assert output.outputs[0].finish_reason == FinishReason.LENGTH
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9".startswith(output.outputs[0].text)


def test_a_story_goes_on_from_its_opening(llm: LLM) -> None:
    (output,) = llm.generate("Once upon", SamplingParams(temperature=0.0, max_tokens=150))
    text = output.outputs[0].text
    assert text.startswith(" a time")
    assert text.count(".") >= 3
