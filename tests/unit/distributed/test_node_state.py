"""What a worker node's probes say, out of what `pagoda join` and the ranks there publish."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pagoda.cli.main import main
from pagoda.distributed import node_state
from pagoda.distributed.node_state import (
    JOINED,
    READY,
    evaluate_probe,
    node_file,
    prepare_directory,
    published,
    rank_file,
)


def ask(probe: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["probe", probe, "--rank", "--state-directory", str(directory)])
    return status, capsys.readouterr().out.strip()


@pytest.mark.parametrize("probe", ["startup", "ready", "live"])
def test_without_a_node_no_probe_passes(probe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(probe, tmp_path / "none", capsys) == (1, f"{probe}: no: no `pagoda join` runs on this node")


def test_a_node_that_waits_for_its_head_is_alive_and_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node_file(tmp_path, 10.0).enter("waiting", "head:6379: nobody listens")
    assert ask("startup", tmp_path, capsys) == (1, "startup: no: node waiting, head:6379: nobody listens")
    assert ask("ready", tmp_path, capsys)[0] == 1
    assert ask("live", tmp_path, capsys) == (0, "live: yes: node waiting, head:6379: nobody listens")


def test_a_node_without_a_rank_is_started_and_not_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node_file(tmp_path, 10.0).enter(JOINED, "head:6379")
    assert ask("startup", tmp_path, capsys) == (0, "startup: yes: node joined, head:6379")
    assert ask("ready", tmp_path, capsys) == (1, "ready: no: node joined, head:6379; no rank runs here")


def test_ready_follows_every_rank_of_the_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node_file(tmp_path, 10.0).enter(JOINED, "head:6379")
    first, second = rank_file(tmp_path, 2, 10.0), rank_file(tmp_path, 3, 10.0)
    first.enter(READY)
    second.enter("weights")
    assert ask("ready", tmp_path, capsys) == (1, "ready: no: node joined, head:6379; rank 2 ready; rank 3 weights")
    second.enter(READY)
    assert ask("ready", tmp_path, capsys)[0] == 0
    node_file(tmp_path, 10.0).enter("left", "head:6379")
    assert ask("ready", tmp_path, capsys)[0] == 1


def test_a_rank_that_is_there_and_silent_fails_every_probe(tmp_path: Path) -> None:
    node_file(tmp_path, 10.0).enter(JOINED)
    rank_file(tmp_path, 0, 10.0).enter(READY)
    node, (rank,) = published(tmp_path)
    silent = replace(rank, heartbeat=rank.heartbeat - 20.0)
    for probe in ("startup", "ready", "live"):
        passed, words = evaluate_probe(probe, node, [silent])
        assert not passed
        assert words.startswith("rank 0 ready: no heartbeat for 20.")


def test_the_file_of_a_process_that_is_gone_counts_for_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pagoda.distributed.node_state import rank_file;"
        "rank_file(Path(sys.argv[1]), 0, 10.0).enter('ready')"
    )
    node_file(tmp_path, 10.0).enter(JOINED)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert (tmp_path / "rank-0.json").exists()
    assert published(tmp_path)[1] == []


def test_another_process_under_the_same_id_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_file(tmp_path, 0, 10.0).enter(READY)
    monkeypatch.setattr(node_state, "process_start", lambda pid: 1 if pid == os.getpid() else None)
    assert published(tmp_path)[1] == []


def test_threads_of_a_process_share_its_file(tmp_path: Path) -> None:
    state = rank_file(tmp_path, 0, 10.0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: state.enter(f"stage {number}"), range(400)))
    assert published(tmp_path)[1][0].phase.startswith("stage ")


def test_a_file_that_cannot_be_written_does_not_stop_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rank_file(tmp_path / "missing", 0, 10.0).enter(READY)
    assert "the state of rank 0 could not be published" in caplog.text


def test_a_new_life_of_the_node_clears_what_the_last_one_left(tmp_path: Path) -> None:
    rank_file(tmp_path, 5, 10.0).enter(READY)
    (tmp_path / "half.json").write_text("{")
    prepare_directory(tmp_path)
    assert published(tmp_path) == (None, [])


def test_probing_ranks_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from pagoda.cli.main import main; main(['probe', 'live', '--rank']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'psutil', 'ray', 'msgspec', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_a_state_directory_without_ranks_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "live", "--state-directory", "/tmp"]) == 2
    assert "--state-directory needs --rank" in capsys.readouterr().err
