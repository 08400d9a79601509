"""The values that `auto` resolves to, each with the reason that is printed.

Pure functions of the configuration, the checkpoint and the hardware report.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.platform.choice import GIVEN, Choice
from pagoda.platform.hardware import CpuReport, GpuReport
from pagoda.platform.threads import choose_threads

# A step should take well under a second, so that running requests are not held up by another's prompt: small chunks on
# CPU, where prefill runs at hundreds of tokens a second; large ones on a GPU, where it takes thousands to be compute-bound.
CPU_BATCHED_TOKENS = 512
GPU_BATCHED_TOKENS = 8192
# Beyond these, decode throughput hardly grows and every sequence only gets slower.
CPU_SEQUENCES = 32
# An encoder's step on a CPU: enough rows for its products, and activations that stay in the cache.
ENCODER_BATCHED_TOKENS = 2048
ENCODER_SEQUENCES = 256
GPU_SEQUENCES = 256
# Instruction sets that multiply bfloat16 natively; without them it is emulated and slower than float32.
BFLOAT16_SETS = ("amx_bf16", "avx512_bf16", "svebf16", "bf16")
AMPERE = (8, 0)
# Of each type of a float8 KV cache, the first GPUs on which the kernels can convert it.
FLOAT8_CAPABILITY = {"fp8": (8, 9), "fp8_e4m3": (8, 9), "fp8_e5m2": AMPERE}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSettings:
    """The settings that the engine needs and that a configuration may leave to be chosen; `choices` holds their reasons.

    `device` is "cpu" or "cuda"; `dtype` "float32", "bfloat16" or "float16". `max_model_len` and the size of the KV cache
    are not here: they need the weights in memory first (see `kv_sizing`).
    """

    device: str
    dtype: str
    threads: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_dtype: str
    choices: tuple[Choice, ...]


def resolve(
    config: PagodaConfig,
    *,
    checkpoint_dtype: str | None,
    cpu: CpuReport,
    gpus: Collection[GpuReport] = (),
    whole_prompts: int | None = None,
) -> ResolvedSettings:
    """Choose everything that can be chosen before weights are loaded.

    `checkpoint_dtype`: what config.json says, None if it does not. `gpus`: what torch sees, empty for none. `whole_prompts`:
    of a model that computes each prompt whole, in one step, the tokens of the longest; None for others.

    Raises:
        ConfigError: the device asked for is not there, or cannot run the dtype, or that of the KV cache, asked for.
    """
    device = choose_device(config.device, gpus)
    capability = min((gpu.capability for gpu in gpus), default=None) if device.value == "cuda" else None
    tokens: Choice | None = None
    if whole_prompts is None:
        sequences = choose_max_num_seqs(config.max_num_seqs, device.value, config.max_num_batched_tokens)
    else:
        tokens = choose_tokens_of_whole_prompts(config.max_num_batched_tokens, device.value, whole_prompts)
        sequences = choose_whole_prompts(config.max_num_seqs)
    choices = (
        device,
        choose_dtype(config.dtype, checkpoint_dtype, capability, cpu.instruction_sets),
        choose_threads(
            config.threads,
            cpu,
            config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size,
            affinity=config.cpu_thread_affinity,
        ),
        sequences,
        tokens or choose_max_num_batched_tokens(config.max_num_batched_tokens, device.value, sequences.value),
        choose_kv_cache_dtype(config.kv_cache_dtype, capability),
    )
    return ResolvedSettings(**{choice.key: choice.value for choice in choices}, choices=choices)


def choose_device(asked: str, gpus: Collection[GpuReport]) -> Choice:
    """The device: cuda when there is a GPU, unless configured otherwise."""
    if asked == "cuda" and not gpus:
        raise ConfigError("device=cuda: torch sees no CUDA GPU here; use cpu or auto")
    if asked != "auto":
        return Choice("device", asked, GIVEN)
    if gpus:
        return Choice("device", "cuda", f"{len(gpus)} GPU found")
    return Choice("device", "cpu", "no GPU found")


def choose_dtype(
    asked: str, checkpoint: str | None, capability: tuple[int, int] | None, instruction_sets: Collection[str]
) -> Choice:
    """The dtype of weights and activations. `capability`: the GPU's, None on CPU.

    On a GPU the checkpoint's half-precision type; bfloat16 for a float32 one, which no tensor core multiplies at full speed.
    On CPU, float32 stays, since lower precision must be requested. bfloat16 and float16 become bfloat16 where the CPU
    multiplies it natively: decoding is bound by reading weights, and half the bytes are twice the speed; that float16 loses
    three bits of its fraction thereby matters less than running it in software. Elsewhere both become float32, which holds
    every value of either exactly.
    """
    if asked != "auto":
        if asked == "bfloat16" and capability is not None and capability < AMPERE:
            raise ConfigError(
                f"dtype=bfloat16: this GPU (capability {_dotted(capability)}) has none; use float16 or float32"
            )
        return Choice("dtype", asked, GIVEN)
    stored = checkpoint or "float32"
    origin = f"the checkpoint is {stored}" if checkpoint else "the checkpoint names no dtype"
    if capability is not None:
        return _gpu_dtype(stored, origin, capability)
    if stored == "float32":
        return Choice("dtype", "float32", origin)
    native = next((name for name in BFLOAT16_SETS if name in instruction_sets), None)
    if native is not None:
        return Choice("dtype", "bfloat16", f"{origin} and this CPU multiplies bfloat16 ({native})")
    return Choice("dtype", "float32", f"{origin}, which float32 holds exactly, and this CPU multiplies no bfloat16")


def choose_max_num_seqs(asked: int | None, device: str, batched_tokens: int | None) -> Choice:
    """Most sequences in a step; `batched_tokens` is the token budget if one is given, which bounds it."""
    if asked is not None:
        return Choice("max_num_seqs", asked, GIVEN)
    usual = GPU_SEQUENCES if device == "cuda" else CPU_SEQUENCES
    if batched_tokens is not None and batched_tokens < usual:
        return Choice("max_num_seqs", batched_tokens, f"max_num_batched_tokens is {batched_tokens}")
    return Choice("max_num_seqs", usual, f"usual on {device}")


def choose_max_num_batched_tokens(asked: int | None, device: str, sequences: int) -> Choice:
    """Most tokens in a step; at least one a sequence."""
    if asked is not None:
        return Choice("max_num_batched_tokens", asked, GIVEN)
    usual = GPU_BATCHED_TOKENS if device == "cuda" else CPU_BATCHED_TOKENS
    if usual < sequences:
        return Choice("max_num_batched_tokens", sequences, f"max_num_seqs is {sequences}")
    return Choice("max_num_batched_tokens", usual, f"usual on {device}")


def choose_whole_prompts(asked: int | None) -> Choice:
    """Most prompts in a step that computes each whole: slots cost little, and the token budget bounds the step."""
    return (
        Choice("max_num_seqs", ENCODER_SEQUENCES, "usual for an encoder")
        if asked is None
        else Choice("max_num_seqs", asked, GIVEN)
    )


def choose_tokens_of_whole_prompts(asked: int | None, device: str, longest: int) -> Choice:
    """Most tokens in a step that computes each prompt whole. Raises `ConfigError` for less than the longest has."""
    if asked is not None:
        if asked < longest:
            raise ConfigError(
                f"max_num_batched_tokens={asked}: an encoder computes a text in one step, and max_model_len is {longest}; "
                f"use {longest} at least, or lower max_model_len"
            )
        return Choice("max_num_batched_tokens", asked, GIVEN)
    usual = GPU_BATCHED_TOKENS if device == "cuda" else ENCODER_BATCHED_TOKENS
    if usual < longest:
        return Choice("max_num_batched_tokens", longest, f"max_model_len is {longest}, and a text is computed whole")
    return Choice("max_num_batched_tokens", usual, f"usual for an encoder on {device}")


def choose_kv_cache_dtype(asked: str, capability: tuple[int, int] | None) -> Choice:
    """The type of keys and values in the cache; `auto`: the model's. `capability`: the GPU's, None on CPU.

    Not on a CPU: there decoding reads weights, of which a KV cache is a small part, and every number would have to be widened.
    """
    if asked == "auto":
        return Choice("kv_cache_dtype", asked, "that of the model")
    if capability is None:
        raise ConfigError(f"kv_cache_dtype={asked}: the CPU kernels keep keys and values in the model's type; use auto")
    first = FLOAT8_CAPABILITY[asked]
    if capability < first:
        others = [name for name, least in FLOAT8_CAPABILITY.items() if capability >= least]
        raise ConfigError(
            f"kv_cache_dtype={asked}: this GPU (capability {_dotted(capability)}) cannot convert it, which takes "
            f"{_dotted(first)}; use {' or '.join([*others, 'auto'])}"
        )
    return Choice("kv_cache_dtype", asked, GIVEN)


def kv_cache_element_bytes(kv_cache_dtype: str, dtype_bytes: int) -> int:
    """Bytes of a number in the KV cache of a model whose numbers have `dtype_bytes`."""
    return dtype_bytes if kv_cache_dtype == "auto" else 1


def _gpu_dtype(stored: str, origin: str, capability: tuple[int, int]) -> Choice:
    if stored == "float16":
        return Choice("dtype", "float16", origin)
    if capability >= AMPERE:
        reason = origin if stored == "bfloat16" else f"{origin}, and GPUs multiply bfloat16 many times faster"
        return Choice("dtype", "bfloat16", reason)
    return Choice("dtype", "float16", f"{origin}, and this GPU (capability {_dotted(capability)}) has no bfloat16")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
