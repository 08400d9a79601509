"""Which cores compute threads are bound to; and that they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.platform.cpu_sets import format_cpu_sets, parse_cpu_sets
from pagoda.platform.hardware import cpu_report, first_logical_cores
from pagoda.platform.threads import CpuSets, affinities_of_replicas, choose_cpu_sets, choose_threads, in_nice_thread

HYPERTHREADS = {"allowed": frozenset(range(16)), "cores": tuple(range(8))}
PLAIN = {"allowed": frozenset(range(8)), "cores": tuple(range(8))}


def sets_of(
    asked: str = "auto",
    machine: dict[str, object] = HYPERTHREADS,
    num_ranks: int = 1,
    threads: int | None = None,
    quota: float | None = None,
) -> CpuSets | None:
    choice = choose_cpu_sets(asked, num_ranks=num_ranks, threads=threads, quota=quota, **machine)  # type: ignore[arg-type]
    assert choice.reason
    sets: CpuSets | None = choice.value
    return sets


@pytest.mark.parametrize("text", ["0", "0-3", "0-3,8", "0,2,4-6|7|9-10"])
def test_lists_are_written_as_they_are_read(text: str) -> None:
    assert format_cpu_sets(parse_cpu_sets(text)) == text


def test_one_logical_core_of_each_physical_one() -> None:
    assert sets_of() == (tuple(range(8)),)


def test_ranks_share_no_core() -> None:
    assert sets_of(num_ranks=2) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert sets_of(num_ranks=3, machine=PLAIN) == ((0, 1), (2, 3), (4, 5))


def test_nothing_is_bound_where_it_could_only_do_harm() -> None:
    assert sets_of("none") is None
    assert sets_of(machine=PLAIN) is None, "no core is left for the server"
    assert sets_of(machine=PLAIN, num_ranks=2) is None, "none is left for the engine core either"
    assert sets_of(quota=4.0) is None, "every container with a quota would take the same cores"
    assert sets_of(threads=4) is None, "the other cores may be another's"
    assert sets_of(num_ranks=9) is None, "more ranks than cores"


def test_a_quota_of_all_cores_is_none() -> None:
    assert sets_of(quota=8.0) == (tuple(range(8)),)


def test_given_lists_are_taken_as_they_are() -> None:
    assert sets_of("9-10|3", num_ranks=2, quota=1.0, threads=7) == ((9, 10), (3,))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("0-1|2-3|4", "3 lists for 2 ranks"),
        ("0-3", "1 lists for 2 ranks"),
        ("0-3|14-17", "may not use 16-17, only 0-15"),
        ("0-3|3-5", "3 is named more than once"),
    ],
)
def test_lists_that_cannot_be_say_why(asked: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sets_of(asked, num_ranks=2)


@pytest.mark.parametrize("value", ["", "all", "0-", "0;1", "0,|1", "-1"])
def test_other_forms_are_refused_by_the_schema(value: str) -> None:
    with pytest.raises(ConfigError, match="cpu_thread_affinity"):
        PagodaConfig(cpu_thread_affinity=value)


def test_a_list_gives_its_number_of_threads_unless_another_is_asked_for() -> None:
    cpu = cpu_report()
    assert choose_threads(None, cpu, 2, affinity="0-2|7", index=0).value == 3
    assert choose_threads(None, cpu, 2, affinity="0-2|7", index=1).value == 1
    assert choose_threads(5, cpu, 2, affinity="0-2|7").value == 5
    assert choose_threads(None, cpu, affinity="none").value == choose_threads(None, cpu).value


def test_replicas_get_the_lists_of_their_own_ranks() -> None:
    assert affinities_of_replicas("none", None, num_replicas=2, num_ranks=1) == ["none", "none"]
    cores = first_logical_cores()
    if len(cores) < 2:
        pytest.skip("needs two cores")
    lists = f"{cores[1]}|{cores[0]}"
    assert affinities_of_replicas(lists, None, num_replicas=2, num_ranks=1) == lists.split("|")


def test_first_logical_cores_of_hyperthreads(tmp_path: Path) -> None:
    for core in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
        topology.mkdir(parents=True)
        (topology / "core_cpus_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    assert first_logical_cores(tmp_path, frozenset(range(8))) == (0, 1, 2, 3)
    assert first_logical_cores(tmp_path, frozenset({2, 5, 6, 7})) == (2, 5, 7)


def test_compute_threads_run_on_the_cores_given_and_older_threads_anywhere() -> None:
    core = sorted(os.sched_getaffinity(0))[-1]
    script = f"""
import json, os, threading
import torch
from pagoda.platform.threads import bind_compute_threads
waiting = threading.Event()
older = threading.Thread(target=waiting.wait)
older.start()
torch.set_num_threads(2)
bind_compute_threads("{core}", None)
before = set(os.listdir("/proc/self/task"))
torch.rand(1 << 22).sum()
started = set(os.listdir("/proc/self/task")) - before
print(json.dumps([
    sorted(os.sched_getaffinity(older.native_id)),
    [sorted(os.sched_getaffinity(int(task))) for task in (threading.main_thread().native_id, *started)],
]))
waiting.set()
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    older, bound = json.loads(output)
    assert older == sorted(os.sched_getaffinity(0))
    assert len(bound) >= 2
    assert all(cores == [core] for cores in bound)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_work_in_a_nice_thread_leaves_the_calling_thread_its_priority_and_takes_over_its_threads() -> None:
    before = torch.get_num_threads(), os.sched_getaffinity(0)

    def work() -> int:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(before[1])})
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    try:
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert in_nice_thread(work, 19) == 19
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
        assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (1, {min(before[1])})
        with pytest.raises(ConfigError, match="as the test wants"):
            in_nice_thread(lambda: raise_(ConfigError("as the test wants")), 19)
    finally:
        torch.set_num_threads(before[0])
        os.sched_setaffinity(0, before[1])


def raise_(error: Exception) -> None:
    raise error
