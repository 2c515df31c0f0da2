"""General modules: PyTorch modules and ONNX graphs, compressed, compiled and exported.

docs/modules.md describes them. Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqsa_compiler.modules.compile import ModuleOptions, compile_module
    from gqsa_compiler.modules.compress import compress_module
    from gqsa_compiler.modules.compress_graph import compress_onnx
    from gqsa_compiler.modules.files import is_module
    from gqsa_compiler.modules.inputs import read_inputs

__all__ = [
    "ModuleOptions",
    "compile_module",
    "compress_module",
    "compress_onnx",
    "is_module",
    "read_inputs",
]

_MODULES = {
    "ModuleOptions": "compile",
    "compile_module": "compile",
    "compress_module": "compress",
    "compress_onnx": "compress_graph",
    "is_module": "files",
    "read_inputs": "inputs",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
