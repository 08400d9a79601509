"""The batched sampler against one written row by row with a sort."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.sampling import selection
from pagoda.sampling.params import SamplingParams
from tests.support import naive_sampler
from tests.support.naive_sampler import Row, TooCloseError
from tests.support.sampler_rows import sample_rows

SEEDS = st.integers(0, 2**32 - 1)
ROWS_A_BATCH = 12


def random_params(random: np.random.Generator, vocab_size: int, everything: bool) -> SamplingParams:
    def ids(most: int, least: int = 0) -> tuple[int, ...]:
        return tuple(random.integers(0, vocab_size, random.integers(least, most + 1)).tolist())

    more = {}
    if everything:
        more = {
            "repetition_penalty": random.choice([1.0, 0.5, 1.3]).item(),
            "presence_penalty": random.choice([0.0, 1.0, -0.5]).item(),
            "frequency_penalty": random.choice([0.0, 0.75, -1.5]).item(),
            "logit_bias": {token: random.choice([-100.0, -1.0, 2.0]).item() for token in ids(3)} or None,
            "bad_words_token_ids": tuple(ids(3, least=1) for _ in range(random.integers(0, 4))),
            "allowed_token_ids": ids(30, least=1) if random.random() < 0.3 else None,
            "min_tokens": int(random.integers(0, 5)),
            "stop_token_ids": ids(2),
        }
    return SamplingParams(
        seed=int(random.integers(-(2**63), 2**63)),
        temperature=random.choice([0.0, 0.3, 1.0, 1.0, 2.5]).item(),
        top_k=random.choice([0, 0, -1, 1, 2, 7, 40, 100, vocab_size]).item(),
        top_p=random.choice([1.0, 0.05, 0.5, 0.9, 0.999]).item(),
        min_p=random.choice([0.0, 0.0, 0.01, 0.3, 1.0]).item(),
        **more,
    )


def random_batch(seed: int, everything: bool) -> list[Row]:
    """Rows of one vocabulary. Half of them have many equal logits: ties everywhere, also at the border of what is kept."""
    random = np.random.default_rng(seed)
    vocab_size = random.choice([1, 2, 5, 63, 64, 65, 130, 200]).item()
    rows = []
    for _ in range(ROWS_A_BATCH):
        if random.random() < 0.5:
            logits = random.integers(-6, 7, vocab_size) / 2
        else:
            logits = random.normal(0, random.choice([0.3, 3.0]), vocab_size)
        ids = min(vocab_size, 6)  # few, so that tokens repeat and bad words match
        rows.append(
            Row(
                logits=logits.astype(np.float32).tolist(),
                prompt=random.integers(0, ids, random.integers(1, 7)).tolist(),
                output=random.integers(0, ids, random.integers(0, 7)).tolist(),
                params=random_params(random, vocab_size, everything),
                eos_token_ids=tuple(random.integers(0, ids, random.integers(0, 2)).tolist()),
            )
        )
    return rows


def is_clear(row: Row) -> bool:
    """Whether no two processed logits are so near that rounding may order them either way."""
    values = sorted({value for value in naive_sampler.processed(row) if value > float("-inf")})
    return all(high - low > 1e-4 for low, high in itertools.pairwise(values))


def agree_with_naive_sampler(rows: list[Row]) -> None:
    sampled = sample_rows(rows)
    for row, token, best in zip(rows, sampled.token_ids.tolist(), sampled.best_logits.tolist(), strict=True):
        if max(naive_sampler.processed(row)) == float("-inf"):
            assert best == float("-inf")
        elif is_clear(row):
            try:
                expected = naive_sampler.sample(row)
            except TooCloseError:
                continue
            assert token == expected, row


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_temperature_min_p_top_k_and_top_p_choose_as_the_naive_sampler_does(seed):
    agree_with_naive_sampler(random_batch(seed, everything=False))


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_all_parameters_together_choose_as_the_naive_sampler_does(seed):
    agree_with_naive_sampler(random_batch(seed, everything=True))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_row_is_sampled_alike_alone_and_in_any_batch_order_and_request_slot(seed):
    rows = random_batch(seed, everything=True)
    random = np.random.default_rng(seed)
    alone = [sample_rows([row]).token_ids.tolist()[0] for row in rows]
    order = random.permutation(len(rows)).tolist()
    req_indices = random.choice(2 * len(rows), len(rows), replace=False).tolist()
    together = sample_rows([rows[index] for index in order], req_indices, max_num_seqs=2 * len(rows)).token_ids.tolist()
    assert together == [alone[index] for index in order]


LOGITS = st.one_of(st.integers(-6, 6).map(lambda n: n / 2), st.sampled_from([0.0, -0.0]), st.floats(-8, 8, width=32))


@settings(max_examples=80, deadline=None)
@given(st.lists(LOGITS, min_size=1, max_size=40), st.integers(1, 300), SEEDS, st.integers(1, 300))
def test_best_tokens_are_those_of_a_stable_sort(values, vocab_size, seed, count):
    logits = np.array(values, dtype=np.float32)[np.random.default_rng(seed).integers(0, len(values), vocab_size)]
    count = min(count, vocab_size)
    padded = selection.pad_to_blocks(torch.from_numpy(logits[None]))
    values_found, ids = selection.best_tokens(padded, selection.block_maxima(padded), torch.tensor([0]), count)
    expected = np.argsort(-logits, kind="stable")[:count]
    assert ids[0].tolist() == expected.tolist()
    assert values_found[0].tolist() == logits[expected].tolist()
