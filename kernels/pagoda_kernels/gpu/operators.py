"""The Triton kernels as a backend."""

from __future__ import annotations

from pagoda_kernels.gpu.attention import TritonAttention
from pagoda_kernels.gpu.delta_net import TritonDeltaNet
from pagoda_kernels.gpu.elementwise import TritonElementwise
from pagoda_kernels.gpu.experts import TritonExperts
from pagoda_kernels.gpu.latent_attention import TritonLatentAttention
from pagoda_kernels.gpu.lora import TritonLora
from pagoda_kernels.gpu.sampling import TritonSampling
from pagoda_kernels.gpu.step import TritonStep
from pagoda_kernels.reference.encoder import ReferenceEncoder


class TritonBackend(
    TritonAttention,
    TritonDeltaNet,
    TritonElementwise,
    TritonExperts,
    TritonLatentAttention,
    TritonLora,
    TritonSampling,
    TritonStep,
    ReferenceEncoder,
):
    """What models with float weights run on a GPU; encoders, by torch's own operations, row after row.

    Not implemented: `write_kv`, which `rotate_and_store` does; packed weights, which only quantized models would have here
    (`check_device` refuses them); `fused_decoder`, in whose place CUDA graphs are.
    """

    name = "triton"


BACKEND = TritonBackend()
