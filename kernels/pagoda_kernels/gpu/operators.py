"""The Triton kernels as a backend."""

from __future__ import annotations

from pagoda_kernels.gpu.attention import TritonAttention
from pagoda_kernels.gpu.elementwise import TritonElementwise
from pagoda_kernels.gpu.sampling import TritonSampling
from pagoda_kernels.gpu.step import TritonStep


class TritonBackend(TritonAttention, TritonElementwise, TritonSampling, TritonStep):
    """What models with float weights run on a GPU.

    Not implemented: `write_kv` and `apply_rotary`, both of which `rotate_and_store` does; packed weights, which only
    quantized models would have here (`check_device` refuses them); `fused_decoder`, in whose place CUDA graphs are.
    """

    name = "triton"


BACKEND = TritonBackend()
