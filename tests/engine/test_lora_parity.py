"""LoRA adapters in the engine: greedy tokens equal those of transformers with `W + scale * B @ A` in float32.

Prompts of the model alone and of eight adapters of several ranks arrive at once, and then once more, in a KV cache that is too
small for them, while all adapters may run together, or three of them with five in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pagoda import LLM, LoRARequest
from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.engine.core import startup
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.errors import CheckpointError, ConfigError, InvalidRequestError, NotSupportedError
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.lookahead import Speculation
from pagoda.scheduling.request import Request
from tests.support.drafts import ArbitraryDrafts
from tests.support.gguf_files import write_gguf
from tests.support.lora_adapters import (
    ALL_LINEAR,
    adapter_of,
    add_experts,
    base_model,
    merged_model,
    save,
    write_adapter,
)
from tests.support.model_families import family_config
from tests.support.parity import ParityCase, greedy, parity_case, run_greedily

NEW_TOKENS = 16
LONGEST = 100
NUM_PROMPTS = 20

SPECS = {
    "llama": DummySpec(family="llama", tie_word_embeddings=True, num_heads=8, num_kv_heads=4, attention_bias=True),
    "qwen3": DummySpec(family="qwen3", num_heads=4, num_kv_heads=2, num_layers=4),
}


@dataclass(frozen=True)
class LoraCase:
    """Prompts, the adapter of each (over and over), and what must come out."""

    case: ParityCase
    adapters: list[LoraAdapter | None]


def write_adapters(directory: Path, model: Path) -> list[Path]:
    """Of several ranks, scales, types and layers."""
    variants: list[dict[str, Any]] = [
        {"rank": 1},
        {"rank": 4, "targets": ("q_proj", "v_proj")},
        {"rank": 8, "use_rslora": True},
        {"rank": 16, "dtype": torch.bfloat16},
        {"rank": 24, "targets": ("gate_proj", "up_proj", "down_proj"), "lora_alpha": 7},
        {"rank": 64},
        {"rank": 8, "rank_pattern": {"k_proj": 3, r".*\.1\..*up_proj": 5}, "alpha_pattern": {"o_proj": 40}},
        {"rank": 16, "layers": range(1), "targets": ("o_proj", "k_proj", "down_proj")},
    ]
    return [
        write_adapter(directory / f"adapter{index}", model, seed=index, **variant)
        for index, variant in enumerate(variants)
    ]


def case_for(directory: Path, paths: list[Path], *, num_prompts: int, longest: int, new_tokens: int) -> LoraCase:
    """Prompts of the model alone and of each adapter in turn."""
    base = base_model(directory)
    case = parity_case(directory, base, num_prompts=num_prompts, longest=longest, new_tokens=new_tokens)
    models = [base, *(merged_model(directory, path) for path in paths)]
    expected = [
        case.expected[index] if index % len(models) == 0 else greedy(models[index % len(models)], prompt, new_tokens)
        for index, prompt in enumerate(case.prompts)
    ]
    changed = sum(own != of_base for own, of_base in zip(expected, case.expected, strict=True))
    assert changed > num_prompts // 2, "the adapters were meant to matter"
    return LoraCase(replace(case, expected=expected), [None, *map(adapter_of, paths)])


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def make(family: str) -> LoraCase:
        directory = tmp_path_factory.mktemp("lora") / family
        write_dummy_checkpoint(directory, SPECS[family])
        paths = write_adapters(directory.parent / "adapters", directory)
        return case_for(directory, paths, num_prompts=NUM_PROMPTS, longest=LONGEST, new_tokens=NEW_TOKENS)

    return make


@pytest.fixture(scope="module")
def experts_of(tmp_path_factory: pytest.TempPathFactory):
    """Mixtures of experts and three adapters of each: of all that PEFT has for it, of the experts alone, of the rest."""

    @cache
    def make(family: str) -> LoraCase:
        from transformers import AutoModelForCausalLM

        directory = tmp_path_factory.mktemp("experts") / family
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(family_config(family)).save_pretrained(directory)
        stacked = family in ("qwen3-moe", "gpt-oss")
        paths = [directory.parent / name for name in ("all", "experts", "attention")]
        for seed, (path, targets) in enumerate(zip(paths, (ALL_LINEAR, (), ALL_LINEAR), strict=True)):
            write_adapter(path, directory, rank=(8, 3, 16)[seed], targets=targets, seed=seed)
            if path.name != "attention":
                add_experts(path, directory, stacked=stacked, seed=seed)
        return case_for(directory, paths, num_prompts=9, longest=40, new_tokens=10)

    return make


def config_of(directory: Path, chunk: int = 64, **settings: Any) -> PagodaConfig:
    values: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "block_size": 8,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": min(12, chunk),
        "max_model_len": LONGEST + NEW_TOKENS,
        "num_gpu_blocks_override": 2 * -(-(LONGEST + NEW_TOKENS) // 8) + 1,
        "kv_cache_watermark": 0.0,
        "enable_lora": True,
        "max_lora_rank": 64,
        "max_loras": 3,
        "max_cpu_loras": 5,
    }
    return PagodaConfig(model=str(directory), **{**values, **settings})


def check(lora: LoraCase, prepare: Callable[[EngineCore], None] = lambda core: None, **settings: Any) -> Any:
    """Both rounds; the engine's figures after them. `prepare` is called before them."""
    core = start_core(config_of(lora.case.directory, **settings))
    prepare(core)
    try:
        assert run_greedily(core, lora.case, "first-", lora.adapters) == lora.case.expected
        assert run_greedily(core, lora.case, "second-", lora.adapters) == lora.case.expected
        stats = core.stats()
        assert stats.num_blocks_in_use == 0
        assert not stats.running_adapters
        assert not stats.waiting_adapters
        return stats
    finally:
        core.shutdown()


@pytest.mark.parametrize("family", sorted(SPECS))
@pytest.mark.parametrize("chunk", [16, 256])
def test_every_token_equals_transformers(case_of, family: str, chunk: int) -> None:
    check(case_of(family), chunk=chunk)


@pytest.mark.parametrize("family", sorted(SPECS))
def test_all_adapters_in_one_step_and_preempted(case_of, family: str) -> None:
    stats = check(case_of(family), max_loras=8, max_cpu_loras=8)
    assert stats.num_preemptions > 0, "the cache was meant to be too small"


def test_layer_by_layer_and_on_the_reference_kernels(case_of) -> None:
    check(case_of("llama"), cpu_kernels="reference")


def test_with_drafts(case_of) -> None:
    case = case_of("llama").case

    def truth(request: Request, count: int) -> list[int]:
        expected = case.expected[case.prompts.index(request.spec.prompt_token_ids)]
        return expected[request.num_output_tokens :][:count]

    def draft_whatever_it_costs(core: EngineCore) -> None:
        proposer = ArbitraryDrafts(Random(1), truth, core.ready.vocab_size)
        core._scheduler._lookahead = Speculation(core._scheduler.kv, proposer, 32)

    speculation = {"method": "ngram", "num_speculative_tokens": 3}
    stats = check(case_of("llama"), draft_whatever_it_costs, speculative_config=speculation)
    assert 0 < stats.num_spec_accepted_tokens < stats.num_spec_draft_tokens


@pytest.mark.parametrize(
    "family",
    ["qwen2-moe", "gpt-oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3-moe"))],
)
def test_experts(experts_of, family: str) -> None:
    check(experts_of(family), num_gpu_blocks_override=64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "expert", "reference"])
def test_experts_on_ranks(experts_of, layout: str) -> None:
    if layout == "reference":
        check(experts_of("qwen2-moe"), cpu_kernels="reference")
    else:
        check(experts_of("qwen2-moe"), tensor_parallel_size=2, enable_expert_parallel=layout == "expert")


def test_several_steps_a_plan(case_of) -> None:
    check(case_of("llama"), num_scheduler_steps=4)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), pytest.param((2, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [pytest.param("llama"), pytest.param("qwen3", marks=pytest.mark.slow)])
def test_ranks(case_of, layout: tuple[int, int], family: str) -> None:
    check(case_of(family), tensor_parallel_size=layout[0], pipeline_parallel_size=layout[1])


def test_fused_layers_of_a_checkpoint_have_fused_adapters(tmp_path: Path) -> None:
    model = tmp_path / "phi3"
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(family_config("phi3")).save_pretrained(model)
    path = write_adapter(tmp_path / "fused", model, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    prompt = list(range(3, 20))
    expected = greedy(merged_model(model, path), prompt, 12)
    assert expected != greedy(base_model(model), prompt, 12)
    assert generate(config_of(model), [(prompt, adapter_of(path))], 12) == [expected]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_bases_are_changed_like_those_of_floats(tmp_path: Path, quantization: str) -> None:
    """An adapter that takes a layer's whole output away, whatever the base computes for it, cannot be had; one that adds
    nothing leaves every token, and one that adds much changes them."""
    model = tmp_path / "model"
    write_dummy_checkpoint(model, DummySpec(num_layers=2))
    nothing = adapter_of(write_adapter(tmp_path / "nothing", model, size=0.0))
    much = adapter_of(write_adapter(tmp_path / "much", model, size=2.0))
    prompt = list(range(3, 40))
    config = config_of(model, quantization=quantization)
    base, same, other = generate(config, [(prompt, None), (prompt, nothing), (prompt, much)], 12)
    assert same == base
    assert other != base


def test_a_gguf_file_has_adapters_of_its_model(tmp_path: Path) -> None:
    """Whose heads it keeps in another order than the adapter."""
    directory, file = tmp_path / "model", tmp_path / "model.gguf"
    write_dummy_checkpoint(directory, DummySpec(family="llama", num_layers=2, num_heads=4, num_kv_heads=2))
    path = write_adapter(tmp_path / "adapter", directory, size=2.0)
    write_gguf(directory, file, "llama")
    prompt = list(range(3, 30))
    expected = [greedy(base_model(directory), prompt, 8), greedy(merged_model(directory, path), prompt, 8)]
    assert expected[0] != expected[1]
    assert generate(config_of(file), [(prompt, None), (prompt, adapter_of(path))], 8) == expected


def test_what_is_cached_of_one_version_is_not_found_by_another(tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "adapter"
    write_dummy_checkpoint(model, DummySpec(num_layers=2))
    prompt = list(range(3, 80))
    core = start_core(config_of(model))
    try:
        outputs = []
        for seed in (0, 1):
            write_adapter(path, model, seed=seed, size=2.0)
            expected = greedy(merged_model(model, path), prompt, 8)
            adapter = adapter_of(path, "same-name")
            for expected_hit in (0, 72):
                before = core.stats().prefix_cache_hits
                assert run_requests(core, [(prompt, adapter)], 8) == [expected]
                assert core.stats().prefix_cache_hits - before == expected_hit
            outputs.append(expected)
        assert outputs[0] != outputs[1]
    finally:
        core.shutdown()


def test_an_adapter_whose_files_have_changed_or_gone_fails_its_requests_alone(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_dummy_checkpoint(model, DummySpec(num_layers=2))
    changed = adapter_of(write_adapter(tmp_path / "changed", model))
    write_adapter(tmp_path / "changed", model, seed=5)
    gone = LoraAdapter("gone", str(tmp_path / "gone"), "0")
    write_adapter(tmp_path / "broken", model, size=float("nan"))
    broken = adapter_of(tmp_path / "broken")
    fine = adapter_of(write_adapter(tmp_path / "fine", model))
    core = start_core(config_of(model))
    try:
        errors: dict[str, str | None] = {}
        for adapter in (changed, gone, broken, fine, None):
            name = adapter.name if adapter is not None else "base"
            core.add_request(request_of(name, [5, 6, 7], adapter, 4))
        while core.has_work:
            for output in core.step().outputs:
                if output.finish_reason is not None:
                    errors[output.request_id] = output.error
        assert errors.pop("base") is None
        assert errors.pop("fine") is None
        assert "have changed: load it again" in (errors.pop("changed") or "")
        assert "is no directory" in (errors.pop("gone") or "")
        assert "no finite numbers" in (errors.pop("broken") or "")
    finally:
        core.shutdown()


@pytest.mark.slow
def test_many_more_adapters_than_are_in_memory(tmp_path: Path) -> None:
    """Two hundred, six of them in memory and three running: every request has the tokens that it has where all are there."""
    model = tmp_path / "model"
    write_dummy_checkpoint(model, DummySpec(num_layers=1))
    first = write_adapter(tmp_path / "0", model, rank=2, size=2.0)
    adapters = [adapter_of(first)]
    tensors = load_file(first / "adapter_model.safetensors")
    config = json.loads((first / "adapter_config.json").read_text())
    for number in range(1, 200):
        turned = {name: tensor.roll(number, 0).contiguous() for name, tensor in tensors.items()}
        save(tmp_path / str(number), config, turned)
        adapters.append(adapter_of(tmp_path / str(number)))
    prompts = [[3 + number % 50, *range(5, 12)] for number in range(400)]
    requests = [(prompt, None if number % 5 == 0 else adapters[number % 200]) for number, prompt in enumerate(prompts)]
    settings: dict[str, Any] = {"num_gpu_blocks_override": 400, "max_lora_rank": 2, "max_num_seqs": 12}
    expected = generate(config_of(model, **settings, max_loras=12, max_cpu_loras=200), requests, 6)
    assert len({tuple(tokens) for tokens in expected}) > 100
    assert generate(config_of(model, **settings, max_loras=3, max_cpu_loras=6), requests, 6) == expected


def test_after_a_sleep_adapters_are_read_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_dummy_checkpoint(model, DummySpec(num_layers=2))
    adapter = adapter_of(write_adapter(tmp_path / "adapter", model))
    requests = [(list(range(3, 30)), adapter), (list(range(3, 30)), None)]
    core = start_core(config_of(model))
    try:
        before = run_requests(core, requests, 8)
        core.sleep(1)
        core.wake_up()
        assert run_requests(core, requests, 8) == before
        assert before[0] != before[1]
    finally:
        core.shutdown()


def test_vectors_are_those_of_the_model_with_the_adapter_in_its_weights(tmp_path: Path) -> None:
    model, merged = tmp_path / "model", tmp_path / "merged"
    write_dummy_checkpoint(model, DummySpec(num_layers=2))
    path = write_adapter(tmp_path / "adapter", model)
    shutil.copytree(model, merged)
    merged_model(model, path).save_pretrained(merged)
    prompt = list(range(3, 60))
    settings: dict[str, Any] = {"task": "embed", "dtype": "float32", "threads": 1, "kv_cache_memory_bytes": 1 << 23}
    with LLM(str(merged), **settings) as llm:
        (expected,) = llm.embed(prompt)
    with LLM(str(model), enable_lora=True, **settings) as llm:
        (plain,) = llm.embed(prompt)
        (found,) = llm.embed(prompt, lora_request=LoRARequest("a", 1, str(path)))
    assert torch.allclose(torch.tensor(found.embedding), torch.tensor(expected.embedding), atol=2e-5)
    assert not torch.allclose(torch.tensor(plain.embedding), torch.tensor(expected.embedding), atol=1e-2)


def test_llm_takes_vllms_lora_requests(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_dummy_checkpoint(model, DummySpec(num_layers=2))
    paths = [write_adapter(tmp_path / name, model, seed=seed) for seed, name in enumerate("ab")]
    prompt = list(range(3, 20))
    expected = [greedy(base_model(model), prompt, 8), *(greedy(merged_model(model, path), prompt, 8) for path in paths)]
    requests = [None, *(LoRARequest(path.name, number, str(path)) for number, path in enumerate(paths, start=1))]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    settings: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_cache_memory_bytes": 1 << 23}
    with LLM(str(model), enable_lora=True, max_loras=1, **settings) as llm:
        outputs = llm.generate([prompt] * 3, params, lora_request=requests)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        with pytest.raises(CheckpointError, match="is no directory"):
            llm.generate([prompt], params, lora_request=LoRARequest("c", 3, str(tmp_path / "c")))
        with pytest.raises(InvalidRequestError, match="there are 1 prompts and 2 lora_requests"):
            llm.generate([prompt], params, lora_request=requests[:2])
        chunks = list(llm.stream(prompt, params, lora_request=requests[2]))
        assert [token for chunk in chunks for token in chunk.token_ids] == expected[2]
    with LLM(str(model), **settings) as llm, pytest.raises(NotSupportedError, match="without enable_lora"):
        llm.generate([prompt], params, lora_request=requests[1])


def test_where_there_are_no_kernels_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"enable_lora: .* on a CPU in float32 and bfloat16, not in float16"):
        startup._check_adapters(PagodaConfig(enable_lora=True, device="cpu", dtype="float16"))


def request_of(name: str, prompt: list[int], adapter: LoraAdapter | None, max_tokens: int) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        max_tokens=max_tokens,
        adapter=adapter,
    )


def run_requests(core: Any, requests: list[tuple[list[int], LoraAdapter | None]], max_tokens: int) -> list[list[int]]:
    outputs: dict[str, list[int]] = {}
    for index, (prompt, adapter) in enumerate(requests):
        outputs[str(index)] = []
        core.add_request(request_of(str(index), prompt, adapter, max_tokens))
    while core.has_work:
        for output in core.step().outputs:
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            outputs[output.request_id] += output.new_token_ids
    return list(outputs.values())


def generate(
    config: PagodaConfig, requests: list[tuple[list[int], LoraAdapter | None]], max_tokens: int
) -> list[list[int]]:
    core = start_core(config)
    try:
        return run_requests(core, requests, max_tokens)
    finally:
        core.shutdown()
