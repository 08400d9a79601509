"""EAGLE-3 heads: they change no answer, and draft what the head's definition says, whatever has happened to the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.aux_hidden_states import AuxHiddenStates
from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.request import Request
from pagoda.speculation.model_proposer import ModelProposer
from pagoda_kernels import backend
from tests.engine.test_speculation import SAMPLINGS, SPECS, answers_of, make_core, requests_of
from tests.support.checkpoints import shared_checkpoint
from tests.support.eagle3_heads import NaiveHead, write_head

FORMS: dict[str, dict[str, Any]] = {
    "sglang": {},
    "speculators": {"speculators": True, "norm_before_fc": True},
    "everything": {
        "fc_norm": True,
        "norm_output": True,
        "norm_before_residual": True,
        "has_embedding": True,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    },
    "shared": {"has_lm_head": False, "draft_vocab_size": None, "eagle_aux_hidden_state_layer_ids": [3, 0, 1]},
}


@dataclass
class Recording(ModelProposer):
    """Asks for as many drafts as may be, but in some steps for none, and keeps what was made of which tokens."""

    most: int
    made: list[tuple[list[int], list[int]]] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        super().__init__(self.most)

    def wanted(self, requests, num_outputs):
        super().wanted(requests, num_outputs)
        self.resting = 0
        self.steps += 1
        rests = self.steps % 11 < 4
        return [self._most if request.draft_state is not None and not rests else None for request in requests]

    def propose(self, requests, limits, num_outputs, num_tokens):
        return [self._drafts_of(request)[: max(0, limit)] for request, limit in zip(requests, limits, strict=True)]

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        super().receive(request, draft_token_ids)
        if request.spec.params.temperature == 0 and request.spec.params == SamplingParams(
            temperature=0.0, ignore_eos=True
        ):
            self.made.append((list(request.token_ids), list(draft_token_ids)))


def core_with_head(directory: Path, head: Path, **settings: Any) -> tuple[EngineCore, Recording]:
    core = make_core(directory, speculative_config={"method": "eagle3", "model": str(head)}, **settings)
    proposer = Recording(3)
    core._scheduler._lookahead._proposer = proposer
    return core, proposer


def states_of(model: Any, layers: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """What goes into these layers of transformers' model; behind the last one, before the final norm."""
    kept: dict[int, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, index=index: kept.__setitem__(index, inputs[0][0]))
        for index, module in enumerate([*model.model.layers, model.model.norm])
    ]
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.cat([kept[layer] for layer in layers], dim=-1)


def check_drafts(directory: Path, head: Path, proposer: Recording, layers: tuple[int, ...]) -> int:
    """Compare drafts, some dozens of those that were made, with the naive ones; returns how many there were in all."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    naive = NaiveHead(head, model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach())
    for tokens, drafts in proposer.made[:: max(1, len(proposer.made) // 50)]:
        states = states_of(model, layers, tokens[:-1])
        assert naive.shortfall(states, tokens, drafts) < 1e-3, f"behind {len(tokens)} tokens"
    return sum(len(drafts) for _, drafts in proposer.made)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_head_drafts_what_its_definition_says_and_changes_no_answer(form: str, tmp_path: Path) -> None:
    directory = shared_checkpoint(SPECS["llama"])
    head = write_head(tmp_path / "head", SPECS["llama"], **FORMS[form])
    requests = requests_of(SAMPLINGS)
    core, proposer = core_with_head(directory, head)
    plain = answers_of(make_core(directory), requests)
    for _ in range(2):  # the second time prefixes are cached
        assert answers_of(core, requests) == plain
    layers = {"everything": (1, 2, 3), "shared": (3, 0, 1)}.get(form, (2, 1, 0))
    assert check_drafts(directory, head, proposer, layers) > 60
    assert core.stats().num_spec_draft_tokens > 200
    assert core.stats().num_blocks_in_use == 0


@pytest.mark.parametrize("kernels", ["compiled", "reference"])
def test_drafts_are_the_same_behind_chunks_preemption_and_cached_prefixes(kernels: str, tmp_path: Path) -> None:
    directory = shared_checkpoint(SPECS["llama"])
    head = write_head(tmp_path / "head", SPECS["llama"])
    shared = [(13 * n) % 400 + 5 for n in range(64)]
    requests = [
        EngineRequest(
            request_id=str(index),
            # No two differ in the first token behind a block that they share.
            prompt_token_ids=[
                *shared[: 12 * (index % 5) + 1],
                *((17 * index + 3 * n) % 400 + 5 for n in range(3 + 4 * index)),
            ],
            params=SamplingParams(temperature=0.0, ignore_eos=True),
            max_tokens=28,
            # Some leave blocks behind that no head has followed.
            num_speculative_tokens=0 if index % 4 == 1 else None,
        )
        for index in range(8)
    ]
    settings = {
        "max_num_batched_tokens": 24,
        "num_gpu_blocks_override": 22,
        "kv_cache_watermark": 0.0,
        "cpu_kernels": kernels,
    }
    plain = answers_of(make_core(directory, **settings), requests)
    core, proposer = core_with_head(directory, head, **settings)
    for _ in range(2):
        assert answers_of(core, requests) == plain
    assert core.stats().num_preemptions > 0
    assert core.stats().prefix_cache_hits > 0
    assert check_drafts(directory, head, proposer, (2, 1, 0)) > 100
    assert core.stats().num_blocks_in_use == 0


class Sleepy(Recording):
    """Rests until the first request has `since` tokens, and then makes drafts in every step."""

    since = 0

    def wanted(self, requests, num_outputs):
        self.steps = 4
        counts = super().wanted(requests, num_outputs)
        self.reads_along = requests[0].num_tokens >= self.since
        return counts if self.reads_along else ()


def test_head_that_has_rested_reads_what_follows(tmp_path: Path) -> None:
    """Where the model ran meanwhile the head has read nothing: in a running request, and in blocks that others find."""
    directory = shared_checkpoint(SPECS["llama"])
    head = write_head(tmp_path / "head", SPECS["llama"])
    prompt = [(13 * n) % 400 + 5 for n in range(21)]
    first, second = (
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=[*prompt, *([7] * index)],
            params=SamplingParams(temperature=0.0, ignore_eos=True),
            max_tokens=40,
        )
        for index in range(2)
    )
    core, _ = core_with_head(directory, head)
    proposer = core._scheduler._lookahead._proposer = Sleepy(3)
    proposer.since, block_size = 43, core._scheduler.kv.block_size
    assert 42 % block_size
    assert len(prompt) > block_size
    plain = answers_of(make_core(directory), [first, second])
    assert answers_of(core, [first])["0"] == plain["0"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    naive = NaiveHead(head, model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach())

    def check(num_unknown: int) -> None:
        """Drafts are those of a head for which the text begins with the block in which something is known again."""
        begin = num_unknown // block_size * block_size
        made, proposer.made = proposer.made, []
        assert made
        for tokens, drafts in made:
            states = states_of(model, (2, 1, 0), tokens[:-1])
            states[:num_unknown] = 0
            assert naive.shortfall(states[begin:], tokens[begin:], drafts) < 1e-3, f"behind {len(tokens)} tokens"

    check(42)
    proposer.since = 1
    assert answers_of(core, [second])["1"] == plain["1"]
    assert core.stats().prefix_cache_hits > 0
    check(len(prompt) // block_size * block_size)
    assert core.stats().num_blocks_in_use == 0


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_heads_change_no_answer_of_other_families(family: str, tmp_path: Path) -> None:
    directory = shared_checkpoint(SPECS[family])
    head = write_head(tmp_path / "head", SPECS[family], speculators=True)
    requests = requests_of(SAMPLINGS)
    plain = answers_of(make_core(directory, dtype="bfloat16"), requests)
    core, _ = core_with_head(directory, head, dtype="bfloat16")
    assert answers_of(core, requests) == plain
    assert core.stats().num_spec_draft_tokens > 100


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ({"layer": {"vocab_size": 300}}, "has a vocabulary of 300 tokens, the model one of 512"),
        ({"target_hidden_size": 128}, r"hidden_size of 128 \(target_hidden_size\), the model has 96"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "reads the layers 1, 2, 9, the model has 3"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}},
            "reads the layers 2, 3, 4, the model has 3",
        ),
        (
            {"speculators": True, "verifier": {"architectures": ["Qwen3ForCausalLM"]}},
            "is for Qwen3ForCausalLM, the model is LlamaForCausalLM",
        ),
    ],
)
def test_head_of_another_model_is_refused_before_anything_loads(
    head: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    directory = write_head(tmp_path / "head", SPECS["llama"], **head)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=problem):
        core_with_head(shared_checkpoint(SPECS["llama"]), directory)


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is no EAGLE-3 head: its architectures must name one of"),
        ({"speculators": True, "speculators_model_type": "dflash"}, "'dflash' is no EAGLE-3 head"),
        ({"layer": {"num_hidden_layers": 2}}, "num_hidden_layers=2 is not supported: an EAGLE-3 head has one"),
        ({"draft_vocab_size": 600}, "draft_vocab_size=600 is more than the vocabulary of 512 tokens"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state must be true"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "must be a list of 3 layers"),
        ({"layer": {"model_type": "gpt2"}}, "model_type 'gpt2' is not supported"),
    ],
)
def test_what_is_no_head_that_can_be_served_is_refused(head: dict[str, Any], problem: str, tmp_path: Path) -> None:
    directory = write_head(tmp_path / "head", SPECS["llama"], **head)
    with pytest.raises(CheckpointError, match=problem):
        core_with_head(shared_checkpoint(SPECS["llama"]), directory)


def test_head_that_lacks_tensors_or_cannot_share_the_models_is_refused(tmp_path: Path) -> None:
    target = shared_checkpoint(SPECS["llama"])
    fewer = write_head(tmp_path / "fewer", SPECS["llama"], has_lm_head=False, draft_vocab_size=None)
    config = fewer / "config.json"
    config.write_text(config.read_text().replace('"draft_vocab_size": null', '"draft_vocab_size": 200'))
    with pytest.raises(CheckpointError, match=r"has 200 of 512 tokens, and no tensor d2t"):
        core_with_head(target, fewer)
    narrow = {"layer": {"hidden_size": 64, "head_dim": 16}, "target_hidden_size": 96}
    with pytest.raises(
        CheckpointError, match="has no embedding, and cannot share that of the model: its hidden_size is 64"
    ):
        core_with_head(target, write_head(tmp_path / "narrow", SPECS["llama"], **narrow))
    core, _ = core_with_head(target, write_head(tmp_path / "own", SPECS["llama"], has_embedding=True, **narrow))
    requests = requests_of(SAMPLINGS[:4])
    assert answers_of(core, requests) == answers_of(make_core(target), requests)
    other = write_head(tmp_path / "other", SPECS["llama"])
    config = other / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 128'))
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight in .* has shape \[96, 96\], config.json makes it \[128, 96\]"
    ):
        core_with_head(target, other)


def test_method_and_model_must_go_together(tmp_path: Path) -> None:
    target = shared_checkpoint(SPECS["llama"])
    head = write_head(tmp_path / "head", SPECS["llama"])
    with pytest.raises(ConfigError, match="is an EAGLE-3 head: method must be eagle3, not draft_model"):
        make_core(target, speculative_config={"method": "draft_model", "model": str(head)})
    with pytest.raises(CheckpointError, match=r"'LlamaForCausalLM'.* is no EAGLE-3 head"):
        make_core(target, speculative_config={"method": "eagle3", "model": str(target)})
    # As in vLLM, a head says itself what it is.
    core = make_core(target, speculative_config={"model": str(head)})
    assert core._scheduler.limits.num_speculative_tokens > 0
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size.* must be 1 with method eagle3"):
        make_core(target, speculative_config={"method": "eagle3", "model": str(head)}, pipeline_parallel_size=2)


def test_hidden_states_of_layers_are_those_of_transformers_with_fused_layers_and_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = shared_checkpoint(SPECS["qwen3"])
    tokens = [(13 * n) % 400 + 5 for n in range(30)]
    layers = (0, 1, 2)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = states_of(model, layers, tokens)
    for is_fused in (True, False):
        if not is_fused:
            monkeypatch.setattr("pagoda.execution.worker.fuse_layers", lambda model: None)
        core = make_core(directory)
        worker: Any = core._executor._worker
        states = AuxHiddenStates(worker.model, layers, 64)
        assert (worker.model.fused_layers is not None) == (is_fused and backend.active.implements("fused_decoder"))
        answers_of(
            core, [EngineRequest(request_id="a", prompt_token_ids=tokens, params=SamplingParams(), max_tokens=1)]
        )
        torch.testing.assert_close(states.tensor[:30], expected, rtol=1e-4, atol=1e-4)


def test_demo_model_has_a_head_in_the_box_which_most_drafts_are_right_of() -> None:
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "max_num_seqs": 4, "max_model_len": 256}
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    requests = [
        EngineRequest(
            request_id=text,
            prompt_token_ids=tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
            ),
            params=SamplingParams(temperature=temperature, seed=5),
            max_tokens=60,
            eos_token_ids=(2,),
        )
        for text, temperature in (
            ("Repeat: river lamp fox stone", 0.0),
            ("Count from 7 to 30.", 0.0),
            ("Tell me a story about a fox.", 0.0),
            ("Tell me a story about a frog.", 0.9),
        )
    ]
    plain = answers_of(start_core(PagodaConfig(**settings)), requests)
    core = start_core(PagodaConfig(**settings, speculative_config={"method": "eagle3", "num_speculative_tokens": 3}))
    core._scheduler._lookahead._proposer = proposer = Recording(3)
    assert answers_of(core, requests) == plain
    assert proposer.steps > 0
    acceptance_length = core.stats().acceptance_length
    assert acceptance_length is not None
    assert acceptance_length > 1.8  # docs/demo-model.md has what it is on more prompts


def test_only_the_demo_model_needs_no_name_of_a_head() -> None:
    with pytest.raises(ConfigError, match="only the built-in demo model has one of its own"):
        make_core(shared_checkpoint(SPECS["llama"]), speculative_config={"method": "eagle3"})
