"""The question of `helm test`: the very command of the rendered pod, run against a server."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.chart import VALUE_SETS, render
from tests.support.encoders import save_bert
from tests.support.rest_harness import RestHarness
from tests.support.server import ServerProcess


def ask(
    url: str, values: dict[str, object], model: str = "demo", **environment: str
) -> subprocess.CompletedProcess[str]:
    (container,) = render(values)["Pod"]["spec"]["containers"]
    command = [sys.executable, *container["command"][1:], url, model, *container["args"][2:]]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_it_passes_on_an_answer() -> None:
    with RestHarness() as server:
        done = ask(server.url, {"test": {"prompt": 'once "upon" a $(TIME)'}})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("'once \"upon\" a $(TIME)' -> ")


def test_it_fails_with_the_server_s_words_while_the_model_loads() -> None:
    with RestHarness(is_ready=False) as server:
        done = ask(server.url, {"test": {"timeoutSeconds": 1}})
    assert done.returncode == 1
    assert "503" in done.stderr
    assert "loading" in done.stderr


def test_it_fails_at_once_for_a_model_that_is_not_there() -> None:
    with RestHarness() as server:
        done = ask(server.url, {}, model="other")
    assert done.returncode == 1
    assert "404" in done.stderr


def test_it_fails_where_nobody_listens() -> None:
    done = ask("http://127.0.0.1:1", {"test": {"timeoutSeconds": 1}})
    assert done.returncode == 1
    assert "refused" in done.stderr


def test_it_sends_the_first_key_of_the_release_s_secret() -> None:
    values = VALUE_SETS["api keys"]
    (variable,) = render(values)["Pod"]["spec"]["containers"][0]["env"]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "clients.txt"}
    with RestHarness(api_keys=("first", "second")) as server:
        assert ask(server.url, values, **{variable["name"]: "first,second"}).returncode == 0
        assert ask(server.url, values, **{variable["name"]: "# clients\nfirst\n"}).returncode == 0
        for secret in ("wrong", "- name: first\n  key: first", "sha256:" + 64 * "0", ""):
            done = ask(server.url, values, **{variable["name"]: secret})
            assert done.returncode == 1
            assert "401" in done.stderr


def test_it_sends_the_key_of_a_secret_of_its_own_where_the_release_s_has_records() -> None:
    own = {"test": {"apiKeySecret": {"name": "tester", "key": "key"}}}
    for key in ("api-keys", ""):
        values = {"security": {"apiKeysSecret": {"name": "keys", "key": key}}, **own}
        (variable,) = render(values)["Pod"]["spec"]["containers"][0]["env"]
        assert variable["valueFrom"]["secretKeyRef"] == {"name": "tester", "key": "key"}


def test_a_model_that_pools_answers_with_what_it_makes_of_the_prompt(tmp_path: Path) -> None:
    save_bert(tmp_path)
    with ServerProcess(model=tmp_path) as server:
        server.wait_until_ready()
        done = ask(f"http://127.0.0.1:{server.port}", {})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "'Once upon a time' -> 'embedding [1, 64]'\n"
