"""Resource usage of a compiled kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping

import triton


def resource_usage(cubin: bytes) -> Mapping[str, int]:
    """The output of `cuobjdump --dump-resource-usage` for the only function in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
