"""What `auto` stands for on which machine, and the arithmetic of the KV cache."""

import pytest

from pagoda.config import PagodaConfig
from pagoda.engine.core.auto import choose_dtype, choose_kv_cache_dtype, kv_cache_element_bytes, resolve
from pagoda.engine.core.kv_sizing import fit_max_model_len
from pagoda.errors import ConfigError
from pagoda.execution.kv_memory import choose_cpu_kv_cache_bytes
from pagoda.platform.hardware import CpuReport, GpuReport
from pagoda.scheduling.kv_groups import FullGroup

CPU = CpuReport(
    name="cpu",
    architecture="x86_64",
    logical_cores=8,
    physical_cores=4,
    quota=None,
    usable_cores=4,
    instruction_sets=(),
)
HOPPER = GpuReport(index=0, name="gpu", memory=140 * 2**30, capability=(9, 0))
TURING = (7, 5)


@pytest.mark.parametrize(
    ("asked", "checkpoint", "capability", "sets", "expected"),
    [
        ("float16", "bfloat16", None, (), "float16"),
        ("auto", "float32", None, ("amx_bf16",), "float32"),
        ("auto", None, None, ("amx_bf16",), "float32"),
        ("auto", "bfloat16", None, ("avx512_bf16",), "bfloat16"),
        ("auto", "bfloat16", None, ("avx512f",), "float32"),
        ("auto", "float16", None, ("amx_bf16",), "bfloat16"),
        ("auto", "float16", None, (), "float32"),
        ("auto", "bfloat16", (9, 0), (), "bfloat16"),
        ("auto", "float16", (9, 0), (), "float16"),
        ("auto", "float32", (9, 0), (), "bfloat16"),
        ("auto", "bfloat16", TURING, (), "float16"),
        ("float32", "bfloat16", TURING, (), "float32"),
    ],
)
def test_dtype_follows_checkpoint_and_device(asked, checkpoint, capability, sets, expected) -> None:
    choice = choose_dtype(asked, checkpoint, capability, sets)
    assert choice.value == expected
    assert choice.reason


def test_a_gpu_without_bfloat16_refuses_it() -> None:
    with pytest.raises(ConfigError, match="dtype=bfloat16: this GPU"):
        choose_dtype("bfloat16", None, TURING, ())


@pytest.mark.parametrize(
    ("asked", "capability"),
    [("auto", None), ("auto", TURING), ("fp8", (9, 0)), ("fp8", (8, 9)), ("fp8_e4m3", (12, 0)), ("fp8_e5m2", (8, 0))],
)
def test_a_kv_cache_may_be_of_what_its_gpu_converts(asked: str, capability: tuple[int, int] | None) -> None:
    assert choose_kv_cache_dtype(asked, capability).value == asked


@pytest.mark.parametrize(
    ("asked", "capability", "message"),
    [
        ("fp8", (8, 6), r"kv_cache_dtype=fp8: this GPU \(capability 8.6\) .* takes 8.9; use fp8_e5m2 or auto"),
        ("fp8_e5m2", TURING, r"takes 8.0; use auto"),
        ("fp8", None, "kv_cache_dtype=fp8: the CPU kernels keep keys and values in the model's type; use auto"),
    ],
)
def test_a_float8_kv_cache_is_refused_where_nothing_converts_it(
    asked: str, capability: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_kv_cache_dtype(asked, capability)


def test_a_float8_kv_cache_on_a_cpu_is_refused_before_anything_loads() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype=fp8"):
        resolve(PagodaConfig(kv_cache_dtype="fp8"), checkpoint_dtype=None, cpu=CPU)
    resolved = resolve(PagodaConfig(kv_cache_dtype="fp8"), checkpoint_dtype=None, cpu=CPU, gpus=[HOPPER])
    assert resolved.kv_cache_dtype == "fp8"


def test_numbers_of_a_float8_kv_cache_are_bytes() -> None:
    assert [kv_cache_element_bytes(name, 2) for name in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")] == [2, 1, 1, 1]


def test_everything_is_chosen_for_a_cpu_with_a_quota() -> None:
    cpu = CpuReport(
        name="", architecture="", logical_cores=8, physical_cores=4, quota=2.5, usable_cores=2, instruction_sets=()
    )
    resolved = resolve(PagodaConfig(), checkpoint_dtype="float32", cpu=cpu)
    assert (resolved.device, resolved.dtype, resolved.threads) == ("cpu", "float32", 2)
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens) == (32, 512)
    assert "quota is 2.5" in next(str(choice) for choice in resolved.choices if choice.key == "threads")


def test_everything_is_chosen_for_a_gpu() -> None:
    resolved = resolve(PagodaConfig(), checkpoint_dtype="bfloat16", cpu=CPU, gpus=[HOPPER])
    assert (resolved.device, resolved.max_num_seqs, resolved.max_num_batched_tokens) == ("cuda", 256, 8192)
    assert resolve(PagodaConfig(device="cpu"), checkpoint_dtype=None, cpu=CPU, gpus=[HOPPER]).device == "cpu"


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="device=cuda"):
        resolve(PagodaConfig(device="cuda"), checkpoint_dtype=None, cpu=CPU)


@pytest.mark.parametrize(
    ("given", "sequences", "tokens"),
    [
        ({"max_num_seqs": 1000}, 1000, 1000),
        ({"max_num_batched_tokens": 8}, 8, 8),
        ({"max_num_batched_tokens": 4096}, 32, 4096),
        ({"max_num_seqs": 2, "max_num_batched_tokens": 64}, 2, 64),
    ],
)
def test_one_given_limit_bounds_the_other(given: dict, sequences: int, tokens: int) -> None:
    resolved = resolve(PagodaConfig(**given), checkpoint_dtype=None, cpu=CPU)
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens) == (sequences, tokens)


def kv_bytes(asked: int | None = None, **changes) -> int:
    arguments = {
        "memory_available": 2**50,
        "block_bytes": 100,
        "block_size": 16,
        "rules": [FullGroup()],
        "max_num_seqs": 4,
        "max_model_len": 8192,
        "max_step_tokens": 512,
    }
    return choose_cpu_kv_cache_bytes(asked, **(arguments | changes)).value


def test_the_kv_cache_on_cpu_has_room_for_usual_sequences_or_one_of_full_length() -> None:
    assert kv_bytes(123) == 123
    assert kv_bytes() == (4 * 2048 // 16 + 1) * 100  # and the null block
    assert kv_bytes(max_model_len=64) == (4 * 4 + 1) * 100
    assert kv_bytes(max_model_len=32768) == (32768 // 16 + 1) * 100


def test_the_kv_cache_on_cpu_takes_at_most_half_of_what_is_free_and_is_capped() -> None:
    assert kv_bytes(memory_available=1000) == 500
    assert kv_bytes(block_bytes=2**30) == 16 * 2**30


def fit(**changes):
    arguments = {"block_bytes": 100, "available_bytes": 1000, "block_size": 16, "model_max_len": 512} | changes
    return fit_max_model_len(**arguments)


def test_auto_length_is_what_fits_without_the_null_block() -> None:
    fitted = fit()
    assert (fitted.num_blocks, fitted.max_model_len) == (10, 9 * 16)
    assert "1000 B / 100 B a block = 10 blocks; (10 - 1 null block) * 16 = 144 tokens, 6 B a token" in fitted.equation
    assert "max_model_len = 144 (all that fits; the model's own limit is 512), so 1.0 sequences" in fitted.equation


def test_auto_length_is_the_models_own_limit_where_that_fits() -> None:
    fitted = fit(model_max_len=70)
    assert (fitted.num_blocks, fitted.max_model_len) == (10, 70)
    assert "(the model's own limit), so 2.1 sequences" in fitted.equation


@pytest.mark.parametrize("length", [1, 143, 144])
def test_an_explicit_length_that_fits_is_kept(length: int) -> None:
    assert fit(max_model_len=length).max_model_len == length


def test_an_explicit_length_that_does_not_fit_says_what_to_change() -> None:
    with pytest.raises(ConfigError) as caught:
        fit(max_model_len=145)
    message = str(caught.value)
    assert "max_model_len=145 does not fit: it needs 11 KV blocks" in message
    assert "Lower max_model_len to at most 144" in message
    assert "1100 bytes" in message
    assert fit(max_model_len=145, available_bytes=1100).num_blocks == 11


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len=513 is beyond the model's own limit: must be at most 512"):
        fit(max_model_len=513, available_bytes=10**6)


def test_the_number_of_blocks_can_be_given() -> None:
    assert fit(num_blocks_override=2) == fit(available_bytes=0, num_blocks_override=2)
    assert fit(num_blocks_override=2)[:2] == (2, 16)
    with pytest.raises(ConfigError, match="raise num_gpu_blocks_override to 3"):
        fit(num_blocks_override=2, max_model_len=17)


@pytest.mark.parametrize("available", [0, 99, 199])
def test_no_room_for_one_block_is_refused(available: int) -> None:
    with pytest.raises(ConfigError, match="needs 200 B for one block of 16 tokens and the null block"):
        fit(available_bytes=available)
