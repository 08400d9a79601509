from __future__ import annotations

import pytest
import torch
from typing_extensions import override

from pagoda.models.layer_config import NormConfig
from pagoda.models.layers.norm import RMSNorm
from pagoda_kernels import backend
from pagoda_kernels.interface import KernelBackend
from tests.support.cpu_kernels import require_cpu_kernels
from tests.support.kernel_backends import using_backend

CPU = torch.device("cpu")


class Doubled(KernelBackend):
    """A backend with a single operation."""

    name = "doubled"

    @override
    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


# No operations, or such as every backend has from its base.
OTHERS = ("implements", "reserve_workspace", "short_query_len", "max_short_rows")


def unset(kernels: KernelBackend) -> set[str]:
    operations = [name for name in vars(KernelBackend) if not name.startswith("_") and callable(getattr(kernels, name))]
    return {name for name in operations if name not in OTHERS and not kernels.implements(name)}


def test_what_a_backend_does_not_override_is_refused_by_name() -> None:
    kernels = Doubled()
    assert kernels.silu_and_mul(torch.ones(2)).tolist() == [2.0, 2.0]
    with pytest.raises(NotImplementedError, match="the kernel backend 'doubled' does not implement gelu_and_mul"):
        kernels.gelu_and_mul(torch.ones(2))


def test_each_backend_implements_what_its_device_runs_and_inherits_nothing() -> None:
    assert unset(Doubled()) > {"gather_step", "paged_attention", "gelu_and_mul"}
    with using_backend("reference") as kernels:
        assert unset(kernels) == {"fused_decoder", "fused_experts", "sample_top_p_by_rejection"}


def test_the_compiled_backend_implements_all_that_runs_on_a_cpu() -> None:
    # Packed experts are `fused_experts`.
    assert unset(require_cpu_kernels()) == {"sample_top_p_by_rejection", "grouped_experts"}


def test_the_triton_backend_implements_all_that_a_model_of_floats_runs() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    with using_backend("triton") as kernels:
        # Layers call rotate_and_store, which writes; the others are for packed weights, which a GPU refuses.
        assert unset(kernels) == {
            "write_kv",
            "packed_linear",
            "packed_linear_heads",
            "packed_rows",
            "pack",
            "fused_decoder",
            "fused_experts",
        }
        with pytest.raises(NotImplementedError, match="the kernel backend 'triton' does not implement write_kv"):
            kernels.write_kv(*[torch.zeros(1, 1, 2)] * 2, *[torch.zeros(1, 1, 1, 2)] * 2, torch.zeros(1).long())


def test_no_operation_runs_before_a_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "active", backend.NOT_CHOSEN)
    norm = RMSNorm(2, NormConfig(eps=1e-6), dtype=torch.float32, device=CPU)
    with pytest.raises(NotImplementedError, match=r"call .*use_backend before rms_norm; known: cpu, reference, triton"):
        norm(torch.ones(1, 2))


def test_layers_call_the_backend_that_was_chosen_last(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(KernelBackend):
        name = "constant"

        @override
        def rms_norm(
            self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full_like(x, 7.0), x

    norm = RMSNorm(2, NormConfig(eps=0.0), dtype=torch.float32, device=CPU)
    norm.weight.data.fill_(1.0)
    with using_backend("reference"):
        assert norm(torch.full((1, 2), 3.0))[0].tolist() == [[1.0, 1.0]]
        monkeypatch.setattr(backend, "active", Constant())
        assert norm(torch.full((1, 2), 3.0))[0].tolist() == [[7.0, 7.0]]


def test_unknown_backend_names_the_known_ones() -> None:
    before = backend.active
    with pytest.raises(ValueError, match=r"'abacus'.*reference"):
        backend.use_backend("abacus")
    assert backend.active is before
