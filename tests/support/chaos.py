"""What the chaos tests share: questions with known answers, and the checks after each disturbance."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.load import DOORS, Ask, Books, Clients
from tests.support.observer import NOT_SERVING, SERVING, Observer
from tests.support.server import ServerProcess

STALL_SECONDS = 5.0
# On a busy machine the server, its engine and this test all wait for a core; the bounds proper are in docs/operations.md.
BUSY_SECONDS = 8.0

References = dict[tuple[bool, str, int], str]

# Some share a beginning, some are longer than a step, so that prompts are cached, chunked and preempted.
PROMPTS = (
    "Once upon a time",
    "Once upon a time there was a server that told the truth about its engine. " * 2,
    "Far away, behind the word mountains, " * 6,
    "7 8 9",
)
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "num_gpu_blocks_override": 120,  # fewer than eight of the longest need
    "max_num_waiting": 24,
    "engine_stall_timeout_seconds": STALL_SECONDS,
    "max_engine_restarts": 20,
}


def asks_of(doors: Sequence[str] = DOORS, lengths: Sequence[int] = (1, 12, 60)) -> list[Ask]:
    """Every prompt at every one of `doors`, with outputs of these lengths."""
    return [Ask(door, prompt, length) for door in doors for prompt in PROMPTS for length in lengths]


async def references_of(clients: Clients, asks: Sequence[Ask]) -> References:
    """The texts of an undisturbed run, one request at a time."""
    references: References = {}
    for ask in asks:
        if ask.text_key not in references:
            answer = await clients.run(ask)
            assert answer.end == "finished", answer
            references[ask.text_key] = answer.text
    return references


async def check_same_answers(clients: Clients, asks: Sequence[Ask], references: References) -> None:
    """A quiet server gives the texts that it gave before."""
    once = {ask.text_key: ask for ask in asks}
    books = Books([await clients.run(ask) for ask in once.values()])
    assert books.count() == {"finished": len(once)}, books.of("failed", "refused")
    books.check(references)


@asynccontextmanager
async def watched(server: ServerProcess) -> AsyncIterator[tuple[Clients, Observer]]:
    """Clients and an observer of a server that is ready."""
    async with Clients(server) as clients, Observer(server) as observer:
        yield clients, observer


@dataclass(frozen=True)
class Recovery:
    """Seconds from a disturbance until the probes said so, and until the server was ready again."""

    until_unready: float
    until_ready: float

    def __str__(self) -> str:
        return f"unready after {self.until_unready:.2f} s, ready again after {self.until_ready:.1f} s"


async def disturb_and_recover(
    observer: Observer, disturb: Callable[[], None], *, unready_within: float, state: str = "starting"
) -> Recovery:
    """Disturb the engine, see the probes flip within the bound and come back; live all the time."""
    num_seen, num_watched = len(observer.sights), len(observer.watched)
    disturb()
    begun = observer.sights[-1].time
    flipped = await observer.until_state(state)
    assert flipped.time - begun < unready_within + BUSY_SECONDS
    back = await observer.until_state("ready", seconds=150)
    seen = observer.sights[num_seen:]
    assert all(sight.is_live for sight in seen)
    assert all(sight.is_ready == (sight.state in ("ready", "degraded")) for sight in seen)
    # Twice, where a request that is replayed brings the next engine down, too.
    assert observer.watched[num_watched:] in ([NOT_SERVING, SERVING], [NOT_SERVING, SERVING] * 2)
    return Recovery(flipped.time - begun, back.time - begun)
