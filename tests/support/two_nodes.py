"""A model on two hosts: `pagoda serve` with a Ray head on one, `pagoda join` on the other, a stage of the model on each."""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.network_nodes import NetworkNode, NetworkNodes, why_not

PAGODA = str(Path(sys.executable).with_name("pagoda"))
PROMPTS = ("Once upon a time", "The little bird said", "There was a red ball in the garden")
MAX_TOKENS = (1, 24, 80)
# Everything here runs on machines that are busy with other tests; what is promised stands in docs/operations.md.
START_SECONDS = 700.0
NOTICE_SECONDS = 90.0

TOKEN = {"RAY_AUTH_TOKEN": "t" * 32}
"""Of the cluster: else the head would make one in the home directory."""

Question = tuple[str, int]
QUESTIONS: tuple[Question, ...] = tuple((prompt, length) for prompt in PROMPTS for length in MAX_TOKENS)


@dataclass(slots=True)
class Answers:
    """What became of every question that was asked."""

    finished: list[tuple[Question, str]] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)

    def check(self, references: dict[Question, str]) -> None:
        """Every answer is right, and every refusal invites to try again."""
        wrong = [(question, text) for question, text in self.finished if references[question] != text]
        assert not wrong, wrong[:3]
        assert not [refusal for refusal in self.refused if refusal[0] != 503], self.refused

    @property
    def summary(self) -> str:
        return f"{len(self.finished)} answers, {len(self.refused)} told to try again"


class TwoNodes:
    """See the module. Made by `two_nodes`."""

    def __init__(self, head: NetworkNode, worker: NetworkNode) -> None:
        self.head = head
        self.worker = worker
        self.state_directory = worker.directory / "state"

    def serve(self, *settings: str) -> None:
        """Start the server on the head's node."""
        words = ["--distributed-executor-backend=ray", "--pipeline-parallel-size=2", "--dtype=float32"]
        words += ["--ray-num-cpus=1", "--max-engine-restarts=50", "--rendezvous-timeout-seconds=600"]
        self.server = self.head.start(PAGODA, "serve", *words, *settings, log="serve.log", environ=TOKEN)

    def join(self, *settings: str) -> None:
        """Start the worker on its node."""
        words = [f"{self.head.name}:6379", "--ray-num-cpus=1", f"--state-directory={self.state_directory}"]
        words.append("--rendezvous-timeout-seconds=600")
        self.joined = self.worker.start(PAGODA, "join", *words, *settings, log="join.log", environ=TOKEN)

    def health(self) -> dict[str, str]:
        """What the server says of itself; `state` is `none` while nothing answers."""
        try:
            answer: dict[str, str] = self.head.request("/health", timeout=30.0)[1]
        except (OSError, http.client.HTTPException):
            return {"state": "none"}
        return answer

    def until(self, what: str, is_so: Callable[[dict[str, str]], bool], seconds: float) -> float:
        """Wait until the health is so; how long it took."""
        started = time.monotonic()
        while not is_so(health := self.health()):
            waited = time.monotonic() - started
            log = "\n".join(line for line in self.head.log("serve.log").splitlines()[-60:] if "access" not in line)
            assert self.server.poll() is None, f"the server ended\n{log}"
            assert waited < seconds, f"not {what} after {waited:.0f} s: {health}\n{log}"
            time.sleep(0.5)
        return time.monotonic() - started

    def until_ready(self) -> float:
        """Wait for the model to be served; seconds."""
        return self.until("ready", lambda health: health["state"] == "ready", START_SECONDS)

    def until_unready(self) -> float:
        """Wait for a loss to be noticed; seconds."""
        return self.until("unready", lambda health: health["state"] != "ready", NOTICE_SECONDS)

    def ask(self, question: Question, answers: Answers) -> None:
        """Ask and note what came of it."""
        prompt, length = question
        body = {"text_input": prompt, "parameters": {"max_tokens": length, "temperature": 0, "ignore_eos": True}}
        status, answer = self.head.request("/v2/models/demo/generate", body)
        if status == 200:
            answers.finished.append((question, answer["text_output"]))
        else:
            answers.refused.append((status, str(answer)))

    @contextmanager
    def load(self, num_clients: int = 3) -> Iterator[Answers]:
        """Clients that ask without pause for as long as the context lasts."""
        answers, ended = Answers(), threading.Event()

        def run(first: int) -> None:
            position = first
            while not ended.is_set():
                num_refused = len(answers.refused)
                self.ask(QUESTIONS[position % len(QUESTIONS)], answers)
                position += 1
                if len(answers.refused) > num_refused:
                    ended.wait(1.0)

        clients = [threading.Thread(target=run, args=(first,)) for first in range(num_clients)]
        for client in clients:
            client.start()
        try:
            yield answers
        finally:
            ended.set()
            for client in clients:
                client.join(200)

    def probe_worker(self, name: str) -> tuple[int, str]:
        """Exit status and words of a probe on the worker's node."""
        return self.worker.run(PAGODA, "probe", name, "--rank", f"--state-directory={self.state_directory}")

    def ranks_on(self, node: NetworkNode) -> list[int]:
        """Process ids of the ranks of a node."""
        return node.pids_of("ray::PagodaRank")


@contextmanager
def two_nodes(directory: Path, number: int) -> Iterator[TwoNodes]:
    """Two hosts on which nothing runs yet. Skips the test where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    with NetworkNodes(2, directory, number) as network:
        yield TwoNodes(*network.nodes)


def lines_with(log: str, words: Sequence[str]) -> list[str]:
    """The lines of a log that hold all of `words`."""
    return [line for line in log.splitlines() if all(word in line for word in words)]
