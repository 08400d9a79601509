"""What routing by prefix is worth to data parallel replicas: prompts that share beginnings, sent with and without it.

    python benchmarks/prefix_affinity.py [--replicas 2] [--groups 24] [--members 12] [--rounds 3] [--json FILE]

Three routers get the same requests in the same order: the one that is used (`affinity`), the same without its memory of
prefixes (`load`), and one that takes the replicas in turn. The KV cache of a replica holds about its share of the groups, so
a router that sends every group everywhere makes each replica throw away what the other has too. Each round has new prompts.
Reported are the share of prompt tokens that were found in a cache, the tokens that were computed, and requests a second; the
first two do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.engine.data_parallel.client import DataParallelClient
from pagoda.engine.data_parallel.router import Placement, PrefixRouter
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.platform.hardware import cpu_report, versions
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

BLOCK_SIZE = 16
PREFIX_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 512, 16, 16


class RoundRobin(PrefixRouter):
    """Every replica in turn."""

    def __init__(self, num_replicas: int, block_size: int) -> None:
        super().__init__(num_replicas, block_size)
        self._num_placed = 0

    def place(self, request: EngineRequest, candidates: Collection[int]) -> Placement:
        """See `PrefixRouter.place`."""
        self._num_placed += 1
        return super().place(request, [sorted(candidates)[self._num_placed % len(candidates)]])


ROUTERS: dict[str, Callable[[int], PrefixRouter]] = {
    "affinity": lambda num_replicas: PrefixRouter(num_replicas, BLOCK_SIZE),
    "load": lambda num_replicas: PrefixRouter(num_replicas, 0),
    "round robin": lambda num_replicas: RoundRobin(num_replicas, BLOCK_SIZE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--groups", type=int, default=24, help="different beginnings")
    parser.add_argument("--members", type=int, default=12, help="requests with the same beginning")
    parser.add_argument("--clients", type=int, default=8, help="requests under way at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-kernels", choices=("auto", "compiled", "reference"), default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        spec = DummySpec(num_layers=4, hidden_size=128, intermediate_size=256, max_position_embeddings=1024)
        checkpoint = write_dummy_checkpoint(Path(directory) / "tiny", spec)
        results = {
            name: asyncio.run(measure(checkpoint, make(options.replicas), options)) for name, make in ROUTERS.items()
        }
    for name, result in results.items():
        print(
            f"{name:12} hits {result['hit_rate']:.1%}  computed {result['computed']:>8}  {result['rate']:.1f} requests/s"
        )
    if options.json is not None:
        said = {name: value for name, value in vars(options).items() if name != "json"}
        facts = {"options": said, "versions": versions()}
        options.json.write_text(json.dumps({"cpu": cpu_report().name, **facts, "results": results}, indent=2) + "\n")


def requests_of(round_number: int, options: argparse.Namespace) -> list[EngineRequest]:
    """Every group's members, in random order."""
    rng = random.Random(round_number)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = []
    for group in range(options.groups):
        prefix = rng.choices(range(3, 500), k=PREFIX_TOKENS)
        for member in range(options.members):
            prompt = prefix + rng.choices(range(3, 500), k=OWN_TOKENS)
            name = f"{round_number}-{group}-{member}"
            requests.append(
                EngineRequest(request_id=name, prompt_token_ids=prompt, params=sampling, max_tokens=OUTPUT_TOKENS)
            )
    rng.shuffle(requests)
    return requests


async def measure(checkpoint: Path, router: PrefixRouter, options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds on replicas behind `router`."""
    blocks_of_a_group = PREFIX_TOKENS // BLOCK_SIZE
    config = PagodaConfig(
        model=str(checkpoint),
        device="cpu",
        dtype="float32",
        threads=1,
        cpu_kernels=options.cpu_kernels,
        block_size=BLOCK_SIZE,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        data_parallel_size=options.replicas,
        # A replica's share of the groups, and what runs beside them.
        num_gpu_blocks_override=1 + blocks_of_a_group * (options.groups // options.replicas + 4),
    )
    client = DataParallelClient(config, router)
    await client.start()
    places = asyncio.Semaphore(options.clients)

    async def one(request: EngineRequest) -> None:
        async with places:
            async for _ in client.submit(request):
                pass

    try:
        begun = time.monotonic()
        num_requests = 0
        for round_number in range(options.rounds):
            requests = requests_of(round_number, options)
            await asyncio.gather(*map(one, requests))
            num_requests += len(requests)
        seconds = time.monotonic() - begun
        stats = client.stats
        return {
            "hit_rate": stats.prefix_cache_hits / stats.prefix_cache_queries,
            "computed": stats.num_scheduled_tokens,
            "rate": num_requests / seconds,
            "by_replica": [replica.stats.num_scheduled_tokens for replica in client.replicas],
        }
    finally:
        await client.shutdown()


if __name__ == "__main__":
    main()
