"""The router's choices and books, whatever requests come and go and whichever replicas are lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagoda.engine.data_parallel.router import Placement, PrefixRouter
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

BLOCK_SIZE = 4
NUM_REPLICAS = 3
CAPACITY = 12
# Few tokens and few beginnings, so that prompts share prefixes often.
prompts = st.builds(
    lambda beginning, end: [beginning] * 9 + end,
    st.integers(0, 2),
    st.lists(st.integers(0, 2), min_size=1, max_size=14),
)
salts = st.sampled_from([None, "a", "b"])


def request(prompt: list[int], salt: str | None = None, max_tokens: int = 8) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_token_ids=prompt,
        params=SamplingParams(),
        max_tokens=max_tokens,
        cache_keys=() if salt is None else (salt,),
    )


def make_router(num_replicas: int = NUM_REPLICAS, capacity: int = CAPACITY) -> PrefixRouter:
    router = PrefixRouter(num_replicas, BLOCK_SIZE)
    for replica in range(num_replicas):
        router.set_capacity(replica, capacity, BLOCK_SIZE)
    return router


class Router(RuleBasedStateMachine):
    """Requests come, say something, end, and replicas lose their caches; the books must always add up."""

    @initialize()
    def begin(self) -> None:
        self.router = make_router()
        self.placed: list[Placement] = []

    @rule(prompt=prompts, salt=salts, max_tokens=st.integers(1, 200), candidates=st.sets(st.integers(0, 2), min_size=1))
    def place(self, prompt: list[int], salt: str | None, max_tokens: int, candidates: set[int]) -> None:
        before = {index: self.router.num_tokens_left(index) for index in range(NUM_REPLICAS)}
        placement = self.router.place(request(prompt, salt, max_tokens), candidates)
        assert placement.replica in candidates
        assert 0 <= placement.num_cached_tokens < len(prompt)
        assert placement.num_cached_tokens % BLOCK_SIZE == 0
        # Nobody who is less busy would be done with it sooner, even if they had to compute all of the prompt.
        chosen = before[placement.replica] + len(prompt) - placement.num_cached_tokens
        assert all(chosen <= before[index] + len(prompt) for index in candidates)
        self.placed.append(placement)

    @rule(data=st.data(), token_ids=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def say(self, data: st.DataObject, token_ids: list[int]) -> None:
        if self.placed:
            self.router.note_output(data.draw(st.sampled_from(self.placed)), token_ids)

    @rule(data=st.data(), has_failed=st.booleans())
    def end(self, data: st.DataObject, has_failed: bool) -> None:
        if self.placed:
            placement = self.placed.pop(data.draw(st.integers(0, len(self.placed) - 1)))
            self.router.remove(placement, has_failed=has_failed)

    @rule(replica=st.integers(0, NUM_REPLICAS - 1))
    def lose(self, replica: int) -> None:
        self.router.set_capacity(replica, CAPACITY, BLOCK_SIZE)
        assert self.router.num_remembered(replica) == 0

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "router"):
            return
        for index in range(NUM_REPLICAS):
            placed = [placement for placement in self.placed if placement.replica == index]
            assert self.router.num_requests(index) == len(placed)
            assert self.router.num_tokens_left(index) == sum(placement.num_tokens_left for placement in placed)
            assert self.router.num_remembered(index) <= CAPACITY
            assert all(placement.num_tokens_left >= 1 for placement in placed)


TestRouter = Router.TestCase
TestRouter.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(prompt=prompts, others=st.lists(prompts, max_size=3), end=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_an_idle_engine_sends_a_prompt_to_where_its_beginning_is(
    prompt: list[int], others: list[list[int]], end: list[int]
) -> None:
    router = make_router(capacity=100)
    for other in others:
        router.remove(router.place(request(other), range(NUM_REPLICAS)))
    first = router.place(request(prompt), range(NUM_REPLICAS))
    router.remove(first)
    again = router.place(request(prompt + end), range(NUM_REPLICAS))
    # Somebody may have it as long as the first has, but nobody has it longer.
    assert again.num_cached_tokens >= len(prompt) // BLOCK_SIZE * BLOCK_SIZE or again.replica == first.replica
    assert again.num_cached_tokens > 0


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_prompts_that_share_nothing_go_to_whoever_has_least_to_do(lengths: list[int]) -> None:
    router = make_router()
    for number, length in enumerate(lengths):
        left = [router.num_tokens_left(index) for index in range(NUM_REPLICAS)]
        placement = router.place(request([1000 + number] * length), range(NUM_REPLICAS))
        assert left[placement.replica] == min(left)


@settings(max_examples=60, deadline=None)
@given(prompt=prompts, salts=st.tuples(salts, salts))
def test_a_salt_hides_prefixes_from_other_salts(prompt: list[int], salts: tuple[str | None, str | None]) -> None:
    router = make_router(num_replicas=1)
    mine, yours = salts
    router.remove(router.place(request(prompt, mine), [0]))
    found = router.place(request(prompt, yours), [0]).num_cached_tokens
    assert (found > 0) == (mine == yours)


def test_a_shared_prefix_keeps_requests_together_until_waiting_costs_more_than_computing_it() -> None:
    router = make_router(num_replicas=2, capacity=1000)
    prefix = list(range(400))
    first = router.place(request([*prefix, 1]), [0, 1])
    router.note_output(first, [7])
    homes = []
    for number in range(40):
        placement = router.place(request([*prefix, 500 + number], max_tokens=64), [0, 1])
        router.note_output(placement, [7])
        homes.append(placement.replica)
    # Some fit beside the first; then the other replica is worth its prefill, and both are used evenly from there on.
    assert homes[:3] == [first.replica] * 3
    assert abs(homes.count(0) - homes.count(1)) <= 8


def test_the_output_of_a_finished_request_is_found_by_its_next_turn() -> None:
    router = make_router(num_replicas=1, capacity=100)
    placement = router.place(request([1] * 8), [0])
    router.note_output(placement, [2] * 9)
    router.remove(placement)
    assert router.place(request([1] * 8 + [2] * 9 + [3]), [0]).num_cached_tokens == 16


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_whole() -> None:
    router = make_router(num_replicas=1)
    asked = EngineRequest(
        request_id="r", prompt_token_ids=[1] * 9, params=SamplingParams(prompt_logprobs=1), max_tokens=1
    )
    for _ in range(2):
        assert router.place(asked, [0]).num_cached_tokens == 0


def test_without_prefix_caching_only_load_counts() -> None:
    router = PrefixRouter(2, 0)
    router.set_capacity(0, 10, BLOCK_SIZE)
    router.set_capacity(1, 10, BLOCK_SIZE)
    assert [router.place(request([1] * 9), [0, 1]).replica for _ in range(4)] == [0, 1, 0, 1]


def test_blocks_are_as_large_as_those_of_the_replica() -> None:
    router = PrefixRouter(1, BLOCK_SIZE)
    router.set_capacity(0, 10, 6 * BLOCK_SIZE)
    router.remove(router.place(request([1] * 8 * BLOCK_SIZE), [0]), has_failed=False)
    assert router.place(request([1] * 8 * BLOCK_SIZE), [0]).num_cached_tokens == 6 * BLOCK_SIZE
