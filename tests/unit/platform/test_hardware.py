"""What a process may use: affinity, hyperthreads and container limits, read from a made-up file system."""

from pathlib import Path

from pagoda.platform.cgroup import cpu_quota, memory_left, memory_limit
from pagoda.platform.hardware import cpu_report, memory_report, versions

GIB = 2**30


def machine(root: Path, files: dict[str, str]) -> Path:
    """A file system with four hyperthreads on two physical cores, 8 GiB of memory, and `files`."""
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    topology = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{s}\n" for n, s in siblings.items()}
    basics = {
        "proc/meminfo": f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {6 * GIB // 1024} kB\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor: 1\nflags:\n",
    }
    for name, content in (basics | topology | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_hyperthreads_count_once_and_affinity_is_respected(tmp_path: Path) -> None:
    root = machine(tmp_path, {})
    report = cpu_report(root, frozenset({0, 1, 2, 3}))
    assert (report.logical_cores, report.physical_cores, report.usable_cores) == (4, 2, 2)
    assert cpu_report(root, frozenset({0, 2})).usable_cores == 1
    assert (report.name, report.instruction_sets) == ("Fast CPU", ("avx2", "avx512_bf16"))


def test_cores_count_themselves_where_the_kernel_tells_no_topology(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert cpu_report(tmp_path, frozenset({0, 1, 2})).physical_cores == 3


def test_version_2_limits_of_the_group_and_those_above_it(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods/pod1\n",
            "sys/fs/cgroup/kubepods/cpu.max": "max 100000\n",
            "sys/fs/cgroup/kubepods/pod1/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/kubepods/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/kubepods/memory.current": f"{1 * GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/memory.max": "max\n",
        },
    )
    assert cpu_quota(root) == 1.5
    assert cpu_report(root, frozenset({0, 1, 2, 3})).usable_cores == 1
    assert (memory_limit(root), memory_left(root)) == (4 * GIB, 3 * GIB)


def test_version_2_inside_a_container_that_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{1 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        },
    )
    assert cpu_quota(root) == 4
    assert cpu_report(root, frozenset({0, 1, 2, 3})).usable_cores == 2  # no more than there are physical cores
    report = memory_report(root)
    assert (report.total, report.limit, report.available) == (8 * GIB, 2 * GIB, 3 * GIB // 2)


def test_version_1_limits(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{1 * GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert cpu_quota(root) == 2.5
    assert (memory_limit(root), memory_left(root)) == (3 * GIB, 2 * GIB)


def test_version_1_where_the_path_is_the_hosts_and_only_the_own_group_is_mounted(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/kubepods/pod1/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{4 * GIB}\n",
        },
    )
    assert (memory_limit(root), memory_left(root)) == (3 * GIB, 0)


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, {})
    assert (cpu_quota(root), memory_limit(root)) == (None, None)
    assert memory_report(root).available == 6 * GIB


def test_the_report_of_this_machine_makes_sense() -> None:
    cpu, memory = cpu_report(), memory_report()
    assert 1 <= cpu.usable_cores <= cpu.physical_cores <= cpu.logical_cores
    assert 0 < memory.available <= memory.total


def test_versions_name_what_is_missing() -> None:
    found = versions()
    assert found["pagoda"] is not None
    assert found["python"] is not None
    assert "ray" in found
