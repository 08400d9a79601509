"""Encoders in the engine give what transformers gives in float32, alone and in any batch, and what modules make of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from pagoda import LLM
from pagoda.errors import CheckpointError, ConfigError, ContextLengthError, InvalidRequestError, NotSupportedError
from pagoda.pooling.params import PoolingParams
from pagoda_kernels import backend
from tests.support.encoders import SIZES, VOCAB_SIZE, WORDS, add_modules, save_bert, save_encoder

TOLERANCE = 1e-5

Made = Callable[[], Any]
FAMILIES: dict[str, Made] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "bert-relu": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="relu")),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(**SIZES, pad_token_id=0, type_vocab_size=1)
    ),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=VOCAB_SIZE, dim=64, n_layers=3, n_heads=4, hidden_dim=96, max_position_embeddings=160
        )
    ),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES)),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(**{**SIZES, "num_hidden_layers": 5}, local_attention=16, pad_token_id=0)
    ),
    "modernbert-biases": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **SIZES, local_attention=32, pad_token_id=0, norm_bias=True, attention_bias=True, mlp_bias=True
        )
    ),
    "nomic": lambda: transformers.NomicBertModel(transformers.NomicBertConfig(**SIZES)),
}


def token_lists(seed: int = 0) -> list[list[int]]:
    """Prompts of uneven lengths, the shortest and the longest that a model of `SIZES` takes among them."""
    choose = random.Random(seed)
    return [[choose.randrange(5, VOCAB_SIZE) for _ in range(length)] for length in (1, 2, 15, 33, 64, 97, 150)]


def hidden_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([token_ids])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, save_encoder(directory, FAMILIES[request.param]())


def test_hidden_states_are_those_of_transformers_and_independent_of_the_batch(family: tuple[Path, Any]) -> None:
    directory, model = family
    prompts = token_lists()
    with LLM(str(directory), threads=1) as llm:
        assert llm._pooler is not None
        together = llm._pooler.encode(prompts, PoolingParams("token_embed"))
        alone = llm._pooler.encode(prompts[4], PoolingParams("token_embed"))
    for prompt, output in zip(prompts, together, strict=True):
        assert output.pooled is not None
        found = torch.tensor(output.pooled.rows())
        assert (found - hidden_of(model, prompt)).abs().max() < TOLERANCE
    assert alone[0].pooled == together[4].pooled


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("plain-bert")
    return directory, save_bert(directory)


@pytest.fixture
def copied(bert: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """A copy of the checkpoint, to add files to."""
    for file in bert[0].iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path, bert[1]


def pooled(hidden: torch.Tensor, mode: str) -> torch.Tensor:
    count = len(hidden)
    return {
        "cls_token": lambda: hidden[0],
        "lasttoken": lambda: hidden[-1],
        "mean_tokens": lambda: hidden.mean(0),
        "max_tokens": lambda: hidden.amax(0),
        "mean_sqrt_len_tokens": lambda: hidden.sum(0) / count**0.5,
        "weightedmean_tokens": lambda: (
            (hidden * torch.arange(1, count + 1)[:, None]).sum(0) / (count * (count + 1) / 2)
        ),
    }[mode]()


@pytest.mark.parametrize(
    ("modes", "dense", "normalize"),
    [
        (("cls_token",), None, True),
        (("mean_tokens",), None, False),
        (("lasttoken",), 24, True),
        (("mean_tokens", "max_tokens"), 16, False),
        (("weightedmean_tokens",), None, True),
        (("mean_sqrt_len_tokens",), None, False),
    ],
)
def test_modules_of_sentence_transformers(
    copied: tuple[Path, Any], modes: tuple[str, ...], dense: int | None, normalize: bool
) -> None:
    directory, model = copied
    add_modules(directory, *modes, dense=dense, normalize=normalize)
    prompts = token_lists(1)
    with LLM(str(directory), threads=1) as llm:
        outputs = llm.embed(prompts)
        alone = llm.embed(prompts[2])[0]
    for prompt, output in zip(prompts, outputs, strict=True):
        # Several stand in the order in which Sentence Transformers asks for them, whatever that of the file is.
        order = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
        expected = torch.cat([pooled(hidden_of(model, prompt), mode) for mode in order if mode in modes])
        if dense is not None:
            from safetensors.torch import load_file

            tensors = load_file(directory / "2_Dense/model.safetensors")
            expected = torch.tanh(F.linear(expected, tensors["linear.weight"], tensors["linear.bias"]))
        if normalize:
            expected = F.normalize(expected, dim=0)
        assert (torch.tensor(output.embedding) - expected).abs().max() < TOLERANCE * max(1.0, expected.abs().max())
    assert alone.pooled == outputs[2].pooled


def test_dimensions_and_normalize_of_a_request(bert: tuple[Path, Any]) -> None:
    directory, _ = bert
    with LLM(str(directory), threads=1) as llm:
        whole = torch.tensor(llm.embed("the cat sat")[0].embedding)
        cut = torch.tensor(llm.embed("the cat sat", dimensions=10)[0].embedding)
        unit = torch.tensor(llm.embed("the cat sat", normalize=True)[0].embedding)
        for dimensions in (0, 65):
            with pytest.raises(InvalidRequestError, match="from 1 to 64"):
                llm.embed("the cat sat", dimensions=dimensions)
    torch.testing.assert_close(cut, F.normalize(whole[:10], dim=0))
    torch.testing.assert_close(unit, F.normalize(whole, dim=0))


def test_too_long_a_text_is_refused_or_cut(bert: tuple[Path, Any]) -> None:
    directory, _ = bert
    text = " ".join(random.Random(3).choice(WORDS) for _ in range(400))
    with LLM(str(directory), threads=1) as llm:
        with pytest.raises(ContextLengthError, match="402 tokens"):
            llm.embed(text)
        output = llm.embed(text, truncate_prompt_tokens=-1)[0]
        short = llm.embed(text, truncate_prompt_tokens=12)[0]
        words = llm.embed(" ".join(text.split()[:10]))[0]
        assert len(llm.embed([7] * 160)[0].embedding) == 64  # as long as the model takes
    assert len(output.prompt_token_ids) == 160
    assert output.prompt_token_ids[-1] == 3, "the special token at the end stays"
    assert short.prompt_token_ids == words.prompt_token_ids
    assert short.pooled == words.pooled


def test_max_seq_length_of_the_checkpoint_is_the_longest_text(copied: tuple[Path, Any]) -> None:
    directory, _ = copied
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    with LLM(str(directory), threads=1) as llm:
        assert llm.max_model_len == 32
    with LLM(str(directory), threads=1, max_model_len=100) as llm:
        assert llm.max_model_len == 100
    with pytest.raises(ConfigError, match="at most 160"):
        LLM(str(directory), threads=1, max_model_len=161)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_classifiers_read_texts_and_pairs_as_transformers_does(tmp_path: Path, num_labels: int) -> None:
    model = save_bert(tmp_path, num_labels=num_labels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pairs = [("capital of germany", "berlin is the capital"), ("capital of germany", "a cat"), ("a", "b " * 30)]

    def expected(*texts: str) -> torch.Tensor:
        with torch.no_grad():
            encoded = tokenizer(*texts, return_tensors="pt", return_token_type_ids=True)
            return model(**encoded).logits[0]

    with LLM(str(tmp_path), threads=1) as llm:
        outputs = llm.classify(["the cat sat", "war and peace"])
        logits = torch.stack([expected("the cat sat"), expected("war and peace")])
        probabilities = logits.sigmoid() if num_labels == 1 else logits.softmax(1)
        torch.testing.assert_close(torch.tensor([one.probs for one in outputs]), probabilities, atol=TOLERANCE, rtol=0)
        if num_labels == 1:
            scores = [one.score for one in llm.score([pair[0] for pair in pairs], [pair[1] for pair in pairs])]
            torch.testing.assert_close(
                torch.tensor(scores),
                torch.stack([expected(*pair).sigmoid()[0] for pair in pairs]),
                atol=TOLERANCE,
                rtol=0,
            )
        else:
            assert llm.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
            with pytest.raises(NotSupportedError, match="classify"):
                llm.score("a", "b")


@pytest.mark.parametrize(
    "made",
    [
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1, num_labels=1)
        ),
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(
                vocab_size=VOCAB_SIZE,
                dim=64,
                n_layers=2,
                n_heads=4,
                hidden_dim=96,
                max_position_embeddings=160,
                num_labels=3,
            )
        ),
        lambda: transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**SIZES, num_labels=3)),
        lambda: transformers.ModernBertForSequenceClassification(
            transformers.ModernBertConfig(**SIZES, pad_token_id=0, classifier_pooling="mean", num_labels=3)
        ),
    ],
    ids=["roberta", "distilbert", "mpnet", "modernbert"],
)
def test_heads_of_other_families(tmp_path: Path, made: Made) -> None:
    model = save_encoder(tmp_path, made(), has_types=False)
    prompts = token_lists(2)[1:]
    with LLM(str(tmp_path), threads=1) as llm:
        outputs = llm.classify(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        expected = logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
        assert (torch.tensor(output.probs) - expected).abs().max() < TOLERANCE


def test_every_token_is_classified(tmp_path: Path) -> None:
    model = save_encoder(
        tmp_path, transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, num_labels=5))
    )
    prompt = token_lists()[3]
    with LLM(str(tmp_path), threads=1) as llm:
        assert llm._pooler is not None
        output = llm._pooler.encode(prompt, PoolingParams("token_classify"))[0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0].softmax(1)
    assert output.pooled is not None
    assert output.pooled.shape == (33, 5)
    torch.testing.assert_close(torch.tensor(output.pooled.rows()), expected, atol=TOLERANCE, rtol=0)


def test_two_vectors_are_scored_by_their_cosine(bert: tuple[Path, Any]) -> None:
    with LLM(str(bert[0]), threads=1) as llm:
        vectors = torch.tensor([one.embedding for one in llm.embed(["a cat", "the dog barked", "old house"])])
        scores = [one.score for one in llm.score("a cat", ["the dog barked", "old house"])]
    expected = F.cosine_similarity(vectors[:1], vectors[1:])
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-6, rtol=0)


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    before = backend.active
    yield
    backend.active = before


def test_torchs_own_operations_give_the_same(bert: tuple[Path, Any], reference_kernels: None) -> None:
    prompts = token_lists(4)
    with LLM(str(bert[0]), threads=1) as llm:
        compiled = torch.tensor([one.embedding for one in llm.embed(prompts)])
    with LLM(str(bert[0]), threads=1, cpu_kernels="reference") as llm:
        reference = torch.tensor([one.embedding for one in llm.embed(prompts)])
    torch.testing.assert_close(compiled, reference, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("settings", "least"), [({"dtype": "bfloat16"}, 0.999), ({"quantization": "int8"}, 0.999)])
def test_half_precision_and_int8_stay_close(bert: tuple[Path, Any], settings: dict[str, Any], least: float) -> None:
    prompts = token_lists(5)
    with LLM(str(bert[0]), threads=1) as llm:
        exact = torch.tensor([one.embedding for one in llm.embed(prompts)])
    with LLM(str(bert[0]), threads=1, **settings) as llm:
        rounded = torch.tensor([one.embedding for one in llm.embed(prompts)])
    assert F.cosine_similarity(exact, rounded).min() >= least


def test_what_an_encoder_cannot_do_is_refused_by_name(bert: tuple[Path, Any], copied: tuple[Path, Any]) -> None:
    directory = str(bert[0])
    for settings, words in (
        ({"task": "generate"}, "is an encoder"),
        ({"task": "score"}, "has no classifier"),
        ({"tensor_parallel_size": 2}, "one rank"),
        ({"num_scheduler_steps": 4}, "num_scheduler_steps"),
        ({"max_num_batched_tokens": 64}, "max_model_len is 160"),
        ({"pooler_config": {"pooling_type": "median"}}, "pooling_type"),
        ({"quantization": "int4"}, "int8"),
    ):
        with pytest.raises(ConfigError, match=words):
            LLM(directory, threads=1, **settings)
    with LLM(directory, threads=1) as llm, pytest.raises(NotSupportedError, match="does not generate"):
        llm.generate("the cat")
    add_modules(copied[0], "mean_tokens")
    modules = json.loads((copied[0] / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "", "type": "sentence_transformers.models.LSTM"})
    (copied[0] / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"LSTM.*not supported"):
        LLM(str(copied[0]), threads=1)
