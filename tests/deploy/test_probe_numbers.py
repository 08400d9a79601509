"""Periods, timeouts and thresholds of the probes are the same in chart, manifests, `pagoda deploy` and docs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pagoda.cli import deploy
from tests.support.chart import render, server_container

ROOT = Path(__file__).parents[2]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
NUMBERS = ("periodSeconds", "timeoutSeconds", "failureThreshold")


def numbers(container: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {probe: tuple(container[probe][number] for number in NUMBERS) for probe in PROBES}


def containers_in(value: Any) -> Iterator[dict[str, Any]]:
    """Everything with probes of Pagoda's in a document."""
    if isinstance(value, dict):
        if "startupProbe" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from containers_in(item)


def test_the_numbers_are_the_chart_s_everywhere(capsys: Any) -> None:
    expected = numbers(server_container(render({})))
    found = {}
    for path in sorted((ROOT / "manifests").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            for index, container in enumerate(containers_in(document)):
                found[f"{path.relative_to(ROOT)} {index}"] = numbers(container)
    for page in (ROOT / "docs").glob("*.md"):
        for index, block in enumerate(re.findall(r"```yaml\n(startupProbe:.*?)```", page.read_text(), re.DOTALL)):
            found[f"{page.name} {index}"] = numbers(yaml.safe_load(block))
    assert deploy.run(["--dry-run", "--image", "pagoda:test"]) == 0
    for document in yaml.safe_load_all(capsys.readouterr().out):
        for container in containers_in(document):
            found["pagoda deploy"] = numbers(container)
    assert {name for name in found if name.endswith(".md 0")} == {"operations.md 0"}
    assert "pagoda deploy" in found
    assert sum(name.startswith("manifests/") for name in found) >= 4
    assert {name: value for name, value in found.items() if value != expected} == {}
