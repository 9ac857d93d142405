"""Callbacks tied to imports: before a package is first imported, or right after a module was.

One finder at the head of ``sys.meta_path`` serves both; it imports nothing by itself and leaves
every other import alone. This module imports no torch, so it is cheap in every process.
"""

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def before_import(name: str, callback: Callable[[], None]) -> None:
    """Runs ``callback`` once, when something first asks for module or package ``name``.

    Raises:
        RuntimeError: ``name`` is imported already.
    """
    if name in sys.modules:
        raise RuntimeError(f"{name} is imported already; arm before the first import of it")
    _finder().before.setdefault(name, []).append(callback)


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Runs ``callback(module)`` once, right after module ``name`` has been executed.

    Works at once when the module is imported already. A namespace package executes nothing, so
    it cannot be waited for: use `before_import`.

    Raises:
        RuntimeError: the module is half-way through its import.
    """
    module = sys.modules.get(name)
    if module is None:
        _finder().after.setdefault(name, []).append(callback)
    elif getattr(module.__spec__, "_initializing", False):
        raise RuntimeError(f"{name} is being imported right now; arm before the import starts")
    else:
        callback(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Looks out for armed names and finds their modules through the finders behind it."""

    def __init__(self) -> None:
        self.before: dict[str, list[Callable[[], None]]] = {}
        self.after: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns nothing, except for a module that somebody waits for."""
        for callback in self.before.pop(fullname, ()):
            callback()
        if fullname not in self.after:
            return None
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return self._watched(spec)
        return None

    def _watched(self, spec: ModuleSpec) -> ModuleSpec:
        if spec.loader is None or not hasattr(spec.loader, "exec_module"):
            raise RuntimeError(f"{spec.name} executes no code, so its import cannot be awaited")
        spec.loader = _WatchedLoader(spec.loader, self)
        return spec


class _WatchedLoader(importlib.abc.Loader):
    """Executes through the real loader, hands the module back to it, then runs the callbacks."""

    def __init__(self, real: Any, finder: _Finder) -> None:
        self._real = real
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leaves creation to the real loader."""
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Executes ``module``; an error in it, or in a callback, is the import's error."""
        # Source look-up and resources go through the loader, so the real one is put back first.
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        self._real.exec_module(module)
        for callback in self._finder.after.pop(module.__name__, ()):
            callback(module)


def _finder() -> _Finder:
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            return finder
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    return finder
