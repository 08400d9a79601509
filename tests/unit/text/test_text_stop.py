from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.errors import InvalidRequestError
from pagoda.text.stop import MAX_STOP_CHARACTERS, StopStringMatcher

FEW_LETTERS = st.text(alphabet="aab塔", max_size=40)
STOPS = st.lists(st.text(alphabet="aab塔", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first end of a stop string, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def cut(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(borders)]


@given(text=FEW_LETTERS, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 100)))
def test_finds_what_a_search_through_the_whole_text_finds_however_it_is_cut(text, stops, include, cuts):
    matcher = StopStringMatcher(stops, include_in_output=include)
    given_out = ""
    for piece in cut(text, cuts):
        given_out += matcher.feed(piece)
        if matcher.matched is not None:
            break
    else:
        given_out += matcher.finish()
    assert (given_out, matcher.matched) == naive(text, stops, include)


@given(text=FEW_LETTERS, stops=STOPS)
def test_nothing_is_given_out_that_a_stop_string_could_still_cut_and_nothing_else_is_held_back(text, stops):
    matcher = StopStringMatcher(stops)
    given_out = ""
    for position, character in enumerate(text, start=1):
        given_out += matcher.feed(character)
        if matcher.matched is not None:
            return
        seen = text[:position]
        held = max((length for stop in stops for length in range(len(stop)) if seen.endswith(stop[:length])), default=0)
        assert given_out == seen[: len(seen) - held]


def test_stop_string_completed_too_early_is_let_through_and_a_later_one_stops():
    matcher = StopStringMatcher(["END"])
    text = matcher.feed("one END two", may_stop=False) + matcher.feed(" EN", may_stop=False)
    assert matcher.matched is None
    text += matcher.feed("D three")
    assert (text, matcher.matched) == ("one END two ", "END")


def test_without_stop_strings_text_passes_at_once():
    matcher = StopStringMatcher([])
    assert matcher.feed("anything") == "anything"
    assert matcher.finish() == ""


def test_a_long_output_costs_the_same_for_every_character():
    # Text that keeps almost matching is the worst case for a search that starts over.
    matcher = StopStringMatcher(["a" * 500 + "b", "a" * 400 + "c"])
    started = time.process_time()
    for _ in range(50_000):
        matcher.feed("aaaa")
    assert time.process_time() - started < 3.0


def test_too_much_to_look_for_is_refused():
    with pytest.raises(InvalidRequestError, match="stop strings"):
        StopStringMatcher(["x" * MAX_STOP_CHARACTERS, "y"])
