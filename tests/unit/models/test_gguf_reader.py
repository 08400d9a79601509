"""A GGUF file that anyone may have made: a fault is a sentence, soon, in little memory; a sound one is what `gguf` reads."""

from __future__ import annotations

import struct
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.errors import CheckpointError
from pagoda.models.gguf import reader
from pagoda.models.gguf.files import DERIVED, derived_file
from pagoda.models.gguf.reader import GgufArray, read_gguf
from pagoda.models.loading.checkpoint import StoredTensors, stored_tensors
from tests.support.gguf_files import Tensor, float_tensor, gguf_bytes, text, write

LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.block_count": 1,
    "llama.feed_forward_length": 8,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}
SHAPES = {"token_embd.weight": (4, 8), "blk.0.attn_q.weight": (8, 8), "output_norm.weight": (8,)}
TENSORS = {name: float_tensor(np.arange(np.prod(shape)).reshape(shape)) for name, shape in SHAPES.items()}
SOUND = gguf_bytes(LLAMA, TENSORS)
F32 = 0


def read_all(path: Path) -> None:
    """Everything that is read of a file before the model is built, and all tensors."""
    for name in DERIVED:
        derived_file(path, name)
    tensors = stored_tensors([path])
    for name in tensors:
        StoredTensors(tensors).read(name)


def test_a_sound_file_is_what_the_package_gguf_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", SOUND)
    found, expected = read_gguf(path), gguf.GGUFReader(path)
    for key, field in expected.fields.items():
        if key.startswith("GGUF."):
            continue
        value = found.metadata[key]
        if isinstance(value, GgufArray):
            value = value.strings() if value.kind == 8 else value.numbers()
        assert value == field.contents()
    assert {t.name: (tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in expected.tensors} == {
        t.name: (t.shape, t.start, t.nbytes) for t in found.tensors.values()
    }
    read_all(path)


def key(content: bytes, name: bytes = b"k") -> bytes:
    """A file with one metadata key, whose type and value are `content`."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(name) + content


def spoiled(tensors: list[tuple[str, Tensor]], metadata: dict[str, Any] | None = None) -> bytes:
    return gguf_bytes({**LLAMA, **(metadata or {})}, tensors)


HOSTILE = {
    "nothing": (b"", "is empty"),
    "other file": (b'{"a": 1}', "is no GGUF file"),
    "half a head": (SOUND[:20], "it is cut off"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1; versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"it names {2**60} tensors; at most"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), f"it names {2**63} metadata keys; at most"),
    "long name": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "bytes for the name of a metadata key; at most"),
    "long string": (key(struct.pack("<IQ", 8, 2**62)), f"it names {2**62} bytes for k; at most"),
    "string beyond the end": (key(struct.pack("<IQ", 8, 1000)), "it is cut off"),
    "string not UTF-8": (key(struct.pack("<I", 8) + text(b"\xff")), "k is not UTF-8"),
    "name with a line break": (key(struct.pack("<IB", 0, 1), b"a\nb"), "must be printable"),
    "unknown type": (key(struct.pack("<I", 13)), "is of type 13, which does not exist"),
    "array of arrays": (key(struct.pack("<IIQ", 9, 9, 1)), "is an array of arrays, which is not supported"),
    "array of an unknown type": (key(struct.pack("<IIQ", 9, 77, 1)), "is an array of type 77"),
    "long array": (key(struct.pack("<IIQ", 9, 0, 2**61)), "values in arrays up to 'k'; at most"),
    "array beyond the end": (key(struct.pack("<IIQ", 9, 4, 1000)), "it is cut off"),
    "strings beyond the end": (key(struct.pack("<IIQ", 9, 8, 1000)), "it is cut off"),
    "long string in an array": (key(struct.pack("<IIQQ", 9, 8, 1, 2**62)), "bytes for a string in 'k'; at most"),
    "key twice": (gguf_bytes([("k", 1), ("k", 2)]), "the metadata key 'k' occurs twice"),
    "alignment 0": (gguf_bytes({"general.alignment": 0}), "general.alignment is 0; it must be a power of two"),
    "alignment 3": (gguf_bytes({"general.alignment": 3}), "general.alignment is 3"),
    "alignment as text": (gguf_bytes({"general.alignment": "x"}), "general.alignment is 'x'"),
    "no dimensions": (spoiled([("t", Tensor(F32, (), b""))]), "has 0 dimensions; 1 to 4"),
    "five dimensions": (spoiled([("t", Tensor(F32, (1,) * 5, b"0000"))]), "has 5 dimensions"),
    "a size of 0": (spoiled([("t", Tensor(F32, (0, 4), b""))]), "has the shape [0, 4]; no size may be 0"),
    "sizes that overflow": (spoiled([("t", Tensor(F32, (2**63, 2**63), b""))]), "all together at most"),
    "half a block": (spoiled([("t", Tensor(2, (1, 33), b"0" * 36))]), "the last must be a multiple of 32 (Q4_0)"),
    "tensor beyond the end": (spoiled([("t", Tensor(F32, (1000,), b""))]), "it is cut off: tensor 't' ends at byte"),
    "offset beyond the end": (spoiled([("t", Tensor(F32, (1,), b"0000", 2**62))]), "it is cut off: tensor 't'"),
    "offset out of line": (spoiled([("t", Tensor(F32, (1,), b"0" * 64, 4))]), "no multiple of the alignment, 32"),
    "type not read": (
        spoiled([("t", Tensor(23, (256,), b"0" * 136))]),
        "of type IQ4_XS, which is not supported; supported: F32",
    ),
    "type that does not exist": (spoiled([("t", Tensor(99, (1,), b"0"))]), "of type number 99"),
    "tensor twice": (spoiled([("t", Tensor(F32, (1,), b"0000"))] * 2), "tensor 't' occurs twice"),
    "shared bytes": (
        spoiled([(name, Tensor(F32, (8,), b"0" * 32, 0)) for name in "ab"]),
        "tensors 'a' and 'b' share bytes of the file",
    ),
    "other architecture": (
        gguf_bytes({"general.architecture": "mamba"}),
        "architecture 'mamba' are not supported; supported",
    ),
    "no architecture": (gguf_bytes({}), "general.architecture is missing; it must be a string"),
    "architecture as a number": (gguf_bytes({"general.architecture": 3}), "general.architecture is 3"),
    "no embedding": (spoiled([]), "holds no token_embd.weight"),
    "no heads": (gguf_bytes({**LLAMA, "llama.attention.head_count": 0}, TENSORS), "are not those of 0 heads"),
    "heads that do not divide": (
        gguf_bytes({**LLAMA, "llama.attention.head_count": 3}, TENSORS),
        "are not those of 3 heads",
    ),
    "no length": (
        gguf_bytes({k: v for k, v in LLAMA.items() if k != "llama.context_length"}, TENSORS),
        "llama.context_length is",
    ),
    "rope that is not Llama 3's": (
        gguf_bytes(LLAMA, {**TENSORS, "rope_freqs.weight": float_tensor(np.array([1.0, 3.0]))}),
        "is not Llama 3's stretch",
    ),
    "other tokenizer": (gguf_bytes({**LLAMA, "tokenizer.ggml.model": "rwkv"}, TENSORS), "supported: gpt2, llama"),
    "other cut": (gguf_bytes({**LLAMA, "tokenizer.ggml.pre": "viking"}, TENSORS), "tokenizer.ggml.pre is 'viking'"),
    "merge of nothing": (gguf_bytes({**LLAMA, "tokenizer.ggml.merges": ["a c"]}, TENSORS), "which is not two tokens"),
    "kinds of other tokens": (gguf_bytes({**LLAMA, "tokenizer.ggml.token_type": [1]}, TENSORS), "4 tokens and 1 kinds"),
    "end beyond the vocabulary": (gguf_bytes({**LLAMA, "tokenizer.ggml.eos_token_id": 9}, TENSORS), "must be below 4"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_spoiled_file_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    data, expected = HOSTILE[name]
    path = write(tmp_path / "model.gguf", data)
    started, _ = time.process_time(), tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert time.process_time() - started < 20


def test_a_header_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_HEADER_BYTES", 100)
    with pytest.raises(CheckpointError, match="its header has more than 100 bytes"):
        read_gguf(write(tmp_path / "model.gguf", SOUND))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_gguf(tmp_path / "model.gguf")


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", SOUND)
    assert read_gguf(path).metadata["llama.block_count"] == 1
    write(path, gguf_bytes({**LLAMA, "llama.block_count": 2, "more": 1}, TENSORS))
    assert read_gguf(path).metadata["llama.block_count"] == 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_changed_at_random_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(content) - 1))
        content[at] = data.draw(st.sampled_from((0, 1, 8, 9, 127, 255, content[at] ^ 1)))
    content = content[: data.draw(st.integers(8, len(content)))] if data.draw(st.booleans()) else content
    path = write(tmp_path_factory.mktemp("fuzz") / "model.gguf", bytes(content))
    with suppress(CheckpointError):  # any other error fails the test
        read_all(path)


def shards(directory: Path, count: int = 2, **changes: dict[str, Any]) -> Path:
    """The sound model in several files; `changes` of the metadata of the shard of that name, s1, s2 …"""
    names = list(TENSORS)
    for number in range(count):
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(TENSORS)}
        metadata = {**(LLAMA if number == 0 else {}), **split, **changes.get(f"s{number + 1}", {})}
        tensors = {name: TENSORS[name] for name in names[number::count]}
        write(directory / f"m-{number + 1:05}-of-{count:05}.gguf", gguf_bytes(metadata, tensors))
    return directory / f"m-00001-of-{count:05}.gguf"


def test_shards_are_one_file(tmp_path: Path) -> None:
    path = shards(tmp_path)
    assert set(read_gguf(path).tensors) == set(TENSORS)
    tensors = stored_tensors(list(read_gguf(path).files))
    assert StoredTensors(tensors).read("model.norm.weight").tolist() == list(range(8))
    read_all(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"s2": {"split.no": 0}}, "is not shard 2 of 2"),
        ({"s1": {"split.count": 3}}, "name the first one"),
        ({"s1": {"split.count": 2**31}}, "split.count is 2147483648"),
        ({"s1": {"split.tensors.count": 9}}, "hold 3 tensors, split.tensors.count is 9"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        read_gguf(shards(tmp_path, **changes))


def test_a_missing_shard_and_a_later_one_are_named(tmp_path: Path) -> None:
    path = shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"name the first one, m-00001-of-00002.gguf"):
        read_gguf(path.with_name("m-00002-of-00002.gguf"))
    path.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"missing: m-00002-of-00002.gguf"):
        read_gguf(path)
