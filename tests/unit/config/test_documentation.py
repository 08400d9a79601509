"""What the documents say is what the code does, as far as a test can see."""

import re
import tomllib
from pathlib import Path

from pagoda.config.documentation import configuration_page

ROOT = Path(__file__).parents[3]


def test_the_configuration_page_is_current() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run `make docs`"


def test_ci_runs_the_test_command_that_the_readme_names() -> None:
    assert "\nmake test test-pods\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").rstrip().endswith("make test test-pods")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_links_between_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_constraints_pin_every_requirement_without_local_versions() -> None:
    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    pins = dict(re.fullmatch(r"([a-z0-9.-]+)==([0-9a-zA-Z.]+)", line).groups() for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9-]+", requirement).group().lower() for requirement in required}
    assert not names - set(pins)
