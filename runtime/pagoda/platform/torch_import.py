"""What of `import torch` an engine on a CPU does not need, until something does.

`torch._meta_registrations` and what it alone imports (`torch._prims`, `torch._refs`, decompositions) are a quarter of
torch's import. They tell the shapes of operations on the device `meta` and for `torch.compile`, and no step of Pagoda's own
models asks for either. In the processes that compute, the module is therefore there without its content, which comes with
the first look at one of its names, or with the import of what looks up such shapes (`_NEEDED_BY`). Building a model on the
device `meta`, as the check of a checkpoint does, needs none of it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from typing_extensions import override

_META_KERNELS = "torch._meta_registrations"
_NEEDED_BY = frozenset({"transformers", "torch._dynamo", "torch._inductor"})


def defer_meta_kernels() -> None:
    """From here on `import torch` leaves out what describes operations without running them. Not where torch is imported."""
    if "torch" not in sys.modules and not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _load_meta_kernels() -> None:
    module = sys.modules.get(_META_KERNELS)
    if isinstance(module, _DeferredModule):
        module.load()


class _DeferredModule(ModuleType):
    """A module whose code has not run. It stays the same object when it has."""

    def __init__(self, name: str, loader: Loader) -> None:
        super().__init__(name)
        self.__dict__["_pending"] = (loader, threading.RLock())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        self.load()
        return getattr(self, name)

    def load(self) -> None:
        """Run the code, once; other threads wait for it, and the code itself sees what it has defined so far."""
        loader, lock = self.__dict__["_pending"]
        with lock:
            if self.__class__ is _DeferredModule:
                self.__class__ = ModuleType  # type: ignore[assignment]
                loader.exec_module(self)


class _DeferringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredModule(spec.name, self._loader)

    @override
    def exec_module(self, module: ModuleType) -> None:
        pass  # later


class _Finder(MetaPathFinder):
    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _NEEDED_BY:
            importlib.import_module("torch")
            _load_meta_kernels()
        if fullname != _META_KERNELS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferringLoader(spec.loader)
        return spec
