"""Tuning tables: found by the GPU, written as they are read, and decided by measurements that are scripted here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.triton_kernels import require_interpreter

require_interpreter()

from benchmarks.gpu import tune, tune_space  # noqa: E402
from benchmarks.gpu.tune_space import Entry  # noqa: E402
from pagoda_kernels.gpu import tuning  # noqa: E402

TABLES = sorted(path.stem for path in tuning.TABLES.glob("*.json"))
ENTRY = Entry("decode", 128, 2)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_written_as_it_was_read(name: str) -> None:
    table = tuning.load_table(name)
    assert tuning.written(table) == (tuning.TABLES / f"{name}.json").read_text()


def test_a_table_of_a_gpus_own_comes_before_one_that_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.table_name((8, 6)) == "sm_89"
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    (tmp_path / "sm_86.json").write_text("{}")
    assert tuning.table_name((8, 6)) == "sm_86"
    assert tuning.own_table_name((10, 3)) == "sm_103"


def test_a_table_is_in_use_inside_its_context_only() -> None:
    table, device = tuning.load_table("sm_90"), torch.device("cpu")
    with tuning.table_in_use(table):
        assert tuning.table_of_device(device) is table
    assert tuning.table_of_device(device).name == "default"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
def test_every_entry_has_candidates_that_begin_with_the_present_one(capability: tuple[int, int]) -> None:
    table = tuning.load_table(tuning.table_name(capability))
    entries = list(tune_space.entries(capability))
    assert entries[:2] == [ENTRY, Entry("prefill", 128, 2)], "the most valuable first"
    assert any(entry.element_bytes == 1 for entry in entries) == (capability >= (8, 9))
    for entry in entries:
        present = entry.present(table)
        candidates = tune_space.tile_candidates(entry, present, capability, 99 << 10)
        assert candidates[0] == present
        assert len(set(candidates)) == len(candidates)
        assert 3 <= len(candidates) <= 40, entry
        if capability < (8, 0):
            assert {candidate.num_stages for candidate in candidates[1:]} == {1}


def test_an_entry_is_put_in_the_place_of_the_one_before_or_beside_the_others() -> None:
    table = tuning.load_table("sm_80")
    tiles = ENTRY.present(tuning.load_table("sm_90"))
    assert ENTRY.present(ENTRY.put(table, tiles)) == tiles
    assert len(ENTRY.put(table, tiles).decode_attention) == len(table.decode_attention)
    new = Entry("decode", 128, 1)
    assert new.present(table).element_bytes == 1
    assert len(new.put(table, new.present(table)).decode_attention) == len(table.decode_attention) + 1


def test_rules_cut_a_row_by_nothing_but_its_length() -> None:
    """Of everything that a rule may be changed in, `programs` alone changes no sum, and it may follow the batch."""
    present = tuning.load_table("sm_90").segments
    rules = tune_space.rule_candidates(present)
    assert rules[0] == present
    assert all(set(asdict(rule)) == {"tokens", "max_segments", "programs"} for rule in rules)
    assert all(rule.max_segments & (rule.max_segments - 1) == 0 for rule in rules)


class Scripted(tune.Search):
    """A search in which a candidate takes as long as a function of its tiles says."""

    def __init__(self, seconds: Callable[[dict[str, Any]], float], *, wrong: int | None = None) -> None:
        context: Any = SimpleNamespace(
            choose=lambda full, tiny: full,
            device=torch.device("cpu"),
            dry_run=False,
            entries=[],
            seconds_left=lambda: 99.0,
        )
        super().__init__(context, "decode", ENTRY, tune.Limits((9, 0), 227 << 10, 1 << 40))
        self.script, self.wrong, self.timings = seconds, wrong, 0

    def _batches(self, shape: tune_space.Shape) -> list[Any]:
        return []

    def _seconds(self, choice: tune.Candidate, batches: list[Any]) -> float:
        self.timings += 1
        return self.script(choice.change)

    def _is_right(self, choice: tune.Candidate) -> bool:
        return choice.change["tile"] != self.wrong

    def outcome(self) -> tuple[int, float]:
        """The tile of the winner, and the gain."""
        table = tuning.load_table("sm_90")
        present = ENTRY.present(table)
        tiles = tune_space.tile_candidates(ENTRY, present, (9, 0), 227 << 10)
        winner, gain = self.best([tune.Candidate(ENTRY.put(table, one), asdict(one)) for one in tiles])
        assert ENTRY.present(winner.table).tile == winner.change["tile"]
        return winner.change["tile"], gain


def by_tile(seconds: dict[int, float]) -> Callable[[dict[str, Any]], float]:
    return lambda change: seconds[change["tile"]]


def test_the_quickest_wins_after_far_fewer_timings_than_there_are() -> None:
    search = Scripted(by_tile({32: 3.0, 64: 2.0, 128: 1.0}))
    assert search.outcome() == (128, pytest.approx(2.0))
    assert search.timings < 0.5 * len(search.seconds) * len(search.shapes)


def test_what_is_wrong_does_not_win() -> None:
    assert Scripted(by_tile({32: 3.0, 64: 2.0, 128: 1.0}), wrong=128).outcome() == (64, 1.0)


@pytest.mark.parametrize("others", [2.0, 1.995, math.inf])
def test_without_a_gain_worth_the_name_the_present_one_stays(others: float) -> None:
    assert Scripted(by_tile({32: others, 64: 2.0, 128: others})).outcome() == (64, 1.0)


def test_an_entry_for_which_time_runs_out_keeps_its_values(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    context: Any = SimpleNamespace(
        choose=lambda full, tiny: full, device=torch.device("cpu"), dry_run=False, entries=[], out=tmp_path,
        seconds_left=lambda: 1.0, keep=kept.append,
    )  # fmt: skip
    table = tuning.load_table("sm_90")
    tuner = tune.Tuner(context, table, tune.Limits((9, 0), 227 << 10, 1 << 40))
    tuner.tune(Entry("prefill", 128, 2))
    assert tuner.table is table
    assert kept[0]["decision"].startswith("no time")
    assert not tuner.path.exists()
