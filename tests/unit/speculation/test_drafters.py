"""What n-gram and suffix look-up propose."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pagoda.config.speculation import SpeculativeConfig
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.request import Request
from pagoda.speculation.history import History, IndexBudget
from pagoda.speculation.ngram import NgramDrafter
from pagoda.speculation.suffix import PastOutputs, SuffixDrafter


def request_of(prompt: list[int], output: list[int] | None = None, **fields) -> Request:
    spec = EngineRequest(request_id="r", prompt_token_ids=prompt, params=SamplingParams(), max_tokens=100, **fields)
    request = Request(spec)
    request.token_ids += output or []
    return request


def slow_matches(tokens: list[int], n: int, longest: int) -> list[tuple[int, int]]:
    """Where the end of `tokens` stood before, newest first, and with how many equal tokens."""
    found = []
    for follows in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(longest, follows) and tokens[follows - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= n:
            found.append((follows, length))
    return found


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 4), st.integers(0, 5), st.data())
def test_history_finds_all_places_however_it_grew(tokens: list[int], n: int, extra: int, data: st.DataObject) -> None:
    history = History(n)
    begin = 0
    while begin < len(tokens):
        end = data.draw(st.integers(begin + 1, len(tokens)))
        history.append(tokens[begin:end])
        assert history.index()
        begin = end
    matches = history.find(tokens, n + extra, 1000)
    assert [(match.follows, match.length) for match in matches] == slow_matches(tokens, n, n + extra)


def test_long_text_is_indexed_a_part_at_a_time() -> None:
    history = History(2)
    history.append([index % 1000 for index in range(20_000)])
    turns = 1
    while not history.index():
        turns += 1
    assert turns == 3
    assert history.find(history.tokens, 8, 3)[0].follows == 19_000


def test_ngram_takes_the_place_with_the_most_equal_tokens_and_the_newest_of_these() -> None:
    prompt = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 9, 2, 3, 4, 70, 1, 2, 3, 4]
    assert NgramDrafter(request_of(prompt), 2, 4).propose(2) == [50, 9]
    assert NgramDrafter(request_of(prompt), 2, 3).propose(2) == [70, 1]
    assert NgramDrafter(request_of([1, 2, 3]), 2, 3).propose(2) == []


def test_ngram_goes_on_with_a_repetition_behind_the_end() -> None:
    assert NgramDrafter(request_of([7, 1, 2, 3, 1, 2, 3]), 3, 8).propose(7) == [1, 2, 3, 1, 2, 3, 1]


def test_ngram_follows_the_output_as_it_grows() -> None:
    request = request_of([1, 2, 3, 4, 5, 6])
    drafter = NgramDrafter(request, 2, 4)
    assert drafter.propose(3) == []
    request.token_ids += [2, 3]
    assert drafter.propose(3) == [4, 5, 6]


def test_prediction_is_proposed_from_the_first_token_on_and_found_again_behind_a_change() -> None:
    prediction = list(range(20, 40))
    for drafter_of in (
        lambda request: NgramDrafter(request, 2, 4),
        lambda request: SuffixDrafter(request, suffix_config(), PastOutputs(10)),
    ):
        request = request_of([1, 2], prediction_token_ids=prediction)
        drafter = drafter_of(request)
        assert list(drafter.propose(4)) == [20, 21, 22, 23]
        request.token_ids += [20, 21]
        assert list(drafter.propose(2)) == [22, 23]
        request.token_ids += [99, 23, 24]
        assert list(drafter.propose(2)) == [25, 26]
        request.token_ids += prediction[5:]
        assert list(drafter.propose(2)) == [], "the prompt does not follow the prediction"


def suffix_config(**settings) -> SpeculativeConfig:
    return SpeculativeConfig.parse({"method": "suffix", **settings})


def test_suffix_takes_what_followed_most_often_while_enough_places_agree() -> None:
    text = [8, 9, 1, 2, 3, 8, 9, 1, 2, 4, 8, 9, 1, 5, 6, 8, 9, 7, 7, 7]
    settings = {"suffix_decoding_max_spec_factor": 9.0}
    likely = SuffixDrafter(
        request_of([*text, 8, 9]), suffix_config(suffix_decoding_min_token_prob=0.5, **settings), PastOutputs(0)
    )
    assert likely.propose(10) == [1, 2]
    short = SuffixDrafter(request_of([*text, 8, 9]), suffix_config(suffix_decoding_max_spec_factor=0.5), PastOutputs(0))
    assert short.propose(10) == [1]


def test_suffix_knows_earlier_outputs_of_the_same_tenant_and_cache_keys_only() -> None:
    past = PastOutputs(10)
    past.add(request_of([1], [30, 31, 32, 33, 34], tenant="a", cache_keys=("salt=x",)))

    def proposed(**fields) -> list[int]:
        return list(SuffixDrafter(request_of([5, 30, 31], **fields), suffix_config(), past).propose(9))

    assert proposed(tenant="a", cache_keys=("salt=x",)) == [32, 33]
    for other in ({"tenant": "a"}, {"tenant": "b", "cache_keys": ("salt=x",)}, {}):
        assert proposed(**other) == []


def test_past_outputs_are_bounded_and_the_newest_stay() -> None:
    past = PastOutputs(4)
    for number in range(20):
        past.add(request_of([1], [100 + number, 200 + number, 300 + number]))
    texts = past.of(request_of([1]))
    kept = {token for text in texts for token in text.tokens if 100 <= token < 200}
    assert 2 <= len(kept) <= 4
    assert {119, 118} <= kept
    big = PastOutputs(10**6)
    for number in range(200):
        big.add(request_of([1], [number] * 5000, tenant=str(number % 3)))
    assert sum(len(text.tokens) for tenant in "012" for text in big.of(request_of([1], tenant=tenant))) <= 1 << 19


def test_indexes_of_all_requests_together_have_a_bound_and_give_back_what_they_took() -> None:
    budget = IndexBudget(100)
    prompt = [1, 2, 3, 4, 5] * 12
    first, second = (NgramDrafter(request_of(prompt), 3, 8, budget) for _ in range(2))
    assert first.propose(4) == [1, 2, 3, 4]
    assert second.propose(4) == []  # 60 and 60 are more than 100
    first.close()
    assert second.propose(4) == [1, 2, 3, 4]
    second.close()
    assert budget.left == 100
