"""GQSA compiler: deploys LLMs compressed by group quantization and sparsity.

Names are loaded when they are first used, so that importing a part costs only that part.
`gqsa_compiler.compile(...)` and `gqsa_compiler.compress(...)` are the two verbs of the Python
API; `gqsa_compiler.runtime.load(...)` runs what they make.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["GqsaError", "compile", "compress", "runtime"]


def __getattr__(name: str) -> Any:
    if name in ("compile", "compress", "runtime"):
        return import_module(f"gqsa_compiler.{name}")
    if name == "GqsaError":
        from gqsa_compiler.errors import GqsaError

        return GqsaError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
