from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pagoda.errors import CheckpointError, InvalidRequestError
from pagoda.text.tokenizer import Tokenizer
from tests.support.tokenizers import CORPUS, KINDS, save_tokenizer

TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="aeiou thns .,'▁\n\t塔é🙂\u200d\u0301<|>s/", max_size=60),
    st.lists(
        st.sampled_from([*CORPUS[0].split(), " ", "  ", "<|im_end|>", "<think>", "<s>", "</s>", "塔 🙂", "[SEP]"])
    ).map(" ".join),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Our tokenizer and transformers', of every kind."""
    directory = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for kind in KINDS:
        path = save_tokenizer(directory / kind, kind)
        made[kind] = (Tokenizer.from_directory(path), AutoTokenizer.from_pretrained(path))
    return made


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_encodes_and_decodes_as_transformers_does(pairs, kind, data):
    ours, theirs = pairs[kind]
    text = data.draw(TEXTS)
    for add_special_tokens in (True, False):
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
    some_ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(some_ids, skip_special_tokens=skip) == theirs.decode(some_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_knows_the_same_special_tokens_and_vocabulary_as_transformers(pairs, kind):
    ours, theirs = pairs[kind]
    assert ours.special_tokens == dict(theirs.special_tokens_map)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.special_token_ids >= set(theirs.all_special_ids)


CONFIGS = {
    "tokens that only the configuration has": {
        "pad_token": "<|pad|>",
        "extra_special_tokens": ["<|a|>", "<|im_end|>"],
        "additional_special_tokens": None,
    },
    "named extra tokens": {"image_token": "<|image|>", "extra_special_tokens": {"audio_token": "<|audio|>"}},
    "tokens as objects": {
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "normalized": False},
        "pad_token": {"__type": "AddedToken", "content": "<|pad|>", "rstrip": True},
    },
    "an added_tokens_decoder that changes and adds": {
        "added_tokens_decoder": {
            "450": {"content": "<|endoftext|>", "special": True, "lstrip": True, "normalized": False},
            "456": {"content": "<|new|>", "special": False, "normalized": False},
        },
    },
    "bos and eos flags, which tokenizer.json overrules": {"add_bos_token": True, "bos_token": "<|im_start|>"},
    "special tokens in text are no tokens": {"split_special_tokens": True},
    "the class that transformers gives Qwen": {"tokenizer_class": "Qwen2Tokenizer", "unk_token": "<|endoftext|>"},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_reads_tokenizer_config_as_transformers_does(tmp_path, changes):
    path = save_tokenizer(tmp_path, "byte_level_bpe", **changes)
    ours, theirs = Tokenizer.from_directory(path), AutoTokenizer.from_pretrained(path)
    contents = [token.content for token in theirs.added_tokens_decoder.values()]
    text = "a pagoda" + " and ".join([*contents, *reversed(contents)]) + " 塔"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == dict(theirs.special_tokens_map)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", ["byte_level_bpe", "byte_fallback_bpe"])
@pytest.mark.parametrize(
    "tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast", None]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_add_prefix_space_is_obeyed_where_transformers_does(
    tmp_path, kind, tokenizer_class, model_type, add_prefix_space
):
    if kind == "byte_fallback_bpe" and (tokenizer_class == "GPT2TokenizerFast" or model_type != "llama"):
        pytest.skip("transformers makes another tokenizer of it, with ByteLevel")
    save_tokenizer(tmp_path, kind)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": tokenizer_class, "add_prefix_space": add_prefix_space}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Once upon", " Once  upon", "", "one<|im_end|>two"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_reads_the_older_files_as_transformers_does(tmp_path):
    path = save_tokenizer(tmp_path, "byte_level_bpe", eos_token=None, additional_special_tokens=None)
    (path / "special_tokens_map.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False},
                "additional_special_tokens": ["<|im_start|>"],
            }
        )
    )
    (path / "added_tokens.json").write_text(json.dumps({"<plain>": 455}))
    ours, theirs = Tokenizer.from_directory(path), AutoTokenizer.from_pretrained(path)
    text = "<|im_start|>x<plain>y<|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_checkpoint_without_tokenizer_json_goes_through_transformers(tmp_path):
    directory = save_tokenizer(tmp_path, "byte_level_bpe")
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"})
    )
    ours, theirs = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    text = "Two pagodas 塔, isn't it?<|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == "Two pagodas 塔, isn't it?"
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.has_chat_template


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="transformers converts it")
def test_a_directory_with_sentencepiece_only_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x07\n\x05<unk>")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    program = (
        "import sys; from pagoda.errors import CheckpointError; from pagoda.text.tokenizer import Tokenizer\n"
        f"try: Tokenizer.from_directory({str(tmp_path)!r})\n"
        "except CheckpointError as error: print('transformers' in sys.modules, error)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("False ")  # which would take seconds
    assert "no tokenizer.json" in printed
    assert "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)" in printed


def test_loading_a_tokenizer_imports_no_torch(tmp_path):
    save_tokenizer(tmp_path, "byte_fallback_bpe")
    program = (
        "import sys; from pagoda.text.tokenizer import Tokenizer; import pagoda.text.generation, pagoda.text.pool\n"
        f"Tokenizer.from_directory({str(tmp_path)!r}).encode('x')\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'msgspec') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[1]"}, "tokenizer_config.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": {"id": 3}}'}, "a token must be"),
    ],
)
def test_broken_checkpoint_is_refused_with_the_file_that_is_wrong(tmp_path, files, named):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.from_directory(tmp_path)


def test_missing_directory_is_refused():
    with pytest.raises(CheckpointError, match="not a directory"):
        Tokenizer.from_directory(Path("/nowhere/at/all"))


def test_text_with_a_lone_surrogate_is_the_clients_mistake(pairs):
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        pairs["byte_level_bpe"][0].encode("half a pair: \ud83d")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word_piece"])
def test_bytes_of_tokens_join_to_the_text(pairs, kind):
    ours, _ = pairs[kind]
    text = "Two spaces  and 塔 🙂 caf"
    ids = ours.encode(text, add_special_tokens=False)
    joined = b"".join(ours.token_bytes(token_id) for token_id in ids).decode()
    assert joined.lstrip() == ours.decode(ids)
    assert ours.token_bytes(ours.vocab_size + 5) == b""


def test_what_is_loaded_already_is_not_loaded_again(tmp_path):
    first = Tokenizer.from_directory(save_tokenizer(tmp_path / "a", "byte_level_bpe"))
    assert Tokenizer.from_directory(save_tokenizer(tmp_path / "b", "byte_level_bpe")) is first
    other = Tokenizer.from_directory(save_tokenizer(tmp_path / "b", "byte_level_bpe", chat_template="{{ messages }}"))
    assert other is not first
    assert other.chat_templates == {"default": "{{ messages }}"}
