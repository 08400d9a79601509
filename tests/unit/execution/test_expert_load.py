"""How the load of experts is measured: by what mixtures count, over intervals."""

from __future__ import annotations

import pytest
import torch

from pagoda.execution.expert_load import INTERVAL_SECONDS, ExpertLoadMeter, measured
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.layers.moe import MixtureOfExperts
from pagoda.models.loading.loader import initialize_dummy_weights
from pagoda_kernels import backend
from tests.support.cpu_kernels import require_cpu_kernels
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import family_config
from tests.support.virtual_time import Clock

require_cpu_kernels()

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")


def test_figures_of_two_layers_of_four_experts_on_two_ranks() -> None:
    load = measured(torch.tensor([[4.0, 4.0, 4.0, 4.0], [12.0, 4.0, 0.0, 0.0]]).double(), 2)
    assert load is not None
    assert (load.imbalance, load.worst_imbalance) == ((1 + 3) / 2, 3)
    assert load.idle_share == 2 / 8
    assert load.rank_imbalance == (1 + 2) / 2
    assert measured(torch.zeros(2, 4).double(), 2) is None, "nothing ran"


def test_a_meter_reports_each_interval_by_itself() -> None:
    clock, counter = Clock(), torch.zeros(4, dtype=torch.int64)
    meter = ExpertLoadMeter([counter], 1, clock)
    counter += torch.tensor([2, 2, 2, 2])
    assert meter.take() is None, "not yet"
    clock.advance(INTERVAL_SECONDS)
    assert meter.take() is None, "asked for now, and taken at the next one"
    counter += torch.tensor([8, 0, 0, 0])
    clock.advance(INTERVAL_SECONDS)
    first = meter.take()
    assert first is not None
    assert (first.imbalance, first.idle_share) == (1.0, 0.0)
    clock.advance(INTERVAL_SECONDS)
    second = meter.take()
    assert second is not None
    assert (second.imbalance, second.idle_share) == (4.0, 0.75)
    assert meter.take() is None


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_every_row_counts_once_for_each_expert_that_it_chose(kernels: str) -> None:
    backend.use_backend(kernels)
    config = ModelConfig.from_dicts({**family_config("qwen2-moe").to_dict(), "architectures": []})
    model = build_model(config, torch.float32, packed=kernels == "cpu")
    initialize_dummy_weights(model, std=0.1)
    fuse_layers(model)
    layer = next(module for module in model.modules() if isinstance(module, MixtureOfExperts))
    assert (layer.fused is None) == (kernels == "reference")
    x = torch.randn(23, config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        _, ids = layer.router(x)
        layer(x[:20])
        layer(x[20:])
    assert torch.equal(layer.load, torch.bincount(ids.flatten(), minlength=layer.config.num_experts))
