"""Does something to a module as soon as somebody imports it, and imports nothing by itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class OnImport(MetaPathFinder):
    """Stands in `sys.meta_path` until the module called `name` is imported, and calls `then` with it once its code has run.

    Args:
        name: of the module.
        then: called once. What it raises leaves the import.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then
        self._is_asking = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Finds nothing but that module, which the finders behind this one find. It stays until the module's code has run: some
        only ask for the module, and an import that fails may be tried again."""
        if fullname != self._name or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_asking = False
        if spec is None or spec.loader is None:
            return spec
        run, then = spec.loader.exec_module, self._then

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls `then` with the module called `name`: now if it is there, else when it has been imported. Asked again for a module
    that is still waited for, it does nothing."""
    if name in sys.modules:
        then(sys.modules[name])
    elif not any(isinstance(finder, OnImport) and finder._name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, OnImport(name, then))
