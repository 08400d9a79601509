"""`pagoda embed`: the vectors of `LLM.embed` in every form, and what is wrong with a command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from pagoda import LLM
from pagoda.cli import embed
from pagoda.errors import InvalidRequestError
from tests.support.encoders import add_modules, save_bert

TEXTS = ["the cat sat on the mat", "war and peace"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("embedder")
    save_bert(directory)
    add_modules(directory, "mean")
    return directory


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    with LLM(str(model), threads=1) as llm:
        return np.array([output.embedding for output in llm.embed(TEXTS)], dtype=np.float32)


def run(model: Path, *arguments: str) -> int:
    return embed.run([*arguments, "--model", str(model), "--threads", "1"])


def test_json_lines_of_arguments_and_of_standard_input(
    model: Path, expected: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(model, *TEXTS) == 0
    first = capsys.readouterr().out
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    assert [line["num_tokens"] for line in lines] == [8, 5]
    np.testing.assert_allclose([line["embedding"] for line in lines], expected, atol=1e-6)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["", *TEXTS, "  ", ""])))
    assert run(model) == 0
    assert capsys.readouterr().out == first


def test_a_numpy_file_of_the_lines_of_a_file(model: Path, expected: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    options = ("--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out.npy"))
    assert run(model, *options, "--dimensions", "16") == 0
    cut = expected[:, :16] / np.linalg.norm(expected[:, :16], axis=1, keepdims=True)
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, cut, atol=1e-6)


def test_a_long_text_is_cut_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequestError, match="truncate"):
        run(model, "cat " * 300)
    assert run(model, "cat " * 300, "--truncate", "--output", str(output)) == 0
    assert json.loads(output.read_text())["num_tokens"] == 160


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("a text", "--input", "file"), "not both"),
        (("--input", "/no/such/file"), "--input /no/such/file"),
        (("a", "--output", "vectors.csv"), ".npy or .jsonl"),
        (("a", "--dimensions", "65"), "from 1 to 64"),
        (("a", "--prompt-name", "query"), "no prompt of this model"),
    ],
)
def test_what_is_wrong_is_named(model: Path, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        run(model, *options)


def test_no_text_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    with pytest.raises(InvalidRequestError, match="no text"):
        run(model)
