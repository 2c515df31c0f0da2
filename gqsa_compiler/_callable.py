"""Let a module be called: `gqsa_compiler.compile(...)` is a function and a module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Make calling the module named `module` call `function`.

    Importing a submodule binds its name in the package, so the public functions
    `gqsa_compiler.compile` and `gqsa_compiler.compress` and the modules of those names have to
    be one object.
    """

    class CallableModule(ModuleType):
        __doc__ = function.__doc__

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule
