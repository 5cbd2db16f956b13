"""Running a module of this package once another package has been imported, without importing that package."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(trigger: str, module: str) -> None:
    """Imports ``module`` as soon as the module ``trigger`` is there: now, or right after its own import.

    An integration that cannot be imported, because its package has another version than it needs, is reported as a
    warning: the import of ``trigger`` itself does not fail.
    """
    if trigger in sys.modules:
        _import(module)
    else:
        sys.meta_path.insert(0, _Finder(trigger, module))


class _Finder(MetaPathFinder):
    """Finds ``trigger`` as others would, but for a loader that imports ``module`` afterwards."""

    def __init__(self, trigger: str, module: str) -> None:
        self._trigger, self._module = trigger, module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of ``trigger``; none for every other name."""
        if fullname != self._trigger:
            return None
        for finder in list(sys.meta_path):
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self, self._module)
                return spec
        return None


class _Loader(Loader):
    """A loader that does what ``loader`` does, and then imports ``module``."""

    def __init__(self, loader: Loader, finder: _Finder, module: str) -> None:
        self._loader, self._finder, self._module = loader, finder, module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does; afterwards nothing shows that we were here."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _import(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _import(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        warnings.warn(f"{module} is off: {error}", stacklevel=2)
