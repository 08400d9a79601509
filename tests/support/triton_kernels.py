"""The Triton kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pagoda_kernels.interface import KernelBackend
from tests.support.kernel_backends import using_backend


def require_interpreter() -> None:
    """Skip the module if Triton is not there, or compiles for a GPU instead of interpreting."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for a GPU here (TRITON_INTERPRET=0)", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> Iterator[KernelBackend]:
    """The Triton kernels, active while a module's tests run."""
    with using_backend("triton") as active:
        yield active


@pytest.fixture
def float8_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round float32 to float8 as GPUs and torch do: its own way loses a carry, and takes ties up."""
    from triton.runtime import interpreter

    types = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
    convert = interpreter._convert_float

    def rounded(numbers: Any, input_type: Any, output_type: Any, rounding: Any) -> Any:
        if str(input_type) == "fp32" and str(output_type) in types:
            values = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))
            return values.to(types[str(output_type)]).view(torch.uint8).numpy()
        return convert(numbers, input_type, output_type, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
