"""Pagoda: an LLM serving runtime for Kubernetes around its own paged-attention engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagoda.version import __version__

if TYPE_CHECKING:
    from pagoda.adapters import LoRARequest
    from pagoda.llm import LLM
    from pagoda.sampling.params import SamplingParams
    from pagoda.structured.spec import GrammarSpec

__all__ = ["LLM", "GrammarSpec", "LoRARequest", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    # Lazy, so that `pagoda probe` and the API process do not pay for torch.
    if name == "LLM":
        from pagoda.llm import LLM

        return LLM
    if name == "SamplingParams":
        from pagoda.sampling.params import SamplingParams

        return SamplingParams
    if name == "GrammarSpec":
        from pagoda.structured.spec import GrammarSpec

        return GrammarSpec
    if name == "LoRARequest":
        from pagoda.adapters import LoRARequest

        return LoRARequest
    raise AttributeError(f"module 'pagoda' has no attribute {name!r}")
