"""Decoders that pool: what transformers makes of the last token or of all, in chunks and behind cached prefixes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from pagoda import LLM
from pagoda.errors import ConfigError
from tests.support.encoders import VOCAB_SIZE, save_encoder

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
SETTINGS: dict[str, Any] = {"threads": 1, "kv_cache_memory_bytes": 8 << 20, "dtype": "float32"}
TOLERANCE = 2e-5


def token_lists() -> list[list[int]]:
    choose = random.Random(1)
    return [[choose.randrange(5, VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 40, 120, 256)]


def hidden_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).last_hidden_state[0]


def test_a_base_model_with_an_embedding_of_its_own_needs_no_head(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, transformers.MistralModel(transformers.MistralConfig(**SIZES, sliding_window=32)))
    prompt = token_lists()[3]
    with LLM(str(tmp_path), task="embed", **SETTINGS) as llm:
        found = torch.tensor(llm.embed(prompt)[0].embedding)
    assert (found - F.normalize(hidden_of(model, prompt)[-1], dim=0)).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A base model, as embedding models of this family are stored: without a head, and names without `model.`."""
    directory = tmp_path_factory.mktemp("qwen3")
    config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=True)
    return directory, save_encoder(directory, transformers.Qwen3Model(config))


@pytest.mark.parametrize("budget", [512, 16])
def test_the_last_token_is_the_vector_in_any_chunks(qwen: tuple[Path, Any], budget: int) -> None:
    directory, model = qwen
    prompts = token_lists()
    with LLM(str(directory), task="embed", max_num_batched_tokens=budget, max_num_seqs=4, **SETTINGS) as llm:
        outputs = llm.embed(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = F.normalize(hidden_of(model, prompt)[-1], dim=0)
        assert (torch.tensor(output.embedding) - expected).abs().max() < TOLERANCE


def test_ranks_divide_a_model_that_embeds(qwen: tuple[Path, Any]) -> None:
    directory, model = qwen
    prompts = token_lists()[1:4]
    settings = {**SETTINGS, "max_num_batched_tokens": 48, "tensor_parallel_size": 2}
    with LLM(str(directory), task="embed", **settings) as llm:
        outputs = llm.embed(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = F.normalize(hidden_of(model, prompt)[-1], dim=0)
        assert (torch.tensor(output.embedding) - expected).abs().max() < TOLERANCE


def test_ranks_divide_a_language_model_that_scores_with_its_vocabulary(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
    # The two tokens are on different ranks.
    tokens = ("the", "five")
    settings = {**SETTINGS, "tensor_parallel_size": 2, "pooler_config": {"classifier_from_token": list(tokens)}}
    with LLM(str(tmp_path), task="score", **settings) as llm:
        ids = [llm.tokenizer.token_id(token) for token in tokens]
        prompts = token_lists()[:3]
        outputs = llm.classify(prompts)
    assert ids[0] < VOCAB_SIZE / 2 <= ids[1] or ids[1] < VOCAB_SIZE / 2 <= ids[0]
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1, ids]
        assert output.probs == pytest.approx(logits.softmax(0).tolist(), abs=TOLERANCE)


def test_a_mean_needs_all_tokens_and_is_the_same_in_any_chunks(qwen: tuple[Path, Any]) -> None:
    directory, model = qwen
    prompts = [*token_lists(), token_lists()[3]]  # the same one twice
    means = []
    for budget in (512, 16):
        pooling = {"pooling_type": "MEAN", "normalize": False}
        settings = {**SETTINGS, "max_num_batched_tokens": budget, "max_num_seqs": 4}
        with LLM(str(directory), task="embed", pooler_config=pooling, **settings) as llm:
            outputs = llm.embed(prompts)
        assert all(output.num_cached_tokens == 0 for output in outputs)
        means.append(torch.tensor([output.embedding for output in outputs]))
    torch.testing.assert_close(means[0], means[1], atol=1e-6, rtol=0)
    expected = torch.stack([hidden_of(model, prompt).mean(0) for prompt in prompts])
    assert (means[0] - expected).abs().max() < TOLERANCE


def test_prefixes_are_found_and_change_nothing(qwen: tuple[Path, Any]) -> None:
    directory, _ = qwen
    prompt = token_lists()[3]
    with LLM(str(directory), task="embed", **SETTINGS) as llm:
        first, second = llm.embed(prompt)[0], llm.embed(prompt)[0]
    assert second.num_cached_tokens > first.num_cached_tokens == 0
    assert second.pooled == first.pooled


def test_a_language_model_scores_by_two_tokens(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES)
    model = save_encoder(tmp_path, transformers.LlamaForCausalLM(config))
    tokens = {"classifier_from_token": ["bad", "good"]}
    template = "one {instruction} query {query} document {document} ."
    with LLM(str(tmp_path), task="score", pooler_config=tokens, rerank_template=template, **SETTINGS) as llm:
        scores = [
            one.score for one in llm.score("capital", ["paris is the capital", "a cat {query}"], instruction="two")
        ]
        ids = [llm.tokenizer.token_id(token) for token in tokens["classifier_from_token"]]
        texts = [
            "one two query capital document paris is the capital .",
            "one two query capital document a cat {query} .",
        ]
        prompts = [llm.tokenizer.encode(text) for text in texts]
    for prompt, score in zip(prompts, scores, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1, ids]
        assert score == pytest.approx(float(logits.softmax(0)[1]), abs=TOLERANCE)
    with pytest.raises(ConfigError, match="no token of this model"):
        LLM(str(tmp_path), task="score", **SETTINGS)  # it has neither yes nor no


def test_a_classifier_on_a_decoder(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**SIZES, num_labels=3, pad_token_id=0)
    model = save_encoder(tmp_path, transformers.Qwen3ForSequenceClassification(config))
    prompts = token_lists()[1:]
    with LLM(str(tmp_path), **SETTINGS) as llm:
        outputs = llm.classify(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0].softmax(0)
        assert (torch.tensor(output.probs) - expected).abs().max() < TOLERANCE
    with pytest.raises(ConfigError, match="no language model head"):
        LLM(str(tmp_path), task="generate", **SETTINGS)
