"""`pagoda generate` and `pagoda chat` from the command line to what is printed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagoda import LLM, SamplingParams
from pagoda.cli import chat, generate
from pagoda.cli.main import main
from pagoda.cli.offline import is_model
from pagoda.errors import ConfigError, InvalidRequestError
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from tests.support.checkpoints import shared_checkpoint
from tests.support.terminal import Terminal

GREEDY = ["--temperature", "0", "--ignore-eos"]


@pytest.fixture(scope="module")
def model() -> list[str]:
    directory = shared_checkpoint()
    return [
        "--model",
        str(directory),
        "--device=cpu",
        "--kv_cache_memory_bytes",
        "4MiB",
        "--dtype",
        "float32",
        "--threads",
        "1",
    ]


@pytest.fixture(scope="module")
def expected(model) -> dict[str, str]:
    """What each prompt is completed with, by the library."""
    with LLM(model[1], device="cpu", kv_cache_memory_bytes="4MiB", dtype="float32", threads=1) as llm:
        prompts = ["Once upon a time", "The sky", "two\nlines"]
        sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        outputs = llm.generate(prompts, sampling)
        said = llm.chat([{"role": "user", "content": "The sky"}], sampling)[0]
    texts = {output.prompt: output.outputs[0].text for output in outputs}
    return {**texts, "chat": said.outputs[0].text}


def completes(arguments: list[str], model: list[str], capsys) -> str:
    assert generate.run([*model, *GREEDY, "--max_tokens=6", *arguments]) == 0
    return capsys.readouterr().out


def test_one_prompt_gives_its_text_alone_streamed_or_not(model, expected, capsys):
    prompt = "Once upon a time"
    assert completes([prompt], model, capsys) == expected[prompt] + "\n"
    assert completes([prompt, "--stream"], model, capsys) == expected[prompt] + "\n"


def test_several_prompts_are_told_apart(model, expected, capsys):
    printed = completes(["Once upon a time", "The sky"], model, capsys)
    assert printed == (
        f"=== prompt 1, choice 1\n{expected['Once upon a time']}\n=== prompt 2, choice 1\n{expected['The sky']}\n"
    )


def test_prompts_come_from_files_and_standard_input(model, expected, capsys, monkeypatch, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("Once upon a time\n\nThe sky\n")
    assert expected["The sky"] in completes(["--input", str(lines)], model, capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    assert completes([], model, capsys) == expected["two\nlines"] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("The sky\n"))
    assert completes(["--input=-", "--input-format=lines"], model, capsys) == expected["The sky"] + "\n"


def test_json_lines_in_and_out(model, expected, capsys, tmp_path):
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = [
        {"prompt": "The sky", "max_tokens": 3, "logprobs": 1, "prompt_logprobs": 0},
        {"prompt": [5, 6, 7], "temperature": 1.0, "seed": 3, "n": 2},
        {"messages": [{"role": "user", "content": "The sky"}], "stop": "never there"},
    ]
    source.write_text("\n".join(json.dumps(request) for request in requests))
    completes(["--input", str(source), "--output", str(sink), "--format=jsonl"], model, capsys)
    first, second, third, chatted = (json.loads(line) for line in sink.read_text().splitlines())
    assert expected["The sky"].startswith(first["text"])
    assert len(first["token_ids"]) == len(first["logprobs"]) == 3
    assert len(first["prompt_logprobs"]) == first["num_prompt_tokens"]
    assert (second["index"], third["index"], second["num_prompt_tokens"]) == (0, 1, 3)
    assert chatted["text"] == expected["chat"]
    assert {line["finish_reason"] for line in (first, second, third, chatted)} == {"length"}


def test_chat_template_is_applied_when_asked_for(model, expected, capsys):
    assert completes(["--chat", "The sky"], model, capsys) == expected["chat"] + "\n"


def test_streamed_json_lines_join_to_the_text(model, expected, capsys):
    printed = completes(["The sky", "--stream", "--format", "jsonl"], model, capsys)
    chunks = [json.loads(line) for line in printed.splitlines()]
    assert "".join(chunk["text"] for chunk in chunks) == expected["The sky"]
    assert chunks[-1]["finish_reason"] == "length"


WRONG = {
    "an impossible value": (["x", "--top-p", "3"], InvalidRequestError, "top_p"),
    "a wrong setting": (["x", "--max-num-seqs", "many"], ConfigError, "max_num_seqs"),
    "a setting without a value": (["x", "--dtype"], ConfigError, "dtype"),
    "streaming two prompts": (["x", "y", "--stream"], InvalidRequestError, "one prompt"),
    "streaming two choices": (["x", "--n=2", "--stream"], InvalidRequestError, "n=2"),
    "prompts from two sources": (["x", "--input", "file"], InvalidRequestError, "--input"),
    "a missing file": (["--input", "/no/such/file"], InvalidRequestError, "/no/such/file"),
    "an output that cannot be written": (["x", "--output", "/no/such/dir/file"], InvalidRequestError, "--output"),
    "a prompt that is too long": (["x y " * 2000], InvalidRequestError, "512 tokens"),
}


@pytest.mark.parametrize(("arguments", "error", "named"), WRONG.values(), ids=WRONG.keys())
def test_mistakes_are_named(model, arguments, error, named):
    with pytest.raises(error, match=named):
        generate.run([*model, *arguments])


BAD_LINES = {
    "no JSON": "{",
    "no object": "[1]",
    "no prompt": "{}",
    "both": '{"prompt": "x", "messages": []}',
    "a number": '{"prompt": 3}',
    "an unknown name": '{"prompt": "x", "temprature": 1}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_json_line_is_named_by_its_number(model, line, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(InvalidRequestError, match="line 2"):
        generate.run([*model, "--input", str(path)])


def test_no_prompt_at_all_is_a_mistake(model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(InvalidRequestError, match="no prompt"):
        generate.run(model)


def test_help_lists_options_and_settings(capsys):
    for arguments, named in ((["--help"], "--repetition-penalty"), (["--help-settings"], "--max-model-len")):
        with pytest.raises(SystemExit) as ended:
            generate.run(arguments)
        assert ended.value.code == 0
        assert named in capsys.readouterr().out


def test_unknown_option_ends_with_status_2(capsys):
    assert main(["generate", "--temprature", "1", "x"]) == 2
    assert "--temprature: unknown option; did you mean --temperature?" in capsys.readouterr().err


def test_the_first_word_is_the_model_where_it_is_one(model, expected, capsys):
    settings = model[2:]
    assert generate.run([model[1], *settings, *GREEDY, "--max-tokens=6", "Once upon a time"]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected["Once upon a time"] + "\n"
    assert printed.err.startswith(f"model {Path(model[1]).name} ({model[1]})")


@pytest.mark.parametrize(
    ("word", "is_followed", "expected"),
    [
        ("./nothing", False, True),
        ("/no/such/model", False, True),
        ("Qwen/Qwen3-0.6B", True, True),
        ("model-q4_k_m.gguf", False, True),
        ("and/or", False, False),
        ("tests", True, False),
        ("/etc/hosts is a file", False, False),
        (".", False, False),
        ("...and then", False, False),
    ],
)
def test_which_words_name_a_model(word, is_followed, expected):
    assert is_model(word, is_followed=is_followed) is expected


BROKEN = {
    "a prompt": ["generate", "x"],
    "a conversation": ["chat"],
    "latency": ["bench", "latency"],
    "throughput": ["bench", "throughput"],
}


@pytest.mark.parametrize("command", BROKEN.values(), ids=BROKEN.keys())
def test_what_config_json_tells_is_said_once_and_before_anything_loads(command, tmp_path, capsys, monkeypatch):
    directory = write_dummy_checkpoint(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))

    def load(*_, **__):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(LLM, "from_config", load)
    monkeypatch.setattr("pagoda.engine.core.startup.start_core", load)
    assert main([*command, "--model", str(directory)]) == 2
    error = capsys.readouterr().err
    assert "num_key_value_heads" in error
    assert len(error.splitlines()) == 1


def test_chat_answers_each_line_with_the_conversation_so_far(model, expected, capsys, monkeypatch):
    script = "The sky\n\n/nonsense\nAnd now?\n/reset\nThe sky\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    assert chat.run([*model, *GREEDY, "--max-tokens", "6"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(expected["chat"] + "\n")
    assert printed.out.endswith("\n" + expected["chat"] + "\n")  # /reset forgot what had been said
    assert printed.out.count(expected["chat"]) == 2
    assert "/nonsense" in printed.err


def test_chat_goes_on_when_a_turn_does_not_fit(model, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 2000 + "\nThe sky\n"))
    assert chat.run([*model, *GREEDY, "--max-tokens", "6"]) == 0
    printed = capsys.readouterr()
    assert "/reset" in printed.err
    assert printed.out == expected["chat"] + "\n"


def test_chat_with_a_system_message(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    seen = []
    original = LLM.encode_chat
    monkeypatch.setattr(LLM, "encode_chat", lambda self, chat: seen.append(list(chat)) or original(self, chat))
    chat.run([*model, "--max-tokens", "2", "--system", "Be brief."])
    assert seen[-1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_chat_needs_a_chat_template(tmp_path, monkeypatch):
    directory = write_dummy_checkpoint(tmp_path / "plain", DummySpec(chat_template=False))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        chat.run(["--model", str(directory), "--device", "cpu", "--kv-cache-memory-bytes", "4MiB"])


def test_interrupt_stops_the_answer_and_not_the_program(model):
    process = subprocess.Popen(
        [sys.executable, "-m", "pagoda.cli.main", "chat", *model, "--temperature", "0", "--ignore-eos"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Tell me a long story\n")
    process.stdin.flush()
    first = process.stdout.read(3)  # the answer has begun; it would go on to the end of the context
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    rest, errors = process.communicate(b"/nonsense\n/quit\n", timeout=60)
    assert process.returncode == 0, errors
    assert b"[stopped]" in first + rest
    assert b"/nonsense" in errors


def test_chat_at_a_terminal(model, expected, tmp_path):
    saved = tmp_path / "talk.json"
    with Terminal(["chat", model[1], *model[2:], *GREEDY, "--max-tokens", "6"]) as terminal:
        terminal.wait_for("> ")
        answer = terminal.type("\x1b[200~two\rlines\x1b[201~", until="tokens/s, first after")
        assert "[6 tokens, " in answer
        terminal.type("/system Be brief.", until="system: Be brief.")
        assert "did you mean temperature?" in terminal.type("/set temprature 1")
        assert "top_p must be" in terminal.type("/set top-p 3")
        assert "seed" not in terminal.type("/set max-tokens 3", until="max_tokens = 3")
        terminal.type("/retry", until="[3 tokens, ")
        terminal.type(f"/save {saved}")
        assert "cannot be written: File exists" in terminal.type(f"/save {saved}")
        assert "did you mean /retry?" in terminal.type("/rety")
        terminal.type("/reset")
        assert "nowhere.json cannot be read" in terminal.type("/load nowhere.json")
        terminal.type(f"/load {saved}")
        terminal.type("And then?", until="[3 tokens, ")
        terminal.type(f"/save {saved}.2")
        os.write(terminal.keyboard, b"/quit\r")
        assert terminal.process.wait(30) == 0
    content = json.loads(saved.read_text())
    assert [message["role"] for message in content["messages"]] == ["system", "user", "assistant"]
    assert content["messages"][1]["content"] == "two\nlines"
    assert (content["sampling"]["max_tokens"], content["sampling"]["temperature"]) == (3, 0.0)
    again = json.loads(Path(f"{saved}.2").read_text())["messages"]
    assert again[:3] == content["messages"]
    assert [message["role"] for message in again[3:]] == ["user", "assistant"]
