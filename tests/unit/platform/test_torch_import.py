"""What an engine's process leaves out of `import torch` is there once something needs it."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import sys
from pagoda.platform.torch_import import defer_meta_kernels

defer_meta_kernels()
import torch

assert "torch._prims" not in sys.modules, "nothing was left out"
module = sys.modules["torch._meta_registrations"]
assert module is torch._meta_registrations
assert callable(module.meta_index_Tensor)
assert "torch._prims" in sys.modules and sys.modules["torch._meta_registrations"] is module
print(torch.linalg.lu(torch.empty(3, 2, device="meta"))[0].shape)
"""


def test_what_is_left_out_of_torchs_import_comes_with_the_first_look_at_it() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([3, 3])"
