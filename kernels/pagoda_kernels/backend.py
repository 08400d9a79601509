"""Which backend the operations of this process run on. Chosen once, before the model is built."""

from __future__ import annotations

import importlib

from typing_extensions import override

from pagoda_kernels.interface import KernelBackend

# Name of a backend to the module that holds it as `BACKEND`. Imported when chosen: a backend may need a compiler or a GPU.
BACKENDS = {
    "reference": "pagoda_kernels.reference",
    "cpu": "pagoda_kernels.cpu.operators",
    "triton": "pagoda_kernels.gpu.operators",
}


class _NotChosen(KernelBackend):
    """Before `use_backend`. There is no default, which would be the slow reference wherever the choice is forgotten."""

    name = "none"

    @override
    def _not_implemented(self, operation: str) -> NotImplementedError:
        return NotImplementedError(
            f"no kernel backend is chosen: call pagoda_kernels.backend.use_backend before {operation}; "
            f"known: {', '.join(sorted(BACKENDS))}"
        )


NOT_CHOSEN = _NotChosen()

active: KernelBackend = NOT_CHOSEN
"""What the engine calls operations on, as `backend.active.rms_norm(…)`."""


def use_backend(name: str) -> KernelBackend:
    """Make the backend of that name the active one of this process, and return it.

    Raises `ValueError` with the known names for an unknown one, and `BuildError` for `cpu` where its library can neither be
    found nor built.
    """
    global active
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(sorted(BACKENDS))}")
    backend: KernelBackend = importlib.import_module(BACKENDS[name]).BACKEND
    active = backend
    return active
