import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda.errors import InvalidRequestError
from pagoda.sampling.params import SamplingParams
from pagoda.sampling.sampler import row_error
from tests.support.naive_sampler import Row, ranked
from tests.support.sampler_rows import enter, make_sampler, request_of, run, sample_rows


def greedy(**changes) -> SamplingParams:
    return SamplingParams(temperature=0.0, **changes)


def token_of(logits: list[float], params: SamplingParams, prompt=(0,), output=(), eos=()) -> int:
    row = Row(list(logits), list(prompt), list(output), params, tuple(eos))
    return int(sample_rows([row]).token_ids[0])


# ---- each parameter alone, greedy, so that its effect is plain ---------------------------------------------------------


def test_greedy_takes_the_lowest_of_equally_good_ids():
    assert token_of([0.0, 3.0, 1.0, 3.0], greedy()) == 1


def test_top_k_of_one_is_greedy_at_any_temperature():
    assert token_of([0.0, 3.0, 1.0, 3.0], SamplingParams(top_k=1, temperature=50.0)) == 1


def test_a_top_k_that_no_vocabulary_reaches_is_none():
    rows = [Row([0.0] * 300, [0], [], SamplingParams(seed=5, top_k=top_k)) for top_k in (0, -1, 300, 2**70)]
    assert len(set(sample_rows(rows).token_ids.tolist())) == 1


def test_only_allowed_token_ids_are_chosen():
    assert token_of([5.0, 4.0, 3.0, 2.0], greedy(allowed_token_ids=(3, 2, 2))) == 2


def test_stop_tokens_are_forbidden_until_min_tokens_are_there_and_allowed_from_then_on():
    params = greedy(min_tokens=2, stop_token_ids=(1,))
    logits = [9.0, 8.0, 7.0]
    assert [token_of(logits, params, output=[2] * n, eos=(0,)) for n in range(4)] == [2, 2, 0, 0]


def test_an_end_token_outside_the_vocabulary_does_no_harm():
    assert token_of([1.0, 2.0], greedy(min_tokens=1), eos=(7,)) == 1


def test_logit_bias_is_added_to_its_tokens():
    assert token_of([5.0, 4.0, 3.0], greedy(logit_bias={0: -3.0, 2: 1.5})) == 2


@pytest.mark.parametrize(
    ("words", "tokens", "chosen"),
    [
        ([(0,)], [5], 1),  # one token: always forbidden
        ([(0,), (1,)], [5], 2),
        ([(5, 0)], [4, 5], 1),  # the word's beginning is there
        ([(5, 0)], [5, 4], 0),  # it was there, but is not any more
        ([(4, 5, 0)], [4, 5], 1),
        ([(4, 5, 0)], [5], 0),  # the sequence is shorter than the beginning
        ([(5, 5, 0)], [5], 0),
        ([(3, 4, 5, 0), (5, 1)], [4, 5], 0),
        ([(4, 5, 0), (5, 1), (2,)], [4, 5], 3),
    ],
)
def test_the_last_token_of_a_bad_word_is_forbidden_where_the_word_would_be_completed(words, tokens, chosen):
    params = greedy(bad_words_token_ids=tuple(words))
    logits = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    assert token_of(logits, params, prompt=tokens) == chosen
    assert token_of(logits, params, prompt=tokens[:1], output=tokens[1:]) == chosen


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output():
    assert token_of([2.0, 1.9, 1.5], greedy(repetition_penalty=1.2), prompt=[0], output=[1]) == 0
    assert token_of([2.0, 1.9, 1.7], greedy(repetition_penalty=1.2), prompt=[0, 0], output=[1, 1]) == 2
    assert token_of([-1.0, -1.1], greedy(repetition_penalty=1.2), prompt=[0]) == 1


def test_presence_penalty_counts_once_and_frequency_penalty_each_time_and_the_prompt_never():
    logits = [2.0, 1.0]
    assert token_of(logits, greedy(presence_penalty=1.5), prompt=[0, 0], output=[]) == 0
    assert token_of(logits, greedy(presence_penalty=0.9), prompt=[1], output=[0, 0, 0]) == 0
    assert token_of(logits, greedy(presence_penalty=1.1), prompt=[1], output=[0]) == 1
    assert token_of(logits, greedy(frequency_penalty=0.4), prompt=[1], output=[0, 0]) == 0
    assert token_of(logits, greedy(frequency_penalty=0.4), prompt=[1], output=[0, 1, 0, 0]) == 0
    assert token_of(logits, greedy(frequency_penalty=0.6), prompt=[1], output=[0, 1, 0, 0]) == 1


def test_penalties_of_many_long_rows_are_gathered_in_pieces(monkeypatch):
    monkeypatch.setattr("pagoda.sampling.penalties._MAX_GATHERED", 16)
    params = greedy(repetition_penalty=2.0, frequency_penalty=1.0)
    rows = [Row([4.0, 3.0, 1.0], [0] * (1 + n), [1] * n, params) for n in range(9)]
    alone = [int(sample_rows([row]).token_ids[0]) for row in rows]
    assert sample_rows(rows).token_ids.tolist() == alone
    assert set(alone) == {0, 1}


# ---- distributions ----------------------------------------------------------------------------------------------------

LOGITS = [math.log(n) for n in (1, 2, 3, 4, 5, 5, 8, 12)] * 10  # 80 tokens: more than one block of the inverse CDF


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 13},
        {"top_p": 0.8},
        {"top_p": 0.1},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.6, "min_p": 0.2},
        {"top_p": 0.6, "min_p": 0.2, "temperature": 0.8},
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_parameters_give(changes):
    num_req_indices, num_positions = 64, 60
    sampler, pool = make_sampler(len(LOGITS), num_req_indices)
    rows = [Row(LOGITS, [0], [], SamplingParams(seed=seed, **changes)) for seed in range(num_req_indices)]
    for req_index, row in enumerate(rows):
        enter(sampler, pool, req_index, row)
    counts = np.zeros(len(LOGITS))
    for position in range(1, num_positions + 1):
        logits = torch.tensor([LOGITS] * num_req_indices, dtype=torch.float32)
        sampled = sampler.sample(logits, np.arange(num_req_indices), np.full(num_req_indices, position))
        counts += np.bincount(sampled.token_ids.numpy(), minlength=len(LOGITS))

    expected = np.zeros(len(LOGITS))
    weights, held = ranked(rows[0]), 0.0
    total = sum(weight for _, weight in weights)
    for token, weight in weights:
        if held >= rows[0].params.top_p * total - 1e-9:
            break
        expected[token] = weight
        held += weight
    expected *= counts.sum() / expected.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    degrees = kept.sum() - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 1


def test_top_p_ends_after_few_draws_when_nearly_everything_must_be_rejected():
    logits = [10.0] + [0.0] * 3000  # the first token weighs 88 %, the nucleus is this one token
    row = Row(logits, [0], [], SamplingParams(seed=3, top_p=0.001))
    assert all(sample_rows([row]).token_ids.tolist() == [0] for _ in range(3))


def test_a_token_that_lost_all_its_probability_is_never_drawn():
    logits = [0.0] + [-1e9] * 200 + [0.0] + [float("-inf")] * 100
    rows = [Row(logits, [0], [], SamplingParams(seed=seed)) for seed in range(200)]
    assert set(sample_rows(rows).token_ids.tolist()) == {0, 201}


def test_requests_with_equal_seeds_agree_and_different_seeds_do_not():
    rows = [Row([0.0] * 500, [1], [], SamplingParams(seed=seed)) for seed in (1, 2, 1)]
    first, second, third = sample_rows(rows).token_ids.tolist()
    assert first == third != second


# ---- what an unused parameter costs ------------------------------------------------------------------------------------


class CountOperations(TorchDispatchMode):
    """Counts every tensor operation."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_unused_parameters_cost_no_tensor_operation():
    plain = Row([1.0, 2.0, 3.0] * 64, [0], [1], greedy())
    everything = greedy(
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={1: 1.0},
        bad_words_token_ids=((1,), (0, 1)),
        allowed_token_ids=(1, 2, 3),
        min_tokens=5,
        stop_token_ids=(1,),
    )
    sampler, pool = make_sampler(192, 4)
    enter(sampler, pool, 0, plain)
    run(sampler, [plain], [0])
    with CountOperations() as before:
        run(sampler, [plain], [0])
    # A request that uses them all is in another request slot, but has no row in this step.
    enter(sampler, pool, 1, Row(plain.logits, [0], [1], everything))
    run(sampler, [plain], [0])
    with CountOperations() as after:
        run(sampler, [plain], [0])
    assert after.names == before.names
    assert not any(name in str(before.names) for name in ("topk", "sort", "exp", "cumsum", "where"))
    assert len(before.names) < 25


def test_no_way_of_sampling_sorts_the_vocabulary():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))[0].tolist()
    rows = [
        Row(logits, [0], [1], SamplingParams(seed=1, logprobs=20, **changes))
        for changes in ({}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.5}, {"min_p": 0.1})
    ]
    sampler, pool = make_sampler(5000, len(rows))
    for req_index, row in enumerate(rows):
        enter(sampler, pool, req_index, row)

    class RefuseSorts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "sort" not in str(func)
            if "topk" in str(func):
                assert args[0].shape[-1] <= 64 * 50
            return func(*args, **(kwargs or {}))

    with RefuseSorts():
        run(sampler, rows, list(range(len(rows))))


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [greedy(), SamplingParams(seed=1), SamplingParams(top_k=2), SamplingParams(top_p=0.5)]
)
@pytest.mark.parametrize(
    ("bad", "words"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "no token is allowed")]
)
def test_a_row_without_usable_logits_is_told_apart_and_does_not_touch_the_others(params, bad, words):
    good = Row([0.0, 1.0, 5.0], [0], [], SamplingParams(seed=4))
    broken = Row([bad] * 3 if bad == -math.inf else [0.0, bad, 1.0], [0], [], params)
    alone = sample_rows([good]).token_ids.tolist()[0]
    sampled = sample_rows([good, broken, good])
    assert sampled.token_ids[[0, 2]].tolist() == [alone, alone]
    assert 0 <= int(sampled.token_ids[1]) < 64
    errors = [row_error(best) for best in sampled.best_logits.tolist()]
    assert errors[0] is None
    assert words in errors[1]
    assert errors[2] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {5: 1.0}},
        {"allowed_token_ids": (0, 5)},
        {"bad_words_token_ids": ((0,), (1, 5))},
        {"bad_words_token_ids": ((),)},
    ],
)
def test_ids_outside_the_vocabulary_are_refused_and_leave_the_request_slot_empty(changes):
    sampler, pool = make_sampler(5, 1)
    with pytest.raises(InvalidRequestError, match=r"between 0 and 4|1 to 256 tokens"):
        sampler.add(0, request_of(SamplingParams(repetition_penalty=1.5, **changes)))
    row = Row([0.0, 1.0, 0.9, 0.0, 0.0], [1], [], greedy())
    enter(sampler, pool, 0, row)
    assert run(sampler, [row], [0]).token_ids.tolist() == [1]


def test_a_request_slot_keeps_nothing_of_the_request_before():
    sampler, pool = make_sampler(3, 1)
    first = Row([0.0, 2.0, 1.9], [1], [], greedy(repetition_penalty=1.5, logit_bias={0: 9.0}, logprobs=1))
    second = Row([0.0, 2.0, 1.9], [1], [], greedy())
    enter(sampler, pool, 0, first)
    assert run(sampler, [first], [0]).token_ids.tolist() == [0]
    sampler.remove(0)
    enter(sampler, pool, 0, second)
    sampled = run(sampler, [second], [0])
    assert sampled.token_ids.tolist() == [1]
    assert sampled.logprobs is None


# ---- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution_with_the_sampled_token_first():
    logits = [1.0, 3.0, 2.0, 0.0]
    params = greedy(logprobs=2, logit_bias={3: 50.0}, repetition_penalty=1.7)
    sampled = sample_rows([Row(logits, [1], [], greedy()), Row(logits, [1], [], params)])
    assert sampled.logprob_rows.tolist() == [1]
    (entry,) = sampled.logprobs.to_lists(sampled.logprob_counts)
    reference = torch.tensor(logits).log_softmax(-1)
    assert entry.token_ids == [3, 1, 2]
    assert entry.logprobs == pytest.approx(reference[[3, 1, 2]].tolist(), abs=1e-6)
    assert entry.rank == 4


def test_each_row_gets_as_many_logprobs_as_it_asked_for():
    logits = [1.0, 3.0, 2.0, 0.0]
    rows = [Row(logits, [1], [], SamplingParams(seed=1, logprobs=count)) for count in (0, 3, 20)]
    sampled = sample_rows(rows)
    entries = sampled.logprobs.to_lists(sampled.logprob_counts)
    assert [len(entry.token_ids) for entry in entries] == [1, 4, 5]
    assert [len(entry.logprobs) for entry in entries] == [1, 4, 5]
    assert entries[2].token_ids[1:] == [1, 2, 0, 3]


@pytest.mark.parametrize("count", [1, 4])
def test_logprobs_of_certain_tokens_beside_those_of_the_best(count):
    logits = [1.0, 3.0, 2.0, 0.0, 2.5]
    asked = [(3, 0), (2, 4, 1), None]
    rows = [
        Row(logits, [1], [], greedy(logprob_token_ids=ids, logprobs=None if ids else count, logit_bias={3: 50.0}))
        for ids in asked
    ]
    sampled = sample_rows(rows)
    reference = torch.tensor(logits).log_softmax(-1)
    entries = sampled.logprobs.to_lists(sampled.logprob_counts)
    for entry, ids in zip(entries, (*asked[:2], (1, 4, 2, 0)[:count]), strict=True):
        assert entry.token_ids == [3, *ids]
        assert entry.logprobs == pytest.approx(reference[[3, *ids]].tolist(), abs=1e-6)


def test_certain_tokens_are_checked():
    for ids, words in (((), "1 to 512"), ((-1,), "at least 0"), (tuple(range(513)), "513 ids")):
        with pytest.raises(InvalidRequestError, match=words):
            SamplingParams(logprob_token_ids=ids)
    with pytest.raises(InvalidRequestError, match="not both"):
        SamplingParams(logprob_token_ids=(1,), logprobs=1)
