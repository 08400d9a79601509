"""Libraries that a library imports and that nobody may ever use: imported when something of them is.

KServe's SDK imports pandas and the Kubernetes client, for requests as data frames and for its client of clusters. A server
needs neither, and they are a third of what it imports: 0.4 s of processor time and 40 MiB.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module or for something in one: while it `is_held`, gives such stand-ins, and later what they stand for.

    What is called has to be there: then the package is imported after all, and nobody's stand-in is held any more.
    """

    is_held = True

    def __init__(self, module: str, path: tuple[str, ...] = (), holder: _Deferred | None = None) -> None:
        super().__init__(".".join((module, *path)))
        self._module = module
        self._path = path
        self._holder = holder or self

    def __getattr__(self, name: str) -> Any:
        if not self._holder.is_held:
            return getattr(self._real(), name)
        if name.startswith("__"):  # what Python asks of an annotation
            raise AttributeError(f"the import of {self.__name__} is put off")
        return _Deferred(self._module, (*self._path, name), self._holder)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._holder.let_go()
        return self._real()(*arguments, **named)

    def let_go(self) -> None:
        """Make room for the package itself, and give what is in it from now on."""
        self.is_held = False
        if sys.modules.get(self._module) is self:
            del sys.modules[self._module]

    def _real(self) -> Any:
        found: Any = importlib.import_module(self._module)
        for index, name in enumerate(self._path):
            if not hasattr(found, name):  # a module in a package that nobody has imported yet
                importlib.import_module(".".join((self._module, *self._path[: index + 1])))
            found = getattr(found, name)
        return found


@contextmanager
def deferred_imports(*names: str) -> Iterator[None]:
    """What is imported meanwhile imports the top-level packages `names`, and names from them, only by name.

    A package that is there already stays what it is.
    """
    stand_ins = {name: _Deferred(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for stand_in in stand_ins.values():
            stand_in.let_go()
