"""Which implementation the public operations call. Chosen once, before the model runs."""

from __future__ import annotations

import importlib

from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend

# Name of a backend to the package that holds it as `BACKEND`. Imported when chosen: a backend may need a compiler or a GPU.
BACKENDS = {
    "reference": "pagoda_kernels.reference",
    "cpu": "pagoda_kernels.cpu.operators",
    "triton": "pagoda_kernels.gpu.operators",
}

active: KernelBackend = reference.BACKEND


def use_backend(name: str) -> KernelBackend:
    """Let every public operation of this process call backend `name` from now on, and return it.

    Raises `ValueError` with the known names for an unknown one, and `BuildError` for `cpu` where its library can neither be
    found nor built.
    """
    global active
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(sorted(BACKENDS))}")
    active = importlib.import_module(BACKENDS[name]).BACKEND
    return active
