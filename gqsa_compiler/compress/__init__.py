"""The GQSA algorithm: prune groups of weights, quantise the rest, make up for the error.

Names are loaded when they are first used: recipes can be read without PyTorch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gqsa_compiler._callable import make_callable

if TYPE_CHECKING:
    from gqsa_compiler.compress.calibration.spec import CalibrationSpec
    from gqsa_compiler.compress.pipeline import compress_model
    from gqsa_compiler.compress.recipes.presets import parse_recipe
    from gqsa_compiler.compress.recipes.recipe import Recipe
    from gqsa_compiler.compress.result import CompressReport
    from gqsa_compiler.modules.result import ModuleReport

__all__ = ["CalibrationSpec", "CompressReport", "Recipe", "compress_model", "parse_recipe"]

_MODULES = {
    "CalibrationSpec": "calibration.spec",
    "CompressReport": "result",
    "compress_model": "pipeline",
    "Recipe": "recipes.recipe",
    "parse_recipe": "recipes.presets",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _compress(*args: Any, **kwargs: Any) -> CompressReport | ModuleReport:
    """Compress a model, or a PyTorch module; see `compress_model` and `compress_module`."""
    if args and _is_torch_module(args[0]):
        from gqsa_compiler.modules.compress import compress_module

        return compress_module(*args, **kwargs)
    from gqsa_compiler.compress.pipeline import compress_model

    return compress_model(*args, **kwargs)


def _is_torch_module(value: object) -> bool:
    torch = sys.modules.get("torch")  # nobody has a module of PyTorch's without it
    return torch is not None and isinstance(value, torch.nn.Module)


make_callable(__name__, _compress)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
