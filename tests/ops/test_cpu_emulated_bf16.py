"""The bfloat16 products of AVX512-BF16, written out in AVX-512: their code tested where the instruction is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cpu_kernels import require_cpu_kernels

require_cpu_kernels()

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import pytest
from pagoda_kernels.cpu import build
emulated = build.library(emulate_bf16=True)
build.library = lambda: emulated
from pagoda_kernels.cpu import operators
if operators.available_levels()[-1] != "avx512_bf16":
    sys.exit(77)
operators.use_level("avx512_bf16")  # which Intel's processors do not take by themselves
names = ["test_cpu_attention.py", "test_cpu_linear.py", "test_cpu_parity.py", "test_float32_output.py"]
chosen = ["-k", "fastest and (bfloat16 or bits or half or dtype) or float32_output and avx512_bf16"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *("tests/ops/" + name for name in names), *chosen]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bfloat16_products_in_pairs_match_the_reference() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("emulation needs AVX-512 with VNNI")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
