"""The comparison of prefix_affinity.py without a model: real routers, schedulers and KV caches, and a clock that is counted.

    python benchmarks/prefix_affinity_simulation.py

A step of n tokens takes 1 + n / 64 units of time; each replica has its own clock. Any machine gives the same figures.
"""

from __future__ import annotations

import argparse
import random

from prefix_affinity import BLOCK_SIZE, PREFIX_TOKENS, ROUTERS, requests_of

from pagoda.engine.data_parallel.router import Placement, PrefixRouter
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepResult
from pagoda.scheduling.request import Request
from pagoda.scheduling.scheduler import Scheduler

GROUPS, MEMBERS, ROUNDS = 24, 12, 3
SITUATIONS = {
    "each cache holds half of the groups, 8 clients": {"clients": 8, "cached_groups": GROUPS // 2 + 4},
    "each cache holds half of the groups, 32 clients": {"clients": 32, "cached_groups": GROUPS // 2 + 4},
    "each cache holds all groups, 8 clients": {"clients": 8, "cached_groups": GROUPS + 4},
}


def main() -> None:
    for situation, values in SITUATIONS.items():
        print(situation)
        for name, make in ROUTERS.items():
            print(f"  {name:12} {simulate(make(2), **values)}")


def simulate(router: PrefixRouter, *, clients: int, cached_groups: int) -> str:
    """Run all rounds on two replicas; hit rate, tokens computed and requests in a hundred units of time."""
    num_blocks = 1 + cached_groups * PREFIX_TOKENS // BLOCK_SIZE
    limits = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=1024, max_num_waiting=1000)
    cores = [Scheduler(limits, KVCacheManager(num_blocks, BLOCK_SIZE)) for _ in range(2)]
    for replica in range(2):
        router.set_capacity(replica, num_blocks - 1)
    clocks = [0.0, 0.0]
    num_tokens = num_ended = 0
    rng = random.Random(0)
    for round_number in range(ROUNDS):
        pending = requests_of(round_number, argparse.Namespace(groups=GROUPS, members=MEMBERS))[::-1]
        placed: dict[str, Placement] = {}
        while pending or placed:
            while pending and len(placed) < clients:
                request = pending.pop()
                placement = placed[request.request_id] = router.place(request, [0, 1])
                cores[placement.replica].add(Request(request))
            turn = min((index for index in range(2) if cores[index].has_work), key=lambda index: clocks[index])
            if not cores[1 - turn].has_work:
                clocks[1 - turn] = max(clocks)
            plan = cores[turn].schedule()
            assert plan is not None
            num_tokens += plan.total_tokens
            clocks[turn] += 1 + plan.total_tokens / 64
            sampled = [[rng.randrange(3, 500)] if samples else [] for samples in plan.samples]
            for update in cores[turn].apply(plan, StepResult(plan.step_id, sampled)):
                router.note_output(placed[update.request.spec.request_id], update.new_token_ids)
                if update.request.is_finished:
                    router.remove(placed.pop(update.request.spec.request_id), is_finished=True)
                    num_ended += 1
    queries = sum(core.kv.num_prefix_queries for core in cores)
    hits = sum(core.kv.num_prefix_hits for core in cores)
    return f"hits {hits / queries:.1%}, computed {num_tokens} tokens, {100 * num_ended / max(clocks):.1f} requests"


if __name__ == "__main__":
    main()
