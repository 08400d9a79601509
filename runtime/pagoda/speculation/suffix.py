"""Suffix decoding (Oliaro et al., 2024): what followed the longest suffix most often, in this request and in earlier outputs.

    the longest suffix stood in four places, followed by    a b c │ a b d │ a b c │ x y        drafts: a  b  c
    probability: the share of places that agree so far                                                 ¾  ¾  ½

How many drafts there are follows from how much is known: from the length of the suffix, and from how much the places agree.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from pagoda.config.speculation import SpeculativeConfig
from pagoda.scheduling.request import Request
from pagoda.speculation.history import BREAK, History, IndexBudget, Match

_SHORTEST = 2  # tokens that must be equal
_MOST_PLACES = 16  # in each text
_MOST_TOKENS = 1 << 18  # of the outputs kept for all tenants together: some 50 MB
_LONGEST_OUTPUT = 1 << 13  # tokens kept of one output, its last ones

TenantKey = tuple[str, ...]


class PastOutputs:
    """Outputs of ended requests by tenant and cache keys: only what shares cached prefixes shares drafts.

    A tenant's outputs are in two texts. When the newer one has half of what may be kept, it becomes the older one, which is
    forgotten: so every operation is cheap, and what is kept is the newest. Tenants that were not seen for longest go first.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._texts: OrderedDict[TenantKey, deque[History]] = OrderedDict()
        self._num_outputs: Counter[TenantKey] = Counter()  # in the newer text

    def add(self, request: Request) -> None:
        """Keep the output of a request that has ended."""
        output = request.token_ids[request.num_prompt_tokens :][-_LONGEST_OUTPUT:]
        if not output or not self._max_requests:
            return
        key = key_of(request)
        texts = self._texts.setdefault(key, deque([History(_SHORTEST)], maxlen=2))
        self._texts.move_to_end(key)
        half_of_requests, half_of_tokens = -(-self._max_requests // 2), _MOST_TOKENS // 2
        if self._num_outputs[key] >= half_of_requests or len(texts[-1].tokens) >= half_of_tokens:
            texts.append(History(_SHORTEST))
            self._num_outputs[key] = 0
        texts[-1].append([*output, BREAK])
        texts[-1].index()
        self._num_outputs[key] += 1
        self._forget_oldest()

    def of(self, request: Request) -> Sequence[History]:
        """The texts that the request may draft from."""
        return self._texts.get(key_of(request), ())

    def _forget_oldest(self) -> None:
        total = sum(len(text.tokens) for texts in self._texts.values() for text in texts)
        while total > _MOST_TOKENS and len(self._texts) > 1:
            key, texts = self._texts.popitem(last=False)
            del self._num_outputs[key]
            total -= sum(len(text.tokens) for text in texts)


def key_of(request: Request) -> TenantKey:
    """Requests with equal keys may know of each other's outputs."""
    return (request.spec.tenant, *request.spec.prefix_keys)


class SuffixDrafter:
    """A request's own text and the past outputs of its tenant."""

    def __init__(
        self, request: Request, config: SpeculativeConfig, past: PastOutputs, budget: IndexBudget | None = None
    ) -> None:
        self._request = request
        self._config = config
        self._past = past
        self._own = History(_SHORTEST, budget)
        self._prediction = request.spec.prediction_token_ids
        self._own.append([*self._prediction, BREAK] if self._prediction else [])
        self._num_taken = 0  # of the request's tokens

    def close(self) -> None:
        self._own.release()

    def propose(self, limit: int) -> Sequence[int]:
        """Up to `limit` tokens that may come next."""
        request, own = self._request, self._own
        if request.num_tokens > self._num_taken:
            own.append(request.token_ids[self._num_taken :])
            self._num_taken = request.num_tokens
        if not own.index():
            return []
        if self._prediction and request.num_output_tokens == 0:
            return self._prediction[:limit]
        depth = self._config.suffix_decoding_max_tree_depth
        matches = [
            match for text in (own, *self._past.of(request)) for match in text.find(own.tokens, depth, _MOST_PLACES)
        ]
        if not matches:
            return []
        longest = max(match.length for match in matches)
        limit = min(limit, int(longest * self._config.suffix_decoding_max_spec_factor))
        return self._most_frequent([match for match in matches if match.length == longest], limit)

    def _most_frequent(self, places: list[Match], limit: int) -> list[int]:
        """The tokens that followed most of the places, each chosen among those that agree with all before it."""
        drafts: list[int] = []
        num_places = len(places)
        while len(drafts) < limit:
            following = [_token_after(place, drafts) for place in places]
            counts = Counter(token for token in following if token != BREAK)
            if not counts:
                break
            token, count = counts.most_common(1)[0]  # of equals the first, which is of the newest place
            if count < self._config.suffix_decoding_min_token_prob * num_places:
                break
            drafts.append(token)
            places = [place for place, found in zip(places, following, strict=True) if found == token]
        return drafts


def _token_after(place: Match, drafts: list[int]) -> int:
    """What stood behind a place that has agreed with `drafts`; behind the end of the text these go on."""
    index = place.follows + len(drafts)
    if index < len(place.tokens):
        return place.tokens[index]
    return drafts[index - len(place.tokens)]
