"""Packages whose import is put off: nobody sees a difference but in time and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.serving.deferred_imports import deferred_imports

KSERVE = """
import sys
sys.argv = ["kserve"]
from pagoda.serving.deferred_imports import deferred_imports
from pagoda.serving.server import UNUSED_BY_US
with deferred_imports(*UNUSED_BY_US):
    import kserve
assert not {*UNUSED_BY_US, "torch"} & {*sys.modules}, "imported all the same"
from kserve.api import kserve_client, watch
from kserve.protocol.infer_type import InferInput, InferRequest
frame = InferRequest("m", [InferInput("a", [2], "INT32", data=[1, 2])]).as_dataframe()
import pandas, kubernetes
assert isinstance(frame, pandas.DataFrame)
assert kserve_client.client.CustomObjectsApi is kubernetes.client.CustomObjectsApi
assert watch.k8s_watch.Watch is kubernetes.watch.Watch
assert kserve.utils.is_structured_cloudevent({}) is False
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that imports from a package, which sets a flag in `sys` when it is imported."""
    package = tmp_path / "put_off"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\nsys.is_put_off_here = True\ndef double(x): return 2 * x\nclass Frame: pass\n"
    )
    (package / "part.py").write_text("class Thing: pass\n")
    (tmp_path / "user_of_put_off.py").write_text(
        "import put_off as p\nfrom put_off import double, part\n\n"
        "def twice(x: p.Frame) -> p.Frame:\n    return double(x)\n\n"
        "def thing():\n    return part.Thing()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "is_put_off_here", False, raising=False)
    yield "user_of_put_off"
    for name in [name for name in sys.modules if name.split(".")[0] in ("put_off", "user_of_put_off")]:
        del sys.modules[name]


def test_a_package_is_imported_when_something_of_it_is_used(user: str) -> None:
    with deferred_imports("put_off"):
        module = __import__(user)
    assert not sys.is_put_off_here  # type: ignore[attr-defined]
    assert "put_off" not in sys.modules
    assert module.twice(4) == 8
    assert sys.is_put_off_here  # type: ignore[attr-defined]
    assert type(module.thing()).__module__ == "put_off.part"
    assert module.p.double is sys.modules["put_off"].double


def test_a_package_that_is_there_stays_what_it_is(user: str) -> None:
    there = __import__("put_off")
    with deferred_imports("put_off"):
        assert __import__(user).p is there
    assert sys.modules["put_off"] is there


def test_a_package_that_is_called_while_it_is_put_off_is_imported_after_all(user: str) -> None:
    with deferred_imports("put_off"):
        module = __import__(user)
        assert module.twice(3) == 6
        there = __import__("put_off")
        assert type(module.thing()).__module__ == "put_off.part"
    assert sys.modules["put_off"] is there
    assert module.p.double is there.double


def test_a_package_that_does_not_exist_is_missed_when_it_is_used() -> None:
    with deferred_imports("no_such_package"):
        stand_in = sys.modules["no_such_package"]
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        _ = stand_in.anything


def test_kserve_has_its_data_frames_and_its_client_of_clusters() -> None:
    done = subprocess.run([sys.executable, "-c", KSERVE], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
