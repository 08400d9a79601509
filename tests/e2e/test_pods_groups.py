"""Two groups of mode `multiNode` as pods: changed settings reach one group after the other, and no request is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pods.cluster import Cluster
from tests.e2e.pods.image import pagoda_image, why_not
from tests.e2e.pods.release import Release, steady_load
from tests.e2e.test_pods_multi_node import SECRET, VALUES
from tests.support.load import Ask

pytestmark = [
    pytest.mark.pods,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(1200),
]

TWO_GROUPS: dict[str, Any] = VALUES | {"replicas": 2}
DOORS = ("generate", "generate_stream", "grpc")


async def test_an_upgrade_takes_one_group_after_the_other_and_loses_no_request(tmp_path: Path) -> None:
    async with Cluster(tmp_path, pagoda_image(tmp_path)) as cluster:
        await cluster.apply([SECRET])
        release = Release(cluster, TWO_GROUPS)
        await release.install()
        await cluster.wait_until_rolled_out(500)
        async with release.clients() as clients:
            expected = {
                ask: (await clients.run(ask)).text
                for ask in (Ask(door, f"Once upon a time, {door}", 16) for door in DOORS)
            }
        async with steady_load(release, expected, pause_seconds=0.5) as ledger:
            await release.install(engine=VALUES["engine"] | {"max_num_seqs": 8})
            await cluster.wait(lambda: len(cluster.happened("Deleted")) == 2, "both heads were replaced", 500)
            await cluster.wait_until_rolled_out(500)
            await asyncio.sleep(2)
        print(ledger.summary, *ledger.retried, sep="\n")
        assert ledger.lost == []
        assert all(ledger.finished[door] > 3 for door in DOORS), ledger.finished
        replaced = [event.pod for event in cluster.happened("Deleted")]
        assert replaced == ["story-pagoda-head-1", "story-pagoda-head-0"]
        assert [pod.restarts("pagoda") for name, pod in cluster.pods.items() if "worker" in name] == [0, 0]
