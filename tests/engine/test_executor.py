from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.executors import create_executor
from pagoda.errors import CheckpointError, ConfigError, EngineDeadError
from pagoda.execution.in_process import InProcessExecutor
from pagoda.execution.worker import Worker
from pagoda.models.config import ModelConfig
from pagoda.sampling.params import SamplingParams
from tests.support.plan_driver import PlanDriver, make_executor

GREEDY = SamplingParams(temperature=0.0)
RESOLVED = {"device": "cpu", "dtype": "float32", "threads": 1, "max_num_seqs": 4, "max_num_batched_tokens": 64}


def config_of(checkpoint: Path, **settings) -> PagodaConfig:
    return PagodaConfig(model=str(checkpoint), **{**RESOLVED, **settings})


def test_step_that_raises_fails_in_result_and_the_next_plan_works(checkpoint, monkeypatch):
    executor = make_executor(checkpoint)
    driver = PlanDriver(executor)
    untouched = driver.add("untouched", [5, 6, 7], GREEDY)
    driver.run_to(2, [untouched])
    expected = PlanDriver(make_executor(checkpoint))
    alone = expected.add("alone", [5, 6, 7], GREEDY)
    expected.run_to(6, [alone])

    victim = driver.add("victim", [1, 2, 3], SamplingParams(repetition_penalty=1.2))
    model = executor.runner.model

    def broken(*args):
        raise RuntimeError("the kernel fell over")

    monkeypatch.setattr(model, "forward", broken)
    handle = executor.submit(driver.plan({"victim": 3}, [victim]))
    with pytest.raises(RuntimeError, match="the kernel fell over"):
        handle.result()
    executor.check_health()
    monkeypatch.undo()

    req_index = victim.req_index
    driver.release(victim)
    again = driver.add("again", [1, 2, 3], GREEDY)
    driver.run_to(2, [again])
    driver.run_to(6, [untouched])
    assert untouched.output == alone.output
    assert again.req_index == req_index


def test_device_error_makes_the_executor_unhealthy(checkpoint, monkeypatch):
    executor = make_executor(checkpoint)
    driver = PlanDriver(executor)

    def broken(*args):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(executor.runner.model, "forward", broken)
    with pytest.raises(torch.AcceleratorError):
        executor.submit(driver.plan({"a": 1}, [driver.add("a", [1], GREEDY)])).result()
    with pytest.raises(EngineDeadError, match="illegal memory access"):
        executor.check_health()


def test_executor_is_dead_after_shutdown_which_may_come_twice(checkpoint):
    executor = make_executor(checkpoint)
    executor.check_health()
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        executor.check_health()
    with pytest.raises(RuntimeError, match="not initialized"):
        executor.submit(PlanDriver(executor).plan({}, [])).result()


def test_blocks_are_as_large_as_keys_and_values_of_all_layers(checkpoint):
    executor = InProcessExecutor(config_of(checkpoint, dtype="bfloat16"), ModelConfig.from_directory(checkpoint))
    block_bytes = executor.kv_budget(16).block_bytes
    assert block_bytes == 2 * 2 * 2 * 16 * 16 * 2  # k and v, layers, KV heads, head_dim, tokens, bytes
    executor.load()
    executor.initialize_kv_cache(7)
    caches = executor.runner.kv_caches
    assert sum(cache.nbytes for layer in caches for cache in layer) == 7 * block_bytes


def test_kv_memory_is_what_is_configured_else_a_share_of_free_memory(checkpoint, monkeypatch):
    model_config = ModelConfig.from_directory(checkpoint)
    given = InProcessExecutor(config_of(checkpoint, kv_cache_memory_bytes=12345), model_config)
    assert given.kv_budget(16).available_bytes == 12345
    executor = InProcessExecutor(config_of(checkpoint, max_model_len=32), model_config)
    budget = executor.kv_budget(16)
    assert budget.available_bytes == (4 * 2 + 1) * budget.block_bytes  # 4 sequences of 2 blocks and the null block


def test_longest_sequence_is_the_fitted_one_else_the_configured_else_the_models(checkpoint):
    model_config = ModelConfig.from_directory(checkpoint)
    for configured, fitted, expected in ((None, None, 512), (100, None, 100), (None, 40, 40), (100, 40, 40)):
        executor = InProcessExecutor(config_of(checkpoint, max_model_len=configured), model_config)
        executor.load()
        executor.initialize_kv_cache(5, fitted)
        assert executor.runner.batch.max_model_len == expected


@pytest.mark.parametrize(("max_model_len", "num_blocks"), [(1, 2), (2, 2), (40, 2)])
def test_smallest_caches_and_lengths_come_up(checkpoint, max_model_len, num_blocks):
    executor = InProcessExecutor(config_of(checkpoint, block_size=1), ModelConfig.from_directory(checkpoint))
    executor.load()
    executor.initialize_kv_cache(num_blocks, max_model_len)
    executor.check_health()


def test_warm_up_leaves_the_request_slots_empty_and_writes_the_null_block_only(checkpoint):
    executor = make_executor(checkpoint)
    runner = executor.runner
    assert not runner.sampler._requests
    assert not runner.batch.num_tokens.any()
    for key_cache, value_cache in runner.kv_caches:
        assert not key_cache[1:].any()
        assert not value_cache[1:].any()


def test_dummy_weights_need_no_weight_files(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    executor = make_executor(tmp_path, load_format="dummy")
    driver = PlanDriver(executor)
    sequence = driver.add("a", [1, 2], GREEDY)
    driver.run_to(2, [sequence])
    assert len(sequence.output) == 2
    with pytest.raises(CheckpointError):
        InProcessExecutor(config_of(tmp_path), ModelConfig.from_directory(checkpoint)).load()


def test_progress_is_told_while_weights_are_loaded(checkpoint):
    told: list[tuple[int, int]] = []
    executor = InProcessExecutor(config_of(checkpoint), ModelConfig.from_directory(checkpoint))
    executor.load(lambda name, done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "device", "dtype"])
def test_unresolved_configuration_is_refused(checkpoint, name):
    value = "auto" if name in ("device", "dtype") else None
    with pytest.raises(ConfigError, match=name):
        create_executor(config_of(checkpoint, **{name: value}), ModelConfig.from_directory(checkpoint))


def test_steps_need_a_loaded_model_and_a_cache(checkpoint):
    executor = create_executor(config_of(checkpoint), ModelConfig.from_directory(checkpoint))
    with pytest.raises(RuntimeError, match="not loaded"):
        executor.initialize_kv_cache(3)


def test_low_precision_models_run(checkpoint):
    for dtype in ("bfloat16", "float16"):
        driver = PlanDriver(make_executor(checkpoint, dtype=dtype))
        sequences = [driver.add(name, prompt, GREEDY) for name, prompt in (("a", [1, 2, 3]), ("b", list(range(40))))]
        driver.run_to(3, sequences, chunk=7)
        assert all(sequence.error is None for sequence in sequences)


def test_kv_memory_on_a_gpu_is_its_share_less_use_step_and_tables(checkpoint, monkeypatch):
    """The arithmetic, with a GPU that only says what it holds; the largest step is really run."""
    config = config_of(checkpoint, gpu_memory_utilization=0.5, max_model_len=63)
    worker = Worker(config, ModelConfig.from_directory(checkpoint))
    worker.load()
    sizes: list[int] = []
    forward = worker.model.forward

    def watched(input_ids, *args):
        sizes.append(len(input_ids))
        return forward(input_ids, *args)

    monkeypatch.setattr(worker.model, "forward", watched)
    for name, value in (
        ("empty_cache", None),
        ("reset_peak_memory_stats", None),
        ("memory_reserved", 1_000),
        ("max_memory_reserved", 21_000),
        ("mem_get_info", (700_000, 1_000_000)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    tables = 4 * (8 * 64 + 4 * 4)
    assert worker._profile_cuda() == 500_000 - 300_000 - 20_000 - tables
    assert sizes == [64, 4]  # max_num_batched_tokens in max_num_seqs rows, then one more token each
