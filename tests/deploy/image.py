"""Builds the image and runs it as a pod would: `make test-image`.

usage: python -m tests.deploy.image [--image TAG] [--build-args "--build-arg …"]

The container gets the arguments, the settings file and the restrictions of the chart's rendered pod: not root, root file
system read-only, no capabilities, a cache volume and /tmp. It must become ready, answer over REST and gRPC, and let a running
answer end when it is told to stop. Needs podman or docker; not a part of the test suite, for a build takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx

from pagoda.serving.grpc.messages import SERVICE_NAME, ModelInferResponse
from tests.support.chart import config_file, render, server_container, server_pod
from tests.support.grpc_harness import infer_request, texts_of
from tests.support.ports import free_port

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 180
PROMPT = "Once upon a time"


class Container:
    """The image, running under the chart's restrictions on ports of this machine; use as a context."""

    def __init__(self, tool: str, image: str) -> None:
        self._tool = tool
        self.http_port, self.grpc_port = free_port(), free_port()
        network = {"httpPort": self.http_port, "grpcPort": self.grpc_port}
        objects = render({"network": network, "engine": {"threads": 1}})
        self._pod, self._container = server_pod(objects), server_container(objects)
        self._settings = config_file(objects)
        self._image = image
        self._name = f"pagoda-image-test-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> Container:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        folder.chmod(0o755)
        (folder / "pagoda.json").write_text(json.dumps(self._settings))
        user = self._pod["securityContext"]["runAsUser"]
        self._run(
            *("run", "--detach", "--name", self._name, "--network", "host", "--user", f"{user}:{user}"),
            *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--tmpfs", "/tmp:mode=1777"),  # /cache is the image's own volume
            *("--volume", f"{folder}:/etc/pagoda:ro", self._image, *self._container["args"]),
        )
        self.started = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            subprocess.run([self._tool, "logs", self._name])
        self._run("rm", "--force", "--volumes", self._name)
        self._folder.cleanup()

    def exec(self, *command: str) -> tuple[int, str]:
        """Exit status and output of a command in the container."""
        done = subprocess.run([self._tool, "exec", self._name, *command], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def wait_until_ready(self) -> float:
        """Seconds until the image's own health check passes."""
        while True:
            code, said = self.exec("pagoda", "probe", "ready", f"--http-port={self.http_port}")
            waited = time.monotonic() - self.started
            if code == 0:
                return waited
            assert waited < START_SECONDS, said
            running = self._run("container", "inspect", "--format", "{{.State.Running}}", self._name)
            assert running == "true", "the server has ended"
            time.sleep(0.5)

    def stop(self) -> int:
        """SIGTERM, as the kubelet sends it; returns the exit status."""
        self._run("stop", "--time", str(self._pod["terminationGracePeriodSeconds"]), self._name)
        return int(self._run("wait", self._name))

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self._tool, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join([self._tool, *arguments])}: {done.stderr}"
        return done.stdout.strip()


def check_restrictions(container: Container) -> None:
    """Not root, nothing writable but the volumes, no capabilities."""
    assert container.exec("id", "-u") == (0, "10001\n")
    assert container.exec("touch", "/opt/pagoda/x")[0] != 0
    assert container.exec("touch", "/x")[0] != 0
    assert container.exec("touch", "/cache/x", "/tmp/x")[0] == 0
    assert "CapEff:\t0000000000000000" in container.exec("cat", "/proc/self/status")[1]


def check_answers(container: Container) -> str:
    """The same answer over REST and gRPC."""
    url = f"http://127.0.0.1:{container.http_port}/v2/models/demo/generate"
    body: dict[str, Any] = {"text_input": PROMPT, "parameters": {"max_tokens": 8, "temperature": 0.0}}
    over_rest = httpx.post(url, json=body, timeout=120, trust_env=False).raise_for_status().json()["text_output"]
    with grpc.insecure_channel(f"127.0.0.1:{container.grpc_port}") as channel:
        request = infer_request(PROMPT, parameters=body["parameters"])
        call = channel.unary_unary(
            f"/{SERVICE_NAME}/ModelInfer",
            request_serializer=type(request).SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )
        over_grpc = texts_of(call(request, timeout=120))[0]
    assert over_rest, "the answer is empty"
    assert over_rest == over_grpc
    return str(over_rest)


def check_drain(container: Container) -> None:
    """An answer under way when the container is told to stop is finished, and then the server ends by itself."""
    received: list[str] = []
    has_begun = threading.Event()

    def read() -> None:
        url = f"http://127.0.0.1:{container.http_port}/v2/models/demo/generate_stream"
        body = {"text_input": PROMPT, "parameters": {"max_tokens": 64, "ignore_eos": True}}
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as response:
            for line in response.iter_lines():
                received.append(line)
                has_begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert has_begun.wait(60)
    before = len(received)
    status = container.stop()
    reader.join(60)
    events = [json.loads(line.removeprefix("data:")) for line in received if line.startswith("data:")]
    assert status == 0
    assert len(received) > before, "the answer was over before the stop"
    assert not any("error" in event for event in events), events[-1]


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Say that a check passed, and how long it took."""
    began = time.monotonic()
    yield
    print(f"ok  {what} ({time.monotonic() - began:.1f} s)", flush=True)


def main() -> int:
    """Build unless an image is named, run, check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.image")
    parser.add_argument("--image", help="take this one instead of building")
    parser.add_argument("--build-args", default="", help="further arguments of the build")
    arguments = parser.parse_args()
    tool = shutil.which("podman") or shutil.which("docker")
    if tool is None:
        print("skipped: neither podman nor docker is installed")
        return 0
    image = arguments.image or "pagoda:test"
    if arguments.image is None:
        with reported("the image builds"):
            build = [tool, "build", "--tag", image, *shlex.split(arguments.build_args), str(REPOSITORY)]
            subprocess.run(build, check=True, env={**os.environ, "BUILDAH_FORMAT": "docker"})
    size = subprocess.run(
        [tool, "image", "inspect", "--format", "{{.Size}}", image], capture_output=True, text=True, check=True
    )
    print(f"    size {int(size.stdout) / 2**20:.0f} MiB")
    with Container(tool, image) as container:
        with reported("it becomes ready"):
            print(f"    ready after {container.wait_until_ready():.1f} s")
        with reported("it is locked down"):
            check_restrictions(container)
        with reported("REST and gRPC give the same answer"):
            print(f"    {PROMPT!r} -> {check_answers(container)!r}")
        with reported("it drains on SIGTERM"):
            check_drain(container)
    return 0


if __name__ == "__main__":
    sys.exit(main())
