"""The operations in torch: what the other backends are tested against, and what `cpu_kernels=reference` runs on."""

from __future__ import annotations

from pagoda_kernels.reference.attention import ReferenceAttention
from pagoda_kernels.reference.delta_net import ReferenceDeltaNet
from pagoda_kernels.reference.elementwise import ReferenceElementwise
from pagoda_kernels.reference.encoder import ReferenceEncoder
from pagoda_kernels.reference.experts import ReferenceExperts
from pagoda_kernels.reference.linear import ReferenceLinear
from pagoda_kernels.reference.lora import ReferenceLora
from pagoda_kernels.reference.sampling import ReferenceSampling
from pagoda_kernels.reference.step import ReferenceStep


class ReferenceBackend(
    ReferenceAttention,
    ReferenceDeltaNet,
    ReferenceElementwise,
    ReferenceExperts,
    ReferenceEncoder,
    ReferenceLinear,
    ReferenceLora,
    ReferenceSampling,
    ReferenceStep,
):
    """Everything but the two operations that would only save launches: `fused_decoder`, `sample_top_p_by_rejection`."""

    name = "reference"


BACKEND = ReferenceBackend()
