"""Every kernel, compiled for GPUs that are not here: what it would need of them is read from the machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Blocks of the same kernel that fit a multiprocessor at once: fewer, and a decode step cannot keep enough loads on their way.
FEWEST_DECODE_PROGRAMS = 2
MOST_PREFILL_STACK = 0
# Bytes a thread: a value that is kept outside the loop.
MOST_DECODE_STACK = 16
# Keys and values of one tile, while another one is waited for.
FEWEST_COPIES_UNDER_WAY = 2


def compiled(tmp_path: Path, arch: list[int], match: list[str], timeout: float = 550) -> list[dict[str, Any]]:
    """Compile in a process of its own, for in this one Triton interprets."""
    output = tmp_path / "resources.json"
    command = [sys.executable, "-m", "pagoda_kernels.gpu.compilation", "--json", str(output)]
    command += ["--arch", *map(str, arch), "--match", *match]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    subprocess.run(command, env=environment, check=True, timeout=timeout, stdout=subprocess.DEVNULL)
    found: list[dict[str, Any]] = json.loads(output.read_text())
    assert found
    return found


def assert_fits(found: list[dict[str, Any]]) -> None:
    shared_limit = {75: 64 << 10, 80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
    for kernel in found:
        assert kernel["shared_bytes"] <= shared_limit[kernel["arch"]], kernel
        assert kernel["registers"] <= 255, kernel
        if kernel["is_decode"]:
            assert kernel["stack_bytes"] <= MOST_DECODE_STACK, f"spills: {kernel}"


@pytest.mark.timeout(600)
def test_decode_and_prefill_of_the_commonest_heads(tmp_path: Path) -> None:
    attention = "attention bfloat16 head_dim=128 heads_per_kv=4"
    names = [
        f"{attention}$",
        "rotate_and_store bfloat16 heads=32 head_dim=128 norm$",
        f"decode_{attention} kv=float8_e4m3fn$",
    ]
    found = compiled(tmp_path, [80, 90], names)
    assert_fits(found)
    plain = [kernel for kernel in found if " kv=" not in kernel["kernel"]]
    by_name = {(kernel["kernel"].split()[0], kernel["arch"]): kernel for kernel in plain}
    assert [kernel["arch"] for kernel in found if " kv=" in kernel["kernel"]] == [90]  # sm_80 cannot convert it
    for arch in (80, 90):
        decode, prefill = by_name["decode_attention", arch], by_name["prefill_attention", arch]
        registers = decode["registers"] * 32 * decode["num_warps"]
        assert (1 << 16) // registers >= FEWEST_DECODE_PROGRAMS
        assert prefill["stack_bytes"] <= MOST_PREFILL_STACK
        for kernel in (decode, prefill):
            assert kernel["copies_under_way"] >= FEWEST_COPIES_UNDER_WAY, f"each tile is waited for: {kernel}"
    assert by_name["prefill_attention", 90]["uses_wgmma"], "prefill does not use Hopper's matrix instructions"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [75, 80, 89, 90])
def test_every_tuned_configuration(tmp_path: Path, arch: int) -> None:
    assert_fits(compiled(tmp_path, [arch], [""], timeout=3500))


@pytest.mark.timeout(600)
def test_gated_delta_net(tmp_path: Path) -> None:
    assert_fits(compiled(tmp_path, [80, 90], ["(convolve|keep_inputs|delta_rule|gated_norm) bfloat16"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adapters(tmp_path: Path) -> None:
    assert_fits(compiled(tmp_path, [90], ["lora_.* bfloat16 inputs=4096"]))


@pytest.mark.timeout(600)
def test_experts_of_a_mixture(tmp_path: Path) -> None:
    found = compiled(tmp_path, [80, 90], ["expert_.* bfloat16 hidden_size=2048", "combine_experts hidden_size=2048"])
    assert_fits(found)
    for kernel in found:
        if "combine" not in kernel["kernel"]:
            assert kernel["copies_under_way"] >= FEWEST_COPIES_UNDER_WAY, f"each tile is waited for: {kernel}"
            assert kernel["uses_wgmma"] == (kernel["arch"] == 90)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_latent_attention(tmp_path: Path) -> None:
    names = ["_latent_attention bfloat16 heads=16", "rotate bfloat16", "reduce_latents heads=16"]
    found = compiled(tmp_path, [80, 89, 90], names)
    assert_fits(found)
    assert len(found) == 3 * 6
    assert all(kernel["stack_bytes"] == 0 for kernel in found)
