"""MTP layers of the model's own checkpoint: they change no answer, and draft what their definition says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file

from pagoda.config.speculation import SpeculativeConfig
from pagoda.errors import CheckpointError, ConfigError
from tests.engine.test_eagle3 import Recording
from tests.engine.test_speculation import SAMPLINGS, SPECS, answers_of, make_core, requests_of
from tests.support.checkpoints import shared_checkpoint
from tests.support.model_families import family_config
from tests.support.model_harness import save_random_checkpoint

NUM_LAYERS = 2


class Reference:
    """A model of random weights whose last layer is for multi-token prediction, by transformers' layers."""

    def __init__(self, family: str, directory: Path) -> None:
        config = family_config(family, num_hidden_layers=NUM_LAYERS + 1, vocab_size=512)
        self.model = save_random_checkpoint(config, directory)
        self.eps = config.rms_norm_eps
        base = self.model.model
        self.layers, self.block, self.norm = base.layers[:NUM_LAYERS], base.layers[NUM_LAYERS:], base.norm
        random, hidden = torch.Generator().manual_seed(1), config.hidden_size
        self.own = {
            "enorm": 1 + 0.3 * torch.randn(hidden, generator=random),
            "hnorm": 1 + 0.3 * torch.randn(hidden, generator=random),
            "shared_head.norm": 1 + 0.3 * torch.randn(hidden, generator=random),
            "eh_proj": torch.randn(hidden, 2 * hidden, generator=random) * hidden**-0.5,
        }
        self._write(directory)

    def _write(self, directory: Path) -> None:
        """Let the checkpoint say what its last layer is."""
        values = json.loads((directory / "config.json").read_text())
        values |= {"num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": 1}
        (directory / "config.json").write_text(json.dumps(values))
        tensors = load_file(directory / "model.safetensors")
        prefix = f"model.layers.{NUM_LAYERS}."
        tensors |= {f"{prefix}{name}.weight": tensor for name, tensor in self.own.items()}
        tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    @torch.inference_mode()
    def shortfall(self, tokens: Sequence[int], drafts: Sequence[int]) -> float:
        """By how much the logits of `drafts`, one after the other, fall short of the best; 0 for greedy ones."""
        known, shortfall = list(tokens), 0.0
        states = self._run(self.layers, self.norm, input_ids=torch.tensor([known[:-1]]))
        for draft in drafts:
            embedded = self.model.model.embed_tokens(torch.tensor(known[1:]))
            joined = torch.cat((self._normed(embedded, "enorm"), self._normed(states, "hnorm")), dim=-1)
            inputs = functional.linear(joined, self.own["eh_proj"])
            output = self._run(self.block, torch.nn.Identity(), inputs_embeds=inputs[None])
            logits = self.model.lm_head(self._normed(output[-1], "shared_head.norm"))
            shortfall = max(shortfall, float(logits.max() - logits[draft]))
            known.append(draft)
            states = torch.cat((states, output[-1:]))
        return shortfall

    def _run(self, layers: Any, norm: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        base = self.model.model
        base.layers, base.norm = layers, norm
        hidden: torch.Tensor = base(**inputs, use_cache=False).last_hidden_state[0]
        return hidden

    def _normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(hidden, hidden.shape[-1:], self.own[name], self.eps)


@pytest.mark.parametrize("family", ["deepseek-v3", "glm4-moe"])
def test_layer_drafts_what_its_definition_says_and_changes_no_answer(family: str, tmp_path: Path) -> None:
    reference = Reference(family, tmp_path / "model")
    settings: dict[str, Any] = {"num_gpu_blocks_override": 60, "kv_cache_watermark": 0.0}
    requests = requests_of(SAMPLINGS)
    plain = answers_of(make_core(tmp_path / "model", **settings), requests)
    core = make_core(tmp_path / "model", **settings, speculative_config={"method": "mtp", "num_speculative_tokens": 3})
    proposer = core._scheduler._lookahead._proposer = Recording(3)
    for _ in range(2):  # the second time prefixes are cached
        assert answers_of(core, requests) == plain
    assert core.stats().num_spec_draft_tokens > 200
    assert core.stats().prefix_cache_hits > 0
    assert core.stats().num_blocks_in_use == 0
    assert len(proposer.made) > 20
    for tokens, drafts in proposer.made[:: max(1, len(proposer.made) // 25)]:
        assert reference.shortfall(tokens, drafts) < 2e-3, f"behind {len(tokens)} tokens"


@pytest.mark.parametrize("method", ["mtp", "deepseek_mtp", "glm4_moe_mtp"])
def test_names_of_vllm_mean_the_same(method: str) -> None:
    config = SpeculativeConfig.parse({"method": method, "num_speculative_tokens": 2})
    assert (config.method, config.num_speculative_tokens) == ("mtp", 2)


def test_checkpoint_without_such_a_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no MTP layer that is supported"):
        make_core(shared_checkpoint(SPECS["llama"]), speculative_config={"method": "mtp"})
    config = family_config("glm4-moe", vocab_size=512)
    save_random_checkpoint(config, tmp_path / "model")
    with pytest.raises(ConfigError, match="num_nextn_predict_layers says that there is no MTP layer"):
        make_core(tmp_path / "model", speculative_config={"method": "mtp"})
    values = json.loads((tmp_path / "model" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tensors of the model are missing: model\.layers\.0\.eh_proj"):
        make_core(tmp_path / "model", speculative_config={"method": "mtp"})
