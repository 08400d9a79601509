from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from pagoda.errors import ConfigError
from pagoda.execution.kernel_choice import choose_cpu_kernels
from pagoda_kernels import backend
from pagoda_kernels.cpu import build
from pagoda_kernels.cpu.build import BuildError
from tests.support.cpu_kernels import require_cpu_kernels


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is in the package, and the cache is an empty directory."""
    monkeypatch.setattr(build, "PACKAGE_LIBRARIES", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def fake_compiler(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes the name of its output into it, and its calls into a file."""
    compiler = no_library / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {no_library}/calls\n'
        'while [ "$1" != "-o" ]; do [ "$1" = "--version" ] && exit 0; shift; done\n'
        'echo compiled > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return no_library / "calls"


def test_library_is_compiled_once_into_the_cache(fake_compiler: Path) -> None:
    first = build.library()
    assert first.read_text() == "compiled\n"
    assert first.is_relative_to(os.environ["XDG_CACHE_HOME"])
    calls = fake_compiler.read_text().count(" -c ")
    assert calls == len(build.UNITS)
    assert build.library() == first
    assert fake_compiler.read_text().count(" -c ") == calls
    assert [path.name for path in first.parent.iterdir() if path.suffix != ".so"] == ["lock"]


def test_library_of_the_package_comes_before_the_cache(fake_compiler: Path) -> None:
    installed = build.build_into_package()
    calls = fake_compiler.read_text()
    assert build.library() == installed
    assert build.build_into_package() == installed
    assert fake_compiler.read_text() == calls


def test_other_sources_need_another_library(
    fake_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.library()
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "kernels.h").write_text("other")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.library() != first


def test_every_unit_without_torch_has_a_namespace_of_its_own() -> None:
    own = [(unit.source, unit.isa) for unit in build.UNITS if unit.isa]
    assert len(set(own)) == len(own)
    for unit in build.UNITS:
        assert (build.SOURCES / unit.source).exists()


def test_a_failing_compiler_is_quoted(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = no_library / "compiler"
    compiler.write_text("#!/bin/sh\necho 'kernels.h:1: error: no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(BuildError, match="no such instruction"):
        build.library()
    assert not list((no_library / "cache").rglob("*.so"))


def test_cache_that_others_can_write_is_not_used(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = no_library / "cache" / "pagoda" / "kernels"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv("HOME", str(no_library / "home"))
    assert build._cache_directory() == no_library / "home" / ".cache" / "pagoda" / "kernels"


def test_without_a_writable_home_the_cache_is_private_and_temporary(
    no_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = no_library / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("HOME", str(blocked))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(no_library))
    directory = build._cache_directory()
    assert directory == no_library / f"pagoda-{os.getuid()}"
    assert directory.stat().st_mode & 0o077 == 0


def test_without_a_compiler_the_reference_kernels_run_and_a_warning_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise BuildError("there is no C++ compiler")

    used: list[str] = []
    monkeypatch.setattr(backend, "use_backend", lambda name: missing(name) if name == "cpu" else used.append(name))
    with caplog.at_level(logging.WARNING):
        choose_cpu_kernels("auto")
    assert used == ["reference"]
    assert [record.getMessage() for record in caplog.records] == [
        "the compiled CPU kernels are not available (there is no C++ compiler): falling back to the reference kernels in "
        "torch, at half the speed or less"
    ]
    with pytest.raises(ConfigError, match=r"cpu_kernels=compiled: there is no C\+\+ compiler"):
        choose_cpu_kernels("compiled")


def test_a_processor_without_avx2_runs_the_reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    require_cpu_kernels()
    monkeypatch.setattr("pagoda_kernels.cpu.operators.available_levels", list)
    choose_cpu_kernels("auto")
    assert backend.active.name == "reference"
    with pytest.raises(ConfigError, match="cpu_kernels=compiled: this processor has no AVX2"):
        choose_cpu_kernels("compiled")


def test_processors_of_intel_do_not_multiply_bfloat16_pairs_by_themselves() -> None:
    require_cpu_kernels()
    from pagoda_kernels.cpu.operators import active_level, available_levels

    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    fast = [level for level in available_levels() if not (is_intel and level == "avx512_bf16")]
    assert active_level() == fast[-1]


def test_other_processors_have_no_compiled_kernels(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(BuildError, match="x86-64, this machine is aarch64"):
        build.library()
