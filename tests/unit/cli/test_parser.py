"""Errors of command lines: one sentence of every command, with good guesses and no others."""

import pytest

from pagoda.cli.main import main
from pagoda.cli.parser import CommandParser
from pagoda.config.names import nearest
from pagoda.errors import ConfigError

MISSPELT = [
    (["generate", "--temprature", "1", "x"], "--temprature: unknown option; did you mean --temperature?"),
    (["generate", "--max-modl-len", "1", "x"], "--max-modl-len: unknown option; did you mean --max-model-len?"),
    (["chat", "--sytem", "x"], "did you mean --system?"),
    (["bench", "serve", "--requestrate", "1"], "did you mean --request-rate?"),
    (["bench", "latency", "--batchsize", "1"], "did you mean --batch-size?"),
    (["bench", "throughput", "--num-promts", "1"], "did you mean --num-prompts?"),
    (["bench", "lateny"], "unknown kind of measurement lateny; did you mean latency?"),
    (["probe", "redy"], "probe=redy: must be one of startup, ready, live; did you mean ready?"),
    (["probe", "live", "--http-prt=1"], "did you mean --http-port?"),
    (["models", "inpsect", "x"], "did you mean inspect?"),
    (["models", "make-dummy", "/tmp/x", "--num-layer", "2"], "did you mean --num-layers?"),
    (
        ["models", "quantize", "a", "b", "--quantization", "int5"],
        "--quantization=int5: must be one of int8, int4; did",
    ),
    (["deploy", "--replica", "2"], "did you mean --replicas?"),
    (["join", "--state-directry", "x"], "did you mean --state-directory?"),
    (["serve", "--max-modl-len=3"], "did you mean --max-model-len?"),
]


@pytest.mark.parametrize(("arguments", "message"), MISSPELT, ids=[" ".join(arguments) for arguments, _ in MISSPELT])
def test_a_misspelt_word_is_one_sentence_with_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--number=x"], "--number=x: must be an integer"),
        (["--number"], "--number: needs a value"),
        (["--kind=nothing"], "--kind=nothing: must be one of first, second"),
        (["a", "b", "c"], "c: unexpected argument; `x --help` says what there is"),
        (["--unlike-anything"], "--unlike-anything: unknown option; `x --help` lists the options"),
        ([], "word: is needed"),
    ],
)
def test_what_argparse_finds_wrong_is_said_in_a_sentence(arguments: list[str], message: str) -> None:
    parser = CommandParser("x")
    parser.add_argument("word")
    parser.add_argument("more", nargs="?")
    parser.add_argument("--number", type=int)
    parser.add_argument("--kind", choices=["first", "second"])
    with pytest.raises(ConfigError) as caught:
        parser.parse_args(arguments if arguments in ([], ["a", "b", "c"]) else ["a", *arguments])
    assert str(caught.value) == message


def test_options_may_stand_between_words_and_be_written_with_underscores() -> None:
    parser = CommandParser("x")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--top-k", type=int)
    own = parser.parse_args(["a", "--top_k=3", "b"])
    assert (own.words, own.top_k) == (["a", "b"], 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--", "-x", "y"], ["-x", "y"]),
        (["a", "--", "--b"], ["a", "--b"]),
        (["--top-k", "0", "--", "--top_k", "--"], ["--top_k", "--"]),
        (["-5 degrees"], ["-5 degrees"]),
    ],
)
def test_what_follows_two_dashes_is_no_option(arguments: list[str], words: list[str]) -> None:
    parser = CommandParser("x")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--top-k", type=int)
    assert parser.parse_args(arguments).words == words


KNOWN = ["max_model_len", "max_num_seqs", "http_port", "grpc_port", "block_size", "seed", "threads", "ray_first_port"]


@pytest.mark.parametrize(
    ("written", "guess"),
    [
        ("max_modle_len", "; did you mean max_model_len?"),
        ("model_len", "; did you mean max_model_len?"),
        ("model_max_len", "; did you mean max_model_len?"),
        ("port", "; did you mean http_port or grpc_port?"),
        ("sed", "; did you mean seed?"),
        # Guesses that would only mislead.
        ("batch_size", ""),
        ("max_tokens", ""),
        ("context", ""),
        ("read", ""),
        ("x", ""),
        ("", ""),
    ],
)
def test_guesses_are_good_or_there_is_none(written: str, guess: str) -> None:
    assert nearest(written, KNOWN) == guess
