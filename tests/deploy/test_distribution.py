"""`make dist`: a wheel and a source distribution that hold all of both packages, installed and serving by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

from pagoda import __version__
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"pagoda_serving-{__version__}"
START_SECONDS = 120


def tracked(*folders: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` makes, of a copy: the build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked("runtime", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    recipe = re.search(r"^dist: .*\n\t\$\(BIN\)/python (.*) \.$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    done = subprocess.run([sys.executable, *recipe[1].split(), "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


def test_both_hold_every_file_of_both_packages(dist: Path) -> None:
    assert {path.name for path in dist.iterdir()} == {f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"}
    packaged = {name.partition("/")[2] for name in tracked("runtime", "kernels")}
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
        licences = [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert in_wheel == packaged
    assert licences
    assert f"Name: {PROJECT['name']}\n" in metadata
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        in_archive = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in tracked("runtime", "kernels") if name not in in_archive}
    assert missing == set()
    assert {"pyproject.toml", "README.md", "LICENSE"} <= in_archive


def test_a_fresh_environment_serves_the_demo_model(dist: Path, tmp_path: Path) -> None:
    """What the package depends on is this environment's, in place of an index."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    (own,) = (environment / "lib").glob("python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(dist / f"{NAME}-py3-none-any.whl")], check=True)
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    variables = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    where = [str(environment / "bin/python"), "-c", "import pagoda, pagoda_kernels; print(pagoda.__file__)"]
    found = subprocess.run(where, cwd=home, env=variables, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(own))
    # torch's own operations: the C++ ones would be compiled now, for a minute (tests/ops/test_cpu_build.py).
    options = ["--host=127.0.0.1", f"--http-port={port}", "--grpc-port=0", "--cpu-kernels=reference", "--threads=1"]
    command = [str(environment / "bin/pagoda"), "serve", *options, "--kv-cache-memory-bytes=32MiB"]
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(command, cwd=home, env=variables, stdout=log, stderr=log)
        try:
            body = {"text_input": "Once upon", "parameters": {"max_tokens": 4}}
            deadline = time.monotonic() + START_SECONDS
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                while not _is_ready(client):
                    assert server.poll() is None, Path(log.name).read_text()
                    assert time.monotonic() < deadline, Path(log.name).read_text()
                    time.sleep(0.2)
                assert client.post("/v2/models/demo/generate", json=body).json()["text_output"]
                assert client.get("/docs/swagger-ui-bundle.js").status_code == 200
        finally:
            server.terminate()
            assert server.wait(30) == 0


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_no_document_says_to_install_what_is_not_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "runtime").rglob("*.py")]
    for page in pages:
        assert not re.search(r"pip install '?pagoda\b(?!_serving)", page.read_text()), page
