"""The submodules that a function reaches through a package, as in `torch.nn.functional`: they travel with it.

cloudpickle looks for them among all modules that are imported, 2 ms a function once torch is.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cloudpickle import cloudpickle

__all__ = ["Pickler"]


def _imported_submodules(code: types.CodeType, referred: Iterable[Any]) -> list[types.ModuleType]:
    """Imported submodules of the packages in `referred` whose path is made of names in `code`, parents first."""
    packages = [one for one in referred if isinstance(one, types.ModuleType) and one.__package__]
    return [module for package in packages for module in _below(package.__name__, code.co_names)]


def _below(package: str, names: tuple[str, ...]) -> Iterator[types.ModuleType]:
    for name in names:
        path = f"{package}.{name}"
        if (module := sys.modules.get(path)) is not None:
            yield module
            yield from _below(path, names)


_function_state: Callable[[types.FunctionType], Any] = types.FunctionType(
    cloudpickle._function_getstate.__code__,
    {**vars(cloudpickle), "_find_imported_submodules": _imported_submodules},
)


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, with its search for submodules replaced."""

    def _dynamic_function_reduce(self, func: types.FunctionType) -> Any:
        new, state = self._function_getnewargs(func), _function_state(func)
        return cloudpickle._make_function, new, state, None, None, cloudpickle._function_setstate
