"""The batched sampler against one written row by row with a sort."""

import itertools

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pagoda.sampling import selection
from pagoda.sampling.params import SamplingParams
from tests.support import naive_sampler
from tests.support.naive_sampler import Row, TooCloseError
from tests.support.sampler_rows import sample_rows

# Half of the logits are multiples of 1/2: ties everywhere, also at the border of top-k and top-p.
LOGITS = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.floats(-8, 8, width=32).map(lambda x: x + 0.0))


@st.composite
def sampling_params(draw, vocab_size: int, everything: bool) -> SamplingParams:
    ids = st.integers(0, vocab_size - 1)
    more = {}
    if everything:
        more = {
            "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 0.5, 1.3])),
            "presence_penalty": draw(st.sampled_from([0.0, 0.0, 1.0, -0.5])),
            "frequency_penalty": draw(st.sampled_from([0.0, 0.0, 0.75, -1.5])),
            "logit_bias": draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.0, 0.5, 2.0]), max_size=4)) or None,
            "bad_words_token_ids": tuple(
                tuple(word) for word in draw(st.lists(st.lists(ids, min_size=1, max_size=3), max_size=3))
            ),
            "allowed_token_ids": draw(st.none() | st.lists(ids, min_size=1, max_size=8, unique=True).map(tuple)),
            "min_tokens": draw(st.integers(0, 4)),
            "stop_token_ids": tuple(draw(st.lists(ids, max_size=2))),
        }
    return SamplingParams(
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5])),
        top_k=draw(st.sampled_from([0, -1, 1, 2, 3, 7, 40, 100, vocab_size])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0])),
        **more,
    )


@st.composite
def batches(draw, everything: bool) -> list[Row]:
    vocab_size = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 130, 200]))
    ids = st.integers(0, min(vocab_size, 6) - 1)
    pool = draw(st.lists(LOGITS, min_size=1, max_size=24))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        picks = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, len(pool), vocab_size)
        rows.append(
            Row(
                logits=[float(np.float32(pool[pick])) for pick in picks],
                prompt=draw(st.lists(ids, min_size=1, max_size=6)),
                output=draw(st.lists(ids, max_size=6)),
                params=draw(sampling_params(vocab_size, everything)),
                eos_token_ids=tuple(draw(st.lists(ids, max_size=1))),
            )
        )
    return rows


def expected_tokens(rows: list[Row]) -> list[int | None]:
    """What each row must become; None where no token is allowed."""
    tokens: list[int | None] = []
    for row in rows:
        assume(not abs(naive_margin(row)) < 1e-4)
        if max(naive_sampler.processed(row)) == float("-inf"):
            tokens.append(None)
            continue
        try:
            tokens.append(naive_sampler.sample(row))
        except TooCloseError:
            assume(False)
    return tokens


def naive_margin(row: Row) -> float:
    """How far the nearest pair of unequal processed logits is from equal: rounding may order them otherwise."""
    values = sorted({value for value in naive_sampler.processed(row) if value > float("-inf")})
    return min((high - low for low, high in itertools.pairwise(values)), default=1.0)


@settings(max_examples=80, deadline=None)
@given(batches(everything=False))
def test_temperature_min_p_top_k_and_top_p_choose_as_the_naive_sampler_does(rows):
    expected = expected_tokens(rows)
    assert sample_rows(rows).token_ids.tolist() == expected


@settings(max_examples=80, deadline=None)
@given(batches(everything=True))
def test_all_parameters_together_choose_as_the_naive_sampler_does(rows):
    expected = expected_tokens(rows)
    sampled = sample_rows(rows)
    for token, best, wanted in zip(sampled.token_ids.tolist(), sampled.best_logits.tolist(), expected, strict=True):
        if wanted is None:
            assert best == float("-inf")
        else:
            assert token == wanted


@settings(max_examples=60, deadline=None)
@given(batches(everything=True), st.randoms(use_true_random=False))
def test_a_row_is_sampled_alike_alone_and_in_any_batch_order_and_slot(rows, random):
    alone = [sample_rows([row]).token_ids.tolist()[0] for row in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    slots = random.sample(range(9), len(rows))
    together = sample_rows([rows[index] for index in order], slots, max_num_seqs=9).token_ids.tolist()
    assert together == [alone[index] for index in order]


@settings(max_examples=60, deadline=None)
@given(st.lists(LOGITS, min_size=1, max_size=300), st.data())
def test_best_tokens_are_those_of_a_stable_sort(logits, data):
    count = data.draw(st.integers(1, len(logits)))
    padded = selection.pad_to_blocks(torch.tensor([logits], dtype=torch.float32))
    values, ids = selection.best_tokens(padded, selection.block_maxima(padded), torch.tensor([0]), count)
    expected = sorted(range(len(logits)), key=lambda token: (-np.float32(logits[token]), token))[:count]
    assert ids[0].tolist() == expected
    assert values[0].tolist() == [float(np.float32(logits[token])) for token in expected]
