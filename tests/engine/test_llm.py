from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagoda import LLM, SamplingParams
from pagoda.errors import CheckpointError, ConfigError, InvalidRequestError, RequestFailedError
from pagoda.models.dummy import DummySpec
from pagoda.sampling.output import FinishReason
from tests.support.checkpoints import shared_checkpoint

SMALL = {"device": "cpu", "kv_cache_memory_bytes": "4MiB", "dtype": "float32", "threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["Once upon a time", "The first thing", "a", "Où est la gare? 塔 🙂"]


@pytest.fixture(scope="module")
def checkpoint() -> str:
    return str(shared_checkpoint(DummySpec(family="llama", generation_config={"temperature": 0.5, "top_k": 7})))


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(checkpoint, max_num_waiting=8, max_model_len=160, **SMALL) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_is_left_in_the_engine(llm):
    yield
    while llm._core.has_work:
        llm._core.step()
    stats = llm._core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_in_use) == (0, 0, 0)
    assert llm._sequences == {}


def test_completions_come_in_the_order_of_the_prompts_and_equal_transformers(llm, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        ids = llm.tokenizer.encode(output.prompt)
        expected: list[int] = []
        with torch.inference_mode():
            for _ in range(12):
                logits = model(torch.tensor([ids + expected])).logits
                expected.append(int(logits[0, -1].argmax()))
        assert output.prompt_token_ids == ids
        (completion,) = output.outputs
        assert completion.token_ids == expected
        assert completion.text == llm.tokenizer.decode(ids + expected)[len(llm.tokenizer.decode(ids)) :]
        assert completion.finish_reason is FinishReason.LENGTH


def test_streaming_gives_what_not_streaming_gives(llm):
    for prompt in PROMPTS:
        chunks = list(llm.stream(prompt, GREEDY))
        (expected,) = llm.generate(prompt, GREEDY)[0].outputs
        assert "".join(chunk.text for chunk in chunks) == expected.text
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == expected.token_ids
        assert len(chunks) > 5
        assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_more_prompts_than_the_queue_holds_are_all_served(llm):
    outputs = llm.generate(["a b c"] * 60, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert len(outputs) == 60


def test_ids_choices_and_parameters_of_their_own(llm):
    ids = llm.tokenizer.encode("Once upon")
    one, two = llm.generate(
        [ids, "The sky"], [SamplingParams(n=3, seed=5, max_tokens=4), SamplingParams(temperature=0, max_tokens=2)]
    )
    assert one.prompt is None
    assert one.prompt_token_ids == ids
    assert [completion.index for completion in one.outputs] == [0, 1, 2]
    assert len({completion.text for completion in one.outputs}) > 1
    again = llm.generate(ids, SamplingParams(n=3, seed=5, max_tokens=4))[0]
    assert [completion.token_ids for completion in again.outputs] == [c.token_ids for c in one.outputs]
    assert len(two.outputs[0].token_ids) <= 2


def test_stop_string_ends_a_completion_and_frees_its_place(llm):
    (whole,) = llm.generate("Once upon a time", GREEDY)[0].outputs
    stop = whole.text[len(whole.text) // 2 :][:2]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,))
    (cut,) = llm.generate("Once upon a time", sampling)[0].outputs
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == (FinishReason.STOP, stop)


def test_logprobs_of_prompt_and_completion(llm):
    (output,) = llm.generate("Once upon a time", SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, seed=1))
    (completion,) = output.outputs
    assert len(completion.logprobs) == len(completion.token_ids)
    assert [p.chosen.token_id for p in completion.logprobs] == completion.token_ids
    assert all(len(position.top) == 2 for position in completion.logprobs)
    assert output.prompt_logprobs[0] is None
    assert [p.chosen.token_id for p in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_without_parameters_the_checkpoints_recommendation_holds(llm):
    assert llm.default_sampling_params() == SamplingParams(temperature=0.5, top_k=7)
    assert llm.default_sampling_params(top_k=0).temperature == 0.5


def test_without_max_tokens_a_completion_ends_at_the_models_limit(llm):
    prompt = llm.tokenizer.encode("Once")
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, ignore_eos=True))
    assert len(prompt) + len(output.outputs[0].token_ids) == llm.max_model_len
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_chat_answers_conversations(llm):
    chats = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Who are you?"}]]
    outputs = llm.chat(chats, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == [llm.encode_chat(chat) for chat in chats]
    assert llm.chat(chats[0], GREEDY)[0].outputs == outputs[0].outputs


def test_a_bad_prompt_among_good_ones_is_refused_before_anything_runs(llm):
    before = llm._core.stats().num_scheduled_tokens
    for bad in ([], [10**6], "x " * 5000):
        with pytest.raises(InvalidRequestError):
            llm.generate(["good", bad], GREEDY)
    with pytest.raises(InvalidRequestError, match="2 prompts and 1"):
        llm.generate(["a", "b"], [GREEDY])
    assert llm._core.stats().num_scheduled_tokens == before


def test_a_sequence_that_fails_leaves_the_others_alone(llm, monkeypatch):
    expected = llm.generate("a", GREEDY)[0].outputs
    original = type(llm.tokenizer).token

    def token(self, token_id):
        if token_id == 77:
            raise ValueError("a broken vocabulary")
        return original(self, token_id)

    monkeypatch.setattr(type(llm.tokenizer), "token", token)
    only_77 = SamplingParams(max_tokens=5, allowed_token_ids=(77,))
    good, bad, also_good = llm.generate(["a", "b", "a"], [GREEDY, only_77, GREEDY])
    assert bad.outputs[0].finish_reason is FinishReason.ERROR
    assert "a broken vocabulary" in bad.outputs[0].error
    assert good.outputs == also_good.outputs == expected
    with pytest.raises(RequestFailedError, match="a broken vocabulary"):
        list(llm.stream("b", only_77))


def test_two_streams_may_be_read_in_turns(llm):
    expected = [llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in PROMPTS[:2]]
    first, second = (llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2])
    texts = ["", ""]
    for one, two in zip(first, second, strict=True):
        texts[0] += one.text
        texts[1] += two.text
    assert texts == expected


def test_leaving_a_stream_aborts_it(llm):
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm._sequences == {}


def test_interrupt_waits_for_the_end_of_the_step_and_leaves_a_good_engine(llm):
    def interrupt_soon() -> None:
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    expected = llm.generate(PROMPTS, GREEDY)
    timer = threading.Thread(target=interrupt_soon)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS * 100, SamplingParams(max_tokens=100, ignore_eos=True))
    timer.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [o.outputs for o in llm.generate(PROMPTS, GREEDY)] == [o.outputs for o in expected]


def test_progress_is_shown_on_standard_error_alone(llm, capsys):
    llm.generate(["a", "b"], GREEDY, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "tokens/s" in captured.err


def test_wrong_settings_and_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(ConfigError, match="max_model_length"):
        LLM(max_model_length=5)
    with pytest.raises(ConfigError, match="no such directory"):
        LLM(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match=r"config.json"):
        LLM(str(tmp_path))


def test_runs_where_only_torch_and_its_company_are_installed(checkpoint):
    program = f"""
import sys
for name in ("pydantic", "msgspec", "kserve", "grpc", "fastapi", "uvicorn", "zmq", "prometheus_client"):
    sys.modules[name] = None  # importing it raises ImportError
from pagoda import LLM, SamplingParams
with LLM({checkpoint!r}, device="cpu", kv_cache_memory_bytes="4MiB", threads=1) as llm:
    print(len(llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert printed.stdout.strip() == "3", printed.stderr
