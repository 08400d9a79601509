"""What goes into the image is pinned, hashed, complete and past the floors of pyproject.toml; the targets that keep it so."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = ("torch.lock", "torch-cpu.lock", "image.lock", "tools.lock")
DIGEST = "sha256:" + "0123456789abcdef" * 4

every_lock = pytest.mark.parametrize("lock", LOCKS)


@cache
def constraints() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name: Version(version) for name, _, version in (line.partition("==") for line in lines) if version}


@cache
def locked(lock: str) -> dict[str, tuple[Version, list[str]]]:
    """Version and hashes of each package of a lock file; nothing else may stand in it."""
    text = (REPOSITORY / "requirements" / lock).read_text(encoding="utf-8").replace("\\\n", "")
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9.-]+)==(\S+)(?: ; [^#]*?)?((?:\s+--hash=sha256:[0-9a-f]{64})*)\s*", line)
        assert match, line
        found[match[1]] = (Version(match[2]), match[3].split())
    return found


@every_lock
def test_each_requirement_of_a_lock_has_a_version_and_hashes(lock: str) -> None:
    assert locked(lock)
    assert [name for name, (_, hashes) in locked(lock).items() if not hashes] == []


@every_lock
def test_locks_and_constraints_pin_the_same_versions(lock: str) -> None:
    pins = {name: Version(version.public) for name, (version, _) in locked(lock).items()}
    assert {n: v for n, v in pins.items() if constraints().get(n, v) != v} == {}, "run `make lock`"


def test_either_torch_completes_the_image_and_brings_nothing_twice() -> None:
    with_cuda, without, image = (set(locked(lock)) for lock in ("torch.lock", "torch-cpu.lock", "image.lock"))
    assert without < with_cuda
    assert {re.match(r"[a-z]+", name)[0] for name in with_cuda - without} == {"cuda", "nvidia", "triton"}  # type: ignore[index]
    assert not image & with_cuda
    assert locked("torch-cpu.lock")["torch"][0] == Version(f"{locked('torch.lock')['torch'][0]}+cpu")
    # x86-64 and aarch64, Python 3.11 and 3.12
    assert len(locked("torch-cpu.lock")["torch"][1]) >= 4


def required_by(name: str, extras: set[str]) -> Iterator[Requirement]:
    """What an installed package needs on this machine."""
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield requirement


def test_the_image_s_locks_lack_no_dependency() -> None:
    pins = {name: version for lock in ("torch.lock", "image.lock") for name, (version, _) in locked(lock).items()}
    wanted = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["ray"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement}: run `make lock`"
        assert requirement.specifier.contains(pins[name], prereleases=True), (str(requirement), str(pins[name]))
        key = (name, frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            wanted += required_by(name, requirement.extras)
    assert len(seen) > 50


def test_constraints_are_past_the_floors_of_the_project() -> None:
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        pin = constraints()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin, prereleases=True), (str(requirement), str(pin))


def make(target: str, folder: Path, *variables: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    if path is not None:
        environment["PATH"] = path
    command = [str(shutil.which("make")), "--directory", str(folder), target, *variables]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def executable(file: Path, script: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


CONNECTION_ERROR = "echo 'requests.exceptions.ConnectionError: Failed to resolve' >&2; exit 1"


@pytest.mark.parametrize(
    ("script", "passes", "sentence"),
    [
        ("echo 'No known vulnerabilities found'", True, "No known vulnerabilities found"),
        ("echo 'aiohttp 3.11.0 PYSEC-2026-1'; echo 'Found 1 known vulnerability' >&2; exit 1", False, "Found 1 known"),
        (CONNECTION_ERROR, False, "audit: the vulnerability service cannot be reached: nothing was audited"),
    ],
)
def test_an_audit_passes_only_if_something_was_audited(
    script: str, passes: bool, sentence: str, tmp_path: Path
) -> None:
    executable(tmp_path / "bin" / "pip-audit", script)
    (tmp_path / ".installed").touch()
    done = make("audit", REPOSITORY, f"TOOLS={tmp_path}")
    assert (done.returncode == 0) == passes
    assert sentence in done.stdout + done.stderr
    audited = (tmp_path / "audited.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in audited]
    assert len(names) == len(set(names))
    assert set(constraints()) | set(locked("torch.lock")) <= set(names)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `make pin-base-image` reads."""
    for name in ("Makefile", "Dockerfile"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def test_the_base_image_is_pinned_to_the_digest_that_the_registry_gives(checkout: Path) -> None:
    executable(checkout / "bin" / "skopeo", f'echo "$@" > asked; echo {DIGEST}')
    done = make("pin-base-image", checkout, path=f"{checkout / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    before, after = (folder.joinpath("Dockerfile").read_text().splitlines() for folder in (REPOSITORY, checkout))
    ((old, new),) = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert old.partition("@")[0] == new.partition("@")[0] == "ARG BASE_IMAGE=python:3.11-slim"
    assert new.partition("@")[2] == DIGEST
    assert (checkout / "asked").read_text().endswith("docker://python:3.11-slim\n")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo sha256:0123; exit 0", "pin-base-image: no digest: sha256:0123"),
        ("exit 0", "pin-base-image: no digest"),
        (f"echo {DIGEST}; echo 'no such host' >&2; exit 1", "no such host"),
    ],
)
def test_an_answer_that_is_no_digest_leaves_the_dockerfile_as_it_is(script: str, sentence: str, checkout: Path) -> None:
    executable(checkout / "bin" / "skopeo", script)
    done = make("pin-base-image", checkout, path=f"{checkout / 'bin'}:{os.environ['PATH']}")
    assert done.returncode != 0
    assert sentence in done.stderr
    assert (checkout / "Dockerfile").read_text() == (REPOSITORY / "Dockerfile").read_text()
