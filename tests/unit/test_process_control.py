"""Processes that outlive their parents are taken in by the one that is responsible for them, and leave no zombies."""

import subprocess
import sys

import pytest

from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.process_control import environment_of_parser, environment_without_keys

SCRIPT = """
import os, subprocess, sys, time
from pagoda.process_control import become_subreaper, reap_orphans

become_subreaper()
# A child that stays, and one that leaves a grandchild behind, which then ends.
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
leave = "import subprocess; print(subprocess.Popen(['sleep', '0.2'], stdout=subprocess.DEVNULL).pid)"
orphan = int(subprocess.run([sys.executable, "-c", leave], capture_output=True, text=True).stdout)
parent = int(open(f"/proc/{orphan}/stat").read().rpartition(")")[2].split()[1])
deadline = time.monotonic() + 20
while os.path.exists(f"/proc/{orphan}") and time.monotonic() < deadline:
    reap_orphans(own.pid)
    time.sleep(0.05)
own.kill()
time.sleep(0.3)
reap_orphans(own.pid)
print(parent == os.getpid(), os.path.exists(f"/proc/{orphan}"), own.wait())
"""


def test_orphans_are_taken_in_and_let_go_and_a_child_of_ones_own_is_left_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["True", "False", "-9"], done.stderr


SECRETS = (
    "PAGODA_API_KEYS",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "RAY_AUTH_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "OPENAI_API_KEY",
)


def test_what_parses_hostile_input_is_given_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "a-secret")
    environ = environment_of_parser({"MALLOC_ARENA_MAX": "1"})
    assert "a-secret" not in environ.values()
    assert environ["MALLOC_ARENA_MAX"] == "1"
    done = subprocess.run([sys.executable, "-c", "import pagoda.text.worker_process"], env=environ, check=False)
    assert done.returncode == 0


def test_an_engine_core_does_not_know_the_api_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAGODA_API_KEYS", "PAGODA_ADMIN_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "a-secret")
    monkeypatch.setenv("HF_TOKEN", "for its download")
    assert environment_without_keys()["HF_TOKEN"] == "for its download"
    with PrelaunchedProcess() as core, open(f"/proc/{core.process.pid}/environ", "rb") as environ:
        assert b"a-secret" not in environ.read()
