"""What one request was like, in times of one monotonic clock, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request from the moment at which it was due.

    `scheduled`: when it was to be sent: the planned arrival in an open loop, else when its turn had come. `sent`: when it
    was. Latencies count from `scheduled`, so that a client which is late does not hide what its users wait for.
    `event_times`: when each piece of the answer came; `output_tokens` may be more than there are pieces. `error`: the kind
    of failure, None for a request that succeeded; `detail` says more. `cached_tokens`: of the prompt, found in the server's
    prefix cache; None where the server does not say.
    """

    conversation: int
    turn: int
    scheduled: float
    sent: float = 0.0
    ended: float = 0.0
    event_times: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    error: str | None = None
    detail: str = ""

    @property
    def lateness(self) -> float:
        """How long after its time the request was sent."""
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float:
        """Time to first token: until the first piece of the answer."""
        return (self.event_times[0] if self.event_times else self.ended) - self.scheduled

    @property
    def e2el(self) -> float:
        """End-to-end latency."""
        return self.ended - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for an answer of one token, or one that came in one piece."""
        if self.output_tokens < 2 or len(self.event_times) < 2:
            return None
        return (self.ended - self.event_times[0]) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the gaps between pieces."""
        return [later - earlier for earlier, later in pairwise(self.event_times)]
