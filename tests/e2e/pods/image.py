"""What stands for the release's image: a bare Python with this checkout and its packages mounted, or an image that is built.

`TEST_POD_IMAGE` names a built one. Otherwise `TEST_POD_BASE_IMAGE` is taken, by default the official Python image of this
interpreter's version; `make_base_image.sh` makes that one out of Debian's packages where no registry can be reached.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.pods.podman import missing_tools

REPOSITORY = Path(__file__).parents[3]
_PACKAGES = "/opt/packages"
_SOURCE = "/opt/source"
_SCRIPT = "#!/usr/bin/env python3\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
_SCRIPTS = {"pagoda": "pagoda.cli.main", "ray": "ray.scripts.scripts"}


@dataclass(frozen=True)
class Image:
    """What the containers of the rendered pods are made of. `entrypoint` and `user` None: the image's own."""

    name: str
    entrypoint: list[str] | None = None
    user: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    mounts: list[str] = field(default_factory=list)


def why_not() -> str | None:
    """Why pods cannot run here; None if they can."""
    reason = missing_tools()
    if reason is None and subprocess.run(["podman", "image", "exists", _name()]).returncode:
        reason = f"no image {_name()} here: pull it, or run tests/e2e/pods/make_base_image.sh"
    return reason


def _name() -> str:
    base = f"docker.io/library/python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    return os.environ.get("TEST_POD_IMAGE") or os.environ.get("TEST_POD_BASE_IMAGE") or base


def pagoda_image(folder: Path) -> Image:
    """The image for this test run; `folder` is for its scripts."""
    if "TEST_POD_IMAGE" in os.environ:
        return Image(_name())
    scripts = folder / "bin"
    scripts.mkdir(exist_ok=True)
    for name, module in _SCRIPTS.items():
        (scripts / name).write_text(_SCRIPT.format(module=module))
        (scripts / name).chmod(0o755)
    return Image(
        _name(),
        entrypoint=["pagoda"],
        user="10001:0",
        environment={
            "PATH": f"{_SOURCE}/bin:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": f"{_SOURCE}/runtime:{_SOURCE}/kernels:{_PACKAGES}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": "/cache",
            "XDG_CACHE_HOME": "/cache",
            "HF_HOME": "/cache/huggingface",
        },
        mounts=[
            f"{sysconfig.get_path('purelib')}:{_PACKAGES}:ro",
            f"{REPOSITORY / 'runtime'}:{_SOURCE}/runtime:ro",
            f"{REPOSITORY / 'kernels'}:{_SOURCE}/kernels:ro",
            f"{scripts}:{_SOURCE}/bin:ro",
        ],
    )
