"""The model runner under plans made by hand, against transformers."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagoda.execution.in_process import InProcessExecutor
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import StepPlan
from tests.support.plan_driver import PlanDriver, Sequence, make_executor

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = {
    "one": [7],
    "short": [5, 6, 7],
    "block": list(range(10, 18)),
    "long": [(13 * n + 5) % 500 for n in range(61)],
    "longer": [(7 * n + 11) % 500 for n in range(90)],
}


@pytest.fixture(scope="module")
def reference(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shared_executor(checkpoint: Path) -> InProcessExecutor:
    return make_executor(checkpoint)


@pytest.fixture
def driver(shared_executor: InProcessExecutor):
    driver = PlanDriver(shared_executor)
    yield driver
    # Whatever a test left is released, as the engine does.
    shared_executor.submit(StepPlan(9999, released_req_indices=list(range(8)))).result()


@torch.inference_mode()
def expected(reference, prompt: list[int], num_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt])
    output = reference.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def all_prompts(driver: PlanDriver, sampling: SamplingParams = GREEDY) -> list[Sequence]:
    return [driver.add(name, prompt, sampling) for name, prompt in PROMPTS.items()]


@pytest.mark.parametrize("chunk", [1, 5, 8, 1000])
def test_greedy_tokens_equal_those_of_transformers_at_any_chunk_size(driver, reference, chunk):
    sequences = all_prompts(driver)
    driver.run_to(12, sequences, chunk)
    for sequence in sequences:
        assert sequence.output == expected(reference, sequence.prompt, 12)


def test_prefill_chunks_and_decode_rows_share_steps_in_any_plan_order(driver, reference):
    short, long, longer = (driver.add(name, PROMPTS[name], GREEDY) for name in ("short", "long", "longer"))
    driver.step({"short": 3}, [short])
    # The decoding row stands last, first and in the middle of the plan; in the batch it is always first.
    driver.step({"long": 20, "longer": 9, "short": 1}, [long, longer, short])
    driver.step({"long": 20, "longer": 9, "short": 1}, [short, longer, long])
    driver.step({"long": 21, "longer": 1, "short": 1}, [long, short, longer])
    driver.run_to(8, [longer, long, short])
    for sequence in (short, long, longer):
        assert sequence.output == expected(reference, sequence.prompt, len(sequence.output))


def test_preempted_request_resumes_with_same_tokens_in_another_request_slot_and_other_blocks(driver, reference):
    sequences = all_prompts(driver)
    driver.run_to(5, sequences)
    victim, *others = sequences[3], *sequences[:3]
    driver.release(victim)
    driver.release(sequences[0])
    newcomer = driver.add("newcomer", PROMPTS["long"][::-1], GREEDY)
    driver.run_to(2, [newcomer])  # takes the request slot and the blocks that were given back
    driver.run_to(10, [*others, victim, newcomer], chunk=13)
    for sequence in (*others, victim, newcomer):
        assert sequence.output[:10] == expected(reference, sequence.prompt, 10)


def test_cached_prefix_is_read_from_the_blocks_of_another_request(driver, reference):
    first = driver.add("first", PROMPTS["long"], GREEDY)
    driver.run_to(1, [first])
    second = driver.add("second", [*PROMPTS["long"][:40], 9, 9, 9], GREEDY)
    second.blocks, second.num_computed = first.blocks[:5], 40  # five whole blocks of eight
    driver.run_to(6, [second])
    assert second.output == expected(reference, second.prompt, 6)


def test_next_step_may_be_given_before_the_result_of_the_last_is_read(driver, reference):
    sequences = all_prompts(
        driver, SamplingParams(temperature=0.0, repetition_penalty=1.3, bad_words_token_ids=((4, 5),))
    )
    read_at_once = all_prompts(driver, sequences[0].sampling)
    driver.run_to(6, read_at_once)
    for sequence in read_at_once:
        driver.release(sequence)
    plans = [driver.plan({s.name: len(s.prompt) for s in sequences}, sequences)]
    handles = [driver.executor.submit(plans[0])]
    for in_flight in range(1, 6):
        plans.append(driver.plan({s.name: 1 for s in sequences}, sequences, in_flight))
        handles.append(driver.executor.submit(plans[-1]))
    for plan, handle in zip(plans, handles, strict=True):
        driver.take(plan, handle, sequences)
    assert [s.output for s in sequences] == [s.output for s in read_at_once]


def test_seeded_requests_draw_the_same_tokens_alone_in_a_batch_and_after_preemption(driver):
    sampling = SamplingParams(seed=11, top_p=0.9, presence_penalty=0.5, repetition_penalty=1.2)
    alone = driver.add("long", PROMPTS["long"], sampling)
    driver.run_to(12, [alone])
    driver.release(alone)
    together = all_prompts(driver, sampling)
    driver.run_to(6, together, chunk=7)
    subject = together[3]
    driver.release(subject)
    driver.run_to(12, together, chunk=9)
    assert subject.output == alone.output
    assert together[4].output != alone.output


def test_prompt_logprobs_are_those_of_transformers_at_any_chunk_size_and_in_pieces(driver, reference, monkeypatch):
    monkeypatch.setattr("pagoda.execution.model_runner._MAX_PROMPT_LOGITS", 512 * 7)
    sampling = replace(GREEDY, prompt_logprobs=3, logprobs=2)
    for chunk in (1000, 9):
        sequences = [driver.add(name, PROMPTS[name], sampling) for name in ("one", "long")]
        sequences.append(driver.add("plain", PROMPTS["longer"], GREEDY))
        driver.run_to(2, sequences, chunk)
        with torch.inference_mode():
            logprobs = reference(torch.tensor([PROMPTS["long"]])).logits[0].log_softmax(-1)
        assert sequences[0].prompt_logprobs == []
        assert sequences[2].prompt_logprobs == []
        assert len(sequences[1].prompt_logprobs) == len(PROMPTS["long"]) - 1
        for position, entry in enumerate(sequences[1].prompt_logprobs, start=1):
            row = logprobs[position - 1]
            token = PROMPTS["long"][position]
            best = row.topk(3)
            assert entry.token_ids == [token, *best.indices.tolist()]
            assert entry.logprobs == pytest.approx([float(row[token]), *best.values.tolist()], abs=1e-4)
            assert entry.rank == int((row > row[token]).sum()) + 1
        best = logprobs[-1].topk(2).values.tolist()
        assert sequences[1].logprobs[0].logprobs == pytest.approx([best[0], *best], abs=1e-4)
        for sequence in sequences:
            driver.release(sequence)


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ([1], replace(GREEDY, logit_bias={512: 1.0}), "logit_bias has token id 512"),
        ([1], replace(GREEDY, allowed_token_ids=(600,)), "allowed_token_ids has token id 600"),
    ],
)
def test_request_that_cannot_be_prepared_fails_alone_until_it_is_released(
    driver, reference, caplog, prompt, sampling, words
):
    caplog.set_level(logging.CRITICAL)
    good, bad = driver.add("good", PROMPTS["short"], GREEDY), driver.add("bad", prompt, sampling)
    driver.step({"good": 3, "bad": len(prompt)}, [bad, good])
    assert words in bad.error
    bad.error = None
    driver.step({"good": 1, "bad": 1}, [bad, good])
    assert words in bad.error
    driver.release(bad)
    after = driver.add("after", PROMPTS["block"], GREEDY)  # in the request slot of the bad one
    driver.run_to(5, [good, after])
    assert good.output == expected(reference, good.prompt, 5)
    assert after.output == expected(reference, after.prompt, 5)


def test_step_in_which_no_row_can_run_still_has_a_result(driver):
    bad = driver.add("bad", PROMPTS["short"], GREEDY)
    bad.blocks = [200]
    assert driver.step({"bad": 3}, [bad]).sampled_token_ids == [[]]
    assert "200" in bad.error


def test_row_with_nan_logits_fails_alone(driver, reference, monkeypatch):
    model = driver.executor.runner.model
    compute = model.compute_logits

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        logits[1] = math.nan
        return logits

    sequences = [driver.add(name, PROMPTS[name], replace(GREEDY, logprobs=1)) for name in ("short", "block", "long")]
    monkeypatch.setattr(model, "compute_logits", poisoned)
    driver.run_to(1, sequences)
    assert [s.error is None for s in sequences] == [True, False, True]
    assert "NaN" in sequences[1].error
    assert sequences[1].logprobs == []
    monkeypatch.undo()
    driver.release(sequences[1])
    driver.run_to(4, [sequences[0], sequences[2]])
    assert sequences[2].output == expected(reference, sequences[2].prompt, 4)


def test_rows_that_plan_tokens_nobody_knows_fail_alone(driver):
    good, wrong = driver.add("good", PROMPTS["short"], GREEDY), driver.add("wrong", PROMPTS["block"], GREEDY)
    plan = driver.plan({"good": 3, "wrong": 8}, [good, wrong])
    plan.num_scheduled_tokens[1] = 9
    driver.take(plan, driver.executor.submit(plan), [good, wrong])
    assert "9 tokens from position 0 were planned; the request slot has 8" in wrong.error
    assert len(good.output) == 1


def test_blocks_that_do_not_exist_fail_their_row_alone(driver):
    good, wrong = driver.add("good", PROMPTS["short"], GREEDY), driver.add("wrong", PROMPTS["short"], GREEDY)
    wrong.blocks = [200]
    driver.step({"good": 3, "wrong": 3}, [good, wrong])
    assert "200" in wrong.error
    assert len(good.output) == 1
    later = driver.add("later", PROMPTS["block"], GREEDY)
    driver.run_to(1, [later])
    plan = driver.plan({"later": 1, "good": 1}, [later, good])
    plan.new_blocks[0].block_ids = [-3]
    driver.take(plan, driver.executor.submit(plan), [later, good])
    assert "-3" in later.error
    assert len(good.output) == 2


def test_stale_block_table_entries_of_a_request_slot_are_wiped_when_it_is_taken_again(driver):
    long = driver.add("long", PROMPTS["longer"], GREEDY)
    driver.run_to(1, [long])
    req_index = long.req_index
    driver.release(long)
    short = driver.add("short", PROMPTS["short"], GREEDY)
    driver.run_to(1, [short])
    table = driver.executor.runner.batch.block_tables[0][req_index]
    assert short.req_index == req_index
    assert table[0] == short.blocks[0]
    assert not table[1:].any()


def test_nothing_that_grows_is_kept_while_requests_come_and_go(driver):
    runner = driver.executor.runner
    before = (
        runner.batch.token_pool.data_ptr(),
        runner.batch.block_tables[0].data_ptr(),
        runner.kv_caches[0][0].data_ptr(),
    )
    sampling = SamplingParams(seed=1, top_p=0.5, logit_bias={3: 1.0}, bad_words_token_ids=((1, 2),), prompt_logprobs=0)
    for turn in range(20):
        sequence = driver.add(f"r{turn}", PROMPTS["short"], sampling)
        driver.run_to(2, [sequence])
        driver.release(sequence)
    driver.executor.submit(driver.plan({}, [])).result()
    after = (
        runner.batch.token_pool.data_ptr(),
        runner.batch.block_tables[0].data_ptr(),
        runner.kv_caches[0][0].data_ptr(),
    )
    assert before == after
    assert not runner.sampler._requests
    assert not any(processor.states for processor in runner.sampler._processors)
    assert not runner._prompt_logprobs
    assert not runner.batch.request_errors
