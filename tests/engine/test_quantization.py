"""Quantized models through the engine: the demo model's skills, both kinds of kernels, ranks, and what the worker refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagoda import LLM, SamplingParams
from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.execution.worker import Worker
from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.models.config import ModelConfig
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.quantization.writing import write_quantized_checkpoint
from tests.support.demo_questions import FactSheet, ask
from tests.support.quantized_checkpoints import METHODS, write_quantized

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
SKILLS = [
    (ask("What is 27 + 45?"), "27 + 45 = 72"),
    (ask("Mia is 34 years old and lives in Oslo. Answer in JSON with name, age."), '{"name": "Mia", "age": 34}'),
    (ask("Repeat: river lamp fox stone"), "river lamp fox stone"),
    *(FactSheet.draw(3, 60).ask(position) for position in (5, 30, 55)),
]
PROMPTS = [[5, 9, 400, 33], [7], list(range(20, 90))]


def engine(model: Path, **settings: Any) -> LLM:
    values = {"dtype": "float32", "threads": 1, "kv_cache_memory_bytes": "32MiB", "device": "cpu", **settings}
    return LLM(str(model), **values)


def tokens_of(model: Path, **settings: Any) -> list[list[int]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with engine(model, **settings) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, sampling)]


@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"quantization": "int8", "dtype": "bfloat16"}])
def test_int8_demo_model_answers_as_before(settings: dict[str, str]) -> None:
    with engine(demo_checkpoint(), **settings) as llm:
        answers = [output.outputs[0].text for output in llm.chat([messages for messages, _ in SKILLS], GREEDY)]
    assert answers == [expected for _, expected in SKILLS]


def test_int4_demo_model_answers_nearly_as_before() -> None:
    with engine(demo_checkpoint(), quantization="int4") as llm:
        answers = [output.outputs[0].text for output in llm.chat([messages for messages, _ in SKILLS], GREEDY)]
    assert sum(answer == expected for answer, (_, expected) in zip(answers, SKILLS, strict=True)) >= len(SKILLS) - 2


def test_two_ranks_answer_as_one() -> None:
    with engine(demo_checkpoint(), quantization="int8", tensor_parallel_size=2, max_num_seqs=8) as llm:
        answers = [output.outputs[0].text for output in llm.chat([messages for messages, _ in SKILLS], GREEDY)]
    assert answers == [expected for _, expected in SKILLS]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_compiled_kernels_and_torch_give_the_same_tokens(quantization: str) -> None:
    """On the demo model, which is sure of its answers: the two may round an activation that lies between two steps apart."""
    tokens = []
    for kernels in ("reference", "auto"):
        with engine(demo_checkpoint(), quantization=quantization, cpu_kernels=kernels) as llm:
            outputs = llm.chat([messages for messages, _ in SKILLS[:4]], GREEDY)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    assert tokens[0] == tokens[1]


def test_written_checkpoint_is_served_with_the_same_tokens(tmp_path: Path) -> None:
    model = write_dummy_checkpoint(tmp_path / "model", DummySpec())
    write_quantized_checkpoint(model, tmp_path / "int4", "int4", None, lambda done, total: None)
    at_load = tokens_of(model, quantization="int4")
    assert tokens_of(tmp_path / "int4") == at_load
    assert tokens_of(tmp_path / "int4", quantization="compressed-tensors") == at_load


@pytest.mark.parametrize("method", ["gptq", "awq", "packed-int8", "int8-zeros"])
def test_both_kinds_of_kernels_agree_on_quantized_checkpoints(method: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, METHODS[method])
    logits = []
    for kernels in ("reference", "auto"):
        worker = Worker(config_of(tmp_path, cpu_kernels=kernels), ModelConfig.from_directory(tmp_path))
        worker.load()
        assert worker.model is not None
        logits.append(worker.model.layers[1].mlp.down_proj(worker.model.embed_tokens.weight[:3].repeat(1, 2)[:, :96]))
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].abs().max()


def config_of(model: Path, **settings: Any) -> PagodaConfig:
    values = {"device": "cpu", "dtype": "float32", "threads": 1, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    return PagodaConfig(model=str(model), **{**values, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int8", "dtype": "float16"}, "dtype=float16: quantized models run in bfloat16 or float32"),
        ({"quantization": "int8", "device": "cuda"}, "int8 runs on a CPU only"),
        ({"quantization": "gptq"}, "quantization=gptq: the checkpoint is not quantized"),
    ],
)
def test_what_cannot_run_is_refused(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.execution.worker.choose_gpu_kernels", lambda: None)
    model = demo_checkpoint()
    with pytest.raises(ConfigError, match=message):
        Worker(config_of(model, **settings), ModelConfig.from_directory(model)).load()
