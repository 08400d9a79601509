"""Loading a checkpoint takes little more memory than its weights do in the end, whatever they are made of meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda.models.dummy import DummySpec
from tests.support.checkpoints import shared_checkpoint
from tests.support.cpu_kernels import require_cpu_kernels

require_cpu_kernels()

MIB = 2**20
BASE_BYTES = 56 * MIB
"""Pages of libraries, mapped pieces of the file and what malloc keeps for two threads; far below the weights as floats."""
SPEC = DummySpec(
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=5,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=24000,
    tie_word_embeddings=True,
    dtype="bfloat16",
    num_shards=2,
)
LOAD = """
import json, sys
from pathlib import Path
import torch
from pagoda.execution.kernel_choice import choose_cpu_kernels, packs_weights
from pagoda.models.config import ModelConfig
from pagoda.models.loading.loader import load_weights
from pagoda.models.loading.packed import weight_bytes
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.models.build import build_model

def resident_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

directory, dtype, kind = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] or None
torch.set_num_threads(2)
choose_cpu_kernels("compiled")
config = ModelConfig.from_directory(directory)
quantization = choose_quantization(kind, None, None, config.linear_input_sizes)
before = resident_bytes("VmRSS")
model = build_model(config, dtype, "cpu", quantization=quantization, packed=packs_weights(dtype))
load_weights(model, directory)
print(json.dumps({"weights": weight_bytes(model), "growth": resident_bytes("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return shared_checkpoint(SPEC)


@pytest.mark.parametrize(
    ("dtype", "kind", "bytes_per_weight"),
    [("float32", "", 2.0), ("bfloat16", "", 2.0), ("float32", "int8", 1.0), ("bfloat16", "int4", 0.75)],
)
def test_loading_peaks_little_above_the_weights_as_they_are_kept(
    checkpoint: Path, dtype: str, kind: str, bytes_per_weight: float
) -> None:
    command = [sys.executable, "-c", LOAD, str(checkpoint), dtype, kind]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    num_weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 2
    assert num_weights > 90e6
    assert figures["weights"] <= 1.02 * bytes_per_weight * num_weights
    assert figures["growth"] <= 1.3 * figures["weights"] + BASE_BYTES
