"""A whole engine step on the Triton kernels, in Triton's interpreter: what layers and batches hand to them fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.startup import start_core
from pagoda.execution.cuda_graphs import graph_sizes
from pagoda.execution.in_process import InProcessExecutor
from pagoda.execution.worker import Worker
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.lora.weights import LoraModel
from pagoda.sampling.params import SamplingParams
from pagoda_kernels import backend
from tests.support.lora_adapters import adapter_of, base_model, merged_model, write_adapter
from tests.support.model_families import family_config
from tests.support.model_harness import save_random_checkpoint
from tests.support.parity import greedy, parity_case, run_greedily
from tests.support.plan_driver import PlanDriver, make_executor
from tests.support.recording import Recording
from tests.support.triton_kernels import float8_as_on_a_gpu, kernels, require_interpreter

require_interpreter()

__all__ = ["float8_as_on_a_gpu", "kernels"]

PROMPTS = {"short": [5, 6, 7], "long": [(13 * n + 5) % 500 for n in range(21)]}


def generated(
    checkpoint: Path, name: str, *, graphs: bool, kv_cache_dtype: str = "auto", num_drafts: int = 0
) -> list[list[int]]:
    executor = make_executor(checkpoint, cpu_kernels="reference", max_num_seqs=3, kv_cache_dtype=kv_cache_dtype)
    backend.use_backend(name)
    runner = executor.runner
    recording = Recording()
    if graphs:
        runner.capture_graphs(recording, graph_sizes(3, num_drafts, short_query_len=4, max_short_rows=4))
    driver = PlanDriver(executor, max_num_seqs=3)
    sequences = [driver.add(name, prompt, SamplingParams(temperature=0.0)) for name, prompt in PROMPTS.items()]
    driver.run_to(4, sequences, chunk=num_drafts or 16)
    assert not num_drafts or not graphs or recording.num_replayed == driver.step_id
    return [sequence.output for sequence in sequences]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "spec",
    [
        DummySpec(family="qwen3", num_layers=1, num_heads=3, num_kv_heads=1, sliding_window=9),
        DummySpec(family="llama", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=20),
    ],
    ids=["qwen3", "llama"],
)
def test_same_tokens_as_on_the_torch_kernels(tmp_path: Path, spec: DummySpec) -> None:
    checkpoint = write_dummy_checkpoint(tmp_path / "model", spec)
    expected = generated(checkpoint, "reference", graphs=False)
    assert generated(checkpoint, "triton", graphs=True) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_same_tokens_of_a_hybrid_with_experts(tmp_path: Path) -> None:
    """States in blocks, a gate behind attention, and experts as grouped products, in captured steps too."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    model = save_random_checkpoint(family_config("qwen3-next", **sizes, mlp_only_layers=[]), tmp_path)
    case = parity_case(tmp_path, model, num_prompts=6, longest=20, new_tokens=4)
    settings = {"cpu_kernels": "reference", "max_num_batched_tokens": 24, "max_num_seqs": 3, "max_model_len": 32}
    core = start_core(PagodaConfig(model=str(tmp_path), device="cpu", dtype="float32", threads=1, **settings))
    backend.use_backend("triton")
    executor = core._executor
    assert isinstance(executor, InProcessExecutor)
    executor.runner.capture_graphs(Recording())
    assert run_greedily(core, case, "") == case.expected
    core.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_same_tokens_of_latent_attention(tmp_path: Path) -> None:
    """Latents in blocks, queries turned by themselves, drafts verified in rows of few tokens; in captured steps, too."""
    save_random_checkpoint(family_config("deepseek-v2-lite", num_hidden_layers=2, vocab_size=512), tmp_path)
    for num_drafts in (0, 3):
        expected = generated(tmp_path, "reference", graphs=False, num_drafts=num_drafts)
        assert generated(tmp_path, "triton", graphs=True, num_drafts=num_drafts) == expected


@pytest.mark.usefixtures("kernels")
def test_rows_of_one_token_and_of_few_in_one_graph(tmp_path: Path) -> None:
    """As where some rows verify drafts and others have none."""
    spec = DummySpec(family="llama", num_layers=1, num_heads=4, num_kv_heads=2, head_dim=20)
    checkpoint = write_dummy_checkpoint(tmp_path / "model", spec)
    expected = generated(checkpoint, "reference", graphs=False, num_drafts=3)
    assert generated(checkpoint, "triton", graphs=True, num_drafts=3) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_adapters_in_captured_steps(tmp_path: Path) -> None:
    """Base and two adapters in one step, chunked prompts, and graphs with adapters and without."""
    model = write_dummy_checkpoint(tmp_path / "model", DummySpec(num_layers=1, num_heads=2, num_kv_heads=1))
    paths = [write_adapter(tmp_path / str(rank), model, rank=rank, seed=rank, size=2.0) for rank in (4, 20)]
    settings = {"max_num_batched_tokens": 16, "max_num_seqs": 3, "max_model_len": 32, "max_lora_rank": 20}
    core = start_core(
        PagodaConfig(
            model=str(model),
            device="cpu",
            dtype="float32",
            threads=1,
            cpu_kernels="reference",
            enable_lora=True,
            **settings,
        )
    )
    backend.use_backend("triton")
    executor = core._executor
    assert isinstance(executor, InProcessExecutor)
    worker, runner = executor._worker, executor.runner
    assert isinstance(worker, Worker)
    adapters = LoraModel(runner.model, worker.model_config, worker._lora_limits(), max_num_seqs=3)
    runner.adapters = worker.adapters = executor._loader._model = adapters  # type: ignore[union-attr]
    recording = Recording()
    runner.capture_graphs(recording)
    assert recording.num_captured == 2 * len(graph_sizes(3))
    models = [base_model(model), *(merged_model(model, path) for path in paths)]
    prompt = [(13 * n + 5) % 500 for n in range(19)]
    case = parity_case(model, models[0], num_prompts=6, longest=20, new_tokens=3)
    case = replace(
        case,
        prompts=[prompt] * 3,
        expected=[greedy(each, prompt, 3) for each in models],
    )
    assert len({tuple(tokens) for tokens in case.expected}) == 3, "the adapters were meant to matter"
    named = [None, *map(adapter_of, paths)]
    assert run_greedily(core, case, "all", named) == case.expected
    replayed = recording.num_replayed
    assert replayed > 0
    assert run_greedily(core, replace(case, prompts=[prompt], expected=case.expected[:1]), "base") == case.expected[:1]
    assert recording.num_replayed > replayed
    core.shutdown()


@pytest.mark.usefixtures("kernels", "float8_as_on_a_gpu")
def test_same_tokens_from_a_float8_kv_cache(tmp_path: Path) -> None:
    """Through the setting: half-sized blocks, scales of the checkpoint, and both kernels that know float8."""
    checkpoint = write_dummy_checkpoint(tmp_path / "model", DummySpec(family="qwen3", num_layers=2, num_kv_heads=1))
    file = checkpoint / "model.safetensors"
    scales = {f"model.layers.0.self_attn.{name}_scale": torch.tensor(1 / 16) for name in ("k", "v")}
    save_file({**load_file(file), **scales}, file)
    expected = generated(checkpoint, "reference", graphs=False, kv_cache_dtype="fp8")
    assert generated(checkpoint, "triton", graphs=True, kv_cache_dtype="fp8") == expected


def test_blocks_of_a_float8_kv_cache_cost_a_byte_a_number(tmp_path: Path) -> None:
    checkpoint = write_dummy_checkpoint(tmp_path / "model", DummySpec(num_layers=2))
    executor = make_executor(checkpoint, cpu_kernels="reference", kv_cache_dtype="fp8_e5m2", num_blocks=9)
    caches = [cache for pair in executor.runner.kv_caches for cache in pair]
    assert executor.kv_budget(8).block_bytes == sum(cache[0].nbytes for cache in caches)
    assert {cache.dtype for cache in caches} == {torch.float8_e5m2}
    assert [layer.self_attn.kv_scales for layer in executor.runner.model.layers] == [(1.0, 1.0)] * 2
