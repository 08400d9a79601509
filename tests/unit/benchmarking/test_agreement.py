"""The benchmark of agreement with float32, on a model so small that its figures say nothing but that they are computed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda_kernels import backend
from tests.support.cpu_kernels import require_cpu_kernels

require_cpu_kernels()

from benchmarks import agreement  # noqa: E402


def test_every_way_to_compute_is_compared_with_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_dummy_checkpoint(tmp_path / "model", DummySpec(dtype="bfloat16"))
    monkeypatch.setattr(agreement, "PROMPTS", "One.\nTwo words.\nAnd three of them.")
    monkeypatch.setattr(backend, "active", backend.active)  # put back afterwards
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["agreement", str(directory), "--tokens", "4", "--json", str(out)])
    agreement.main()
    found = json.loads(out.read_text())
    assert found["tokens"] == 12
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["Pagoda float32"]["agreement"] == 1.0
    assert rows["Pagoda float32"]["logprob_error"] < 1e-5
    assert len(rows) == 5
    rounded = [row["logprob_error"] for name, row in rows.items() if "float32" not in name]
    assert all(1e-5 < error < 1 for error in rounded)
    printed = capsys.readouterr().out
    assert "12 tokens of 3 answers" in printed
    assert "| Pagoda bfloat16, int4" in printed


def test_there_are_sixty_prompts() -> None:
    prompts = agreement.PROMPTS.splitlines()
    assert len(set(prompts)) == len(prompts) == 60
