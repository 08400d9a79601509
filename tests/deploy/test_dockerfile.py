"""The Dockerfile, as far as it can be judged without building it; `make test-image` builds and runs the CPU target."""

import re
from pathlib import Path

import pytest
import yaml

from tests.support.chart import CHART

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "Dockerfile").read_text()
INSTRUCTIONS = [line for line in re.sub(r"\\\n\s*", "", TEXT).splitlines() if line and not line.startswith("#")]


def stages() -> dict[str, list[str]]:
    """The instructions of each stage by its name."""
    found: dict[str, list[str]] = {}
    for line in INSTRUCTIONS:
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = [*found.get(match[1], [])]
        elif found:
            found[list(found)[-1]].append(line)
    return found


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) < 70


def test_every_stage_comes_from_the_base_image_or_another_stage() -> None:
    bases = re.findall(r"^FROM (\S+) AS (\S+)", TEXT, re.M)
    known = {"${BASE_IMAGE}"}
    for base, name in bases:
        assert base in known
        known.add(name)
    # The one name of an image, without a registry, and by its digest.
    assert re.search(r"^ARG BASE_IMAGE=python:3\.1[12]-slim@sha256:[0-9a-f]{64}$", TEXT, re.M)


def test_what_comes_from_an_index_is_hashed_and_nothing_else_is_fetched() -> None:
    assert 'ARG LOCKED="--require-hashes --no-deps --no-build-isolation"' in INSTRUCTIONS
    runs = [line.removeprefix("RUN ") for line in INSTRUCTIONS if line.startswith("RUN ")]
    installs = [part for run in runs for part in run.split(" && ") if "pip install" in part]
    assert len(installs) == 4
    for install in installs:
        from_lock = re.search(r"install \$\{LOCKED\} \$\{PIP_ARGS\} --requirement requirements/(\S+)$", install.strip())
        assert from_lock or install.strip().endswith("install --no-deps --no-build-isolation ."), install
    assert "pip check" in "\n".join(stages()["build"])


def test_the_image_has_an_sbom_of_what_is_installed() -> None:
    text = "\n".join(stages()["build"])
    assert re.search(
        r"cyclonedx-py environment .*--output-file /opt/pagoda/sbom\.cdx\.json /opt/pagoda/bin/python", text
    )
    assert text.index("install --no-deps --no-build-isolation .") < text.index("cyclonedx-py environment")


def test_the_default_target_is_for_cpus() -> None:
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_standard_library_is_compiled_while_root_may_write_it(target: str) -> None:
    text = "\n".join(stages()[target])
    assert "compileall" in text
    assert text.index("compileall") < text.index("USER 10001")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_nobody_special_with_its_caches_in_one_volume(target: str) -> None:
    lines = stages()[target]
    users = [line for line in lines if line.startswith("USER")]
    assert users[-1] == "USER 10001"
    assert "VOLUME /cache" in lines
    environment = " ".join(line for line in lines if line.startswith("ENV"))
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        assert re.search(rf"\b{name}=/cache", environment), name
    assert 'ENTRYPOINT ["pagoda"]' in lines
    assert any(line.startswith("HEALTHCHECK") and '"pagoda", "probe", "ready"' in line for line in lines)
    labels = " ".join(line for line in lines if line.startswith("LABEL"))
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert lines[-1].startswith("COPY --from=build")


def test_only_the_cuda_target_has_what_gpus_need() -> None:
    assert not any("NVIDIA" in line for line in stages()["cpu"])
    assert any("NVIDIA_VISIBLE_DEVICES=all" in line for line in stages()["cuda"])
    assert not any("gcc" in line for line in stages()["cpu"])


def test_user_and_group_are_the_chart_s() -> None:
    security = yaml.safe_load((CHART / "values.yaml").read_text())["security"]
    assert f"useradd --uid {security['runAsUser']} " in TEXT


def test_every_file_that_is_copied_reaches_the_builder() -> None:
    shown = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for line in INSTRUCTIONS:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (REPOSITORY / source).exists()
                assert f"!{source}" in shown
