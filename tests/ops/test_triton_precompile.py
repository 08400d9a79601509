"""Kernels compiled before they are launched: a launch must want exactly what was compiled, or it was for nothing.

Without a GPU the launches stop where Triton would load the machine code: what a launch wants is known by then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pagoda.execution import precompile
from pagoda.parallel.layout import ParallelLayout

pytest.importorskip("triton", reason="Triton is not installed")

# Of each program: `OUT` is the file for what it found. Triton compiles here, for a GPU that is not there.
PREAMBLE = """
import json, sys
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from pagoda_kernels.gpu.precompile import KernelPrecompiler, NoDevice, recorded_launches
OUT = Path(sys.argv[1])
driver.set_active(NoDevice(GPUTarget("cuda", 90, 32)))
"""


def outcome_of(tmp_path: Path, program: str, *arguments: str) -> Any:
    output = tmp_path / "outcome.json"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", PREAMBLE + program, str(output), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


COMPILED_AND_FOUND = """
from pagoda_kernels.gpu.operators import BACKEND as kernels

def launches(device):
    x = torch.empty(3, 256, dtype=torch.bfloat16, device=device)
    kernels.rms_norm(x, x[0], 1e-6, x)
    kernels.rms_norm(x.view(3, 2, 128)[:, :1], x[0, :128], 1e-6, None)
    kernels.rms_norm(x, x[0], 1e-6, x)
    kernels.silu_and_mul(x)
    kernels.greedy_sample(torch.empty(3, 1000, device=device))

with recorded_launches() as wanted:
    launches("meta")
with KernelPrecompiler(wanted, processes=2) as compiling:
    results = compiling.wait()
with recorded_launches() as again:
    launches("cpu")
with KernelPrecompiler(again, processes=2) as compiling:
    left = compiling.num_kernels

import triton
hits = []
triton.knobs.compilation.listener = lambda **compilation: hits.append(compilation["cache_hit"])
for one in again:
    __import__("pagoda_kernels.gpu.precompile").gpu.precompile.compile_one(one)
OUT.write_text(json.dumps({
    "names": sorted(one.name for one in wanted),
    "cached_before": [one.is_cached for one in wanted],
    "errors": [one.error for one in results.values()],
    "resources": [(one.registers, one.shared_bytes) for one in results.values()],
    "same": [one.data for one in wanted] == [one.data for one in again],
    "cached_after": [one.is_cached for one in again],
    "left": left,
    "hits": hits,
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_was_compiled_ahead_is_what_a_launch_finds(tmp_path: Path) -> None:
    found = outcome_of(tmp_path, COMPILED_AND_FOUND)
    assert found["names"] == ["gated_activation_kernel", "greedy_kernel", "rms_norm_kernel", "rms_norm_kernel"]
    assert found["errors"] == [""] * 4
    assert all(registers > 0 for registers, _ in found["resources"])
    assert found["same"], "tensors on a device are specialized otherwise than those on meta"
    assert (found["cached_before"], found["cached_after"]) == ([False] * 4, [True] * 4)
    assert found["left"] == 0, "what the cache has is compiled again"
    assert found["hits"] == [True] * 4, "Triton itself does not find what `is_cached` promises"


FAILURES = """
from dataclasses import replace
from pagoda_kernels.gpu.operators import BACKEND as kernels

with recorded_launches() as wanted:
    kernels.silu_and_mul(torch.empty(3, 256, dtype=torch.bfloat16, device="meta"))
bad = replace(wanted[0], data=wanted[0].data.replace('"gelu', '"').replace("pagoda_kernels", "elsewhere"))
with KernelPrecompiler([bad], processes=4) as compiling:
    refused = list(compiling.wait().values())
with KernelPrecompiler([replace(wanted[0], module="no_such_module")], processes=4) as compiling:
    ended = list(compiling.wait().values())
with KernelPrecompiler(wanted, processes=1) as compiling:
    child = compiling.children[0]
OUT.write_text(json.dumps({"refused": refused[0].error, "ended": ended[0].error, "killed": child.returncode}))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_kernel_that_does_not_compile_is_reported_and_compilers_end_with_their_context(tmp_path: Path) -> None:
    found = outcome_of(tmp_path, FAILURES)
    assert "RuntimeError" in found["refused"]
    assert "no_such_module" in found["ended"]
    assert found["killed"] == -9


def test_compilers_import_no_torch(tmp_path: Path) -> None:
    program = "import sys\nOUT.write_text(json.dumps('torch' in sys.modules))"
    output = tmp_path / "outcome.json"
    code = (
        "import json, sys; from pathlib import Path; import pagoda_kernels.gpu.precompile\n"
        "import pagoda_kernels.gpu.attention_kernels, pagoda_kernels.gpu.sampling_kernels\n"
        "import pagoda_kernels.gpu.elementwise_kernels\n"
        f"OUT = Path({str(output)!r})\n{program}"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert json.loads(output.read_text()) is False, "a compiler would spend its first seconds importing torch"


PRUNED = """
from dataclasses import asdict, replace
from types import SimpleNamespace
from benchmarks.gpu.tune import Candidate, Limits, Search
from benchmarks.gpu.tune_space import Entry
from pagoda_kernels import backend
from pagoda_kernels.gpu.tuning import load_table

backend.use_backend("triton")
context = SimpleNamespace(
    choose=lambda full, tiny: full, device=torch.device("cuda"), entries=[], children=[], dry_run=False,
    seconds_left=lambda: 99.0,
)
table, entry = load_table("sm_90"), Entry("decode", 64, 2)
present = entry.present(table)
tiles = [replace(present, tile=128, num_stages=7), present, replace(present, tile=16, num_warps=1)]
choices = [Candidate(entry.put(table, one), asdict(one)) for one in tiles]
search = Search(context, "decode", entry, Limits((9, 0), 80 << 10, 1 << 40))
left = search._compiled(choices, [1, 2], search.shapes[:1])
OUT.write_text(json.dumps({"left": left, "entries": context.entries, "processes": len(context.children)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_tuner_compiles_in_parallel_and_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    found = outcome_of(tmp_path, PRUNED)
    assert found["left"] == [1, 2], "the first takes more shared memory than a program may have"
    assert [entry["tile"] for entry in found["entries"]] == [128]
    assert found["entries"][0]["left_out"]["shared_bytes"] > 80 << 10
    assert found["entries"][0]["left_out"]["registers"] > 0
    assert found["processes"] >= 1


WANTED_BY_A_MODEL = """
import dataclasses
from pagoda.execution.precompile import ModelBuild, wanted_kernels
from pagoda.models.config import ModelConfig
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.build import build_model
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups, PipelineParallelGroup, TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels import backend
from pagoda_kernels.gpu.tuning import load_table
from pagoda_kernels.types import AttentionMetadata, LoraLimits, StepTensors
from pagoda.sampling.selection import pad_to_blocks

kernels = backend.use_backend("triton")
# As on the GPU that is not here.
import pagoda_kernels.gpu.tuning as tuning
tuning._table_of_gpu = lambda index: load_table("sm_90")
FAMILY = json.loads(sys.argv[2])
folder = OUT.parent / "model"
write_dummy_checkpoint(folder, DummySpec(**FAMILY), weights=False)
config = ModelConfig.from_directory(folder)
build = ModelBuild(
    config=config, groups=SINGLE_RANK, quantization=None, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, block_size=16,
    device=torch.device("cuda", 0),
)
wanted = wanted_kernels(build)
limits = LoraLimits(num_slots=2, max_rank=16, max_num_tokens=64, dtype=torch.bfloat16, device=torch.device("cuda", 0))
of_adapters = {one.name for one in wanted_kernels(dataclasses.replace(build, lora=limits))} - {one.name for one in wanted}

# A mixed step and then a decode step of three rows, of tensors that have memory, as the runner makes them.
model = build_model(config, torch.bfloat16, "cpu")
share = model.shard
shape = (9, share.kv_heads.size, 16, config.head_dim)
caches = [(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)) for _ in share.layers]
def step(query_lens):
    # What is cut from one copy, or from one allocation of three, begins anywhere.
    count = len(query_lens)
    req_indices, computed = torch.zeros(2 * count + 1, dtype=torch.int64).split([count, count + 1])
    kernels.gather_step(
        torch.zeros(5, 9, dtype=torch.int64), torch.zeros(5, 41, dtype=torch.int32), 16, req_indices,
        torch.zeros(count + 1, dtype=torch.int32), computed, max(query_lens),
        StepTensors.allocate(sum(query_lens), count, 38, torch.device("cpu")),
    )
    tokens = sum(query_lens)
    ints = dict(dtype=torch.int32)
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, *query_lens], **ints).cumsum(0).int(),
        seq_lens=torch.tensor([600] * len(query_lens), **ints),
        block_table=torch.zeros(len(query_lens), 41, **ints),
        slot_mapping=torch.zeros(3 * tokens, dtype=torch.int64)[1 : tokens + 1],
        max_query_len=max(query_lens),
        max_seq_len=600,
        num_decode_rows=query_lens.count(1),
        num_short_rows=sum(1 < length < 20 for length in query_lens),
    )
    ids = torch.zeros(tokens, dtype=torch.int64)
    hidden = model.forward(ids, ids, caches, [metadata])
    logits = pad_to_blocks(model.compute_logits(hidden[: len(query_lens)]))
    _, best = kernels.greedy_sample(logits)
    together = torch.zeros(2 * count, dtype=torch.int64)
    rows, seeds = together.split([count, count])  # the second begins anywhere
    one = torch.zeros(count)
    kernels.sample_top_p_by_rejection(logits, best, rows, seeds, rows, one, one, one.double())

with tuning.table_in_use(load_table("sm_90")), torch.inference_mode(), recorded_launches() as launched:
    step([1, 1, 1])
    step([1, 7, 3])
    step([1, 7, 40])

layout = ParallelLayout(2, 2)
parallel = {}
for rank in range(4):
    groups = ParallelGroups(layout, layout.coordinates(rank), TensorParallelGroup(), PipelineParallelGroup())
    groups.tp_group.rank, groups.tp_group.size = rank % 2, 2
    names = [one.name for one in wanted_kernels(dataclasses.replace(build, groups=groups))]
    parallel[rank] = sorted(set(names))
OUT.write_text(json.dumps({
    "wanted": sorted(one.name for one in wanted),
    "missed": [one.name for one in launched if one.data not in {other.data for other in wanted}],
    "launched": sorted(one.name for one in launched),
    "parallel": parallel,
    "of_adapters": sorted(of_adapters),
}))
"""

FAMILIES = {
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True, "vocab_size": 1000},
    "qwen2": {"family": "qwen2", "hidden_size": 96, "num_heads": 6, "sliding_window": 64, "max_window_layers": 1},
    "mistral": {"family": "mistral", "sliding_window": 64},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "family", ["qwen3", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "mistral"))]
)
def test_a_models_steps_launch_nothing_that_was_not_to_be_compiled(tmp_path: Path, family: str) -> None:
    found = outcome_of(tmp_path, WANTED_BY_A_MODEL, json.dumps(FAMILIES[family]))
    layers = {
        "gather_step_kernel",
        "paged_attention_kernel",
        "rotate_and_store_kernel",
        "rms_norm_kernel",
        "gated_activation_kernel",
    }
    # Windows of 64 tokens are never cut into segments.
    sampling, reduction = {"greedy_kernel", "sample_top_p_kernel"}, {"reduce_segments_kernel"}
    assert set(found["launched"]) - reduction == layers | sampling
    assert reduction <= set(found["launched"]) or family == "mistral"
    assert found["missed"] == [], "the first step would wait for these"
    assert found["wanted"] == found["launched"], "compiled for nothing"
    assert found["of_adapters"] == ["lora_expand_kernel", "lora_shrink_kernel"]
    for rank, names in found["parallel"].items():
        assert set(names) - reduction == (layers | sampling if rank == "2" else layers), "one rank samples"


WHILE_WEIGHTS_ARE_LOADED = (
    WANTED_BY_A_MODEL[: WANTED_BY_A_MODEL.index("wanted = wanted_kernels")]
    + """
import logging
from pagoda.execution.precompile import kernels_compiled_meanwhile
lines = []
logging.basicConfig(level=logging.INFO, handlers=[type("H", (logging.Handler,), {
    "emit": lambda self, record: lines.append(record.getMessage())})()])
with kernels_compiled_meanwhile(build):
    pass
after = wanted_kernels(build)
OUT.write_text(json.dumps({"lines": lines, "cached": [one.is_cached for one in after]}))
"""
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_when_weights_are_loaded_every_kernel_is_in_the_cache(tmp_path: Path) -> None:
    found = outcome_of(tmp_path, WHILE_WEIGHTS_ARE_LOADED, json.dumps(FAMILIES["qwen3"]))
    assert all(found["cached"])
    assert len(found["cached"]) >= 8
    assert f"kernels: {len(found['cached'])} wanted, {len(found['cached'])} not in Triton's cache" in found["lines"]
    assert not any("instead" in line for line in found["lines"])


def test_a_triton_that_cannot_be_asked_costs_time_and_not_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def changed(_: object) -> None:
        raise AttributeError("this Triton has no jit_cache_hook")

    monkeypatch.setattr(precompile, "wanted_kernels", changed)
    with precompile.kernels_compiled_meanwhile(
        SimpleNamespace(groups=SimpleNamespace(layout=ParallelLayout()))  # type: ignore[arg-type]
    ):
        pass  # weights are loaded here
    assert "compiled at its first launch instead: AttributeError: this Triton has no jit_cache_hook" in caplog.text
