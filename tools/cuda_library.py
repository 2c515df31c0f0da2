"""The part of this package that packs weights, as a package that needs numpy only.

A machine that runs kernels has no TVM, and packed weights are too large to carry there. So the
modules that packing imports are copied as they are, but for two: `_tvm`, whose names are for
building kernels (nothing there builds one), and the package `checkpoint`, whose readers need more
than numpy.
"""

from __future__ import annotations

import ast
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "gqsa_compiler"
ROOTS = (f"{PACKAGE}.schedules.cuda.pack", f"{PACKAGE}.schedules.reference")
"""What `cuda_layers.py` imports; all that these import goes along."""
REPLACED = {
    f"{PACKAGE}._tvm": '''"""Names that build kernels: here they are to be imported only."""

from typing import Any


def __getattr__(name: str) -> Any:
    return None
''',
    f"{PACKAGE}.checkpoint": '''"""A layer and its codes, without files."""

from gqsa_compiler.checkpoint.bits import pack_codes, unpack_codes
from gqsa_compiler.checkpoint.layer import BSRLayer, symmetric_zero

__all__ = ["BSRLayer", "pack_codes", "symmetric_zero", "unpack_codes"]
''',
}


def copy_library(folder: Path) -> None:
    """Write the package `gqsa_compiler` into `folder`, in place of what is there."""
    shutil.rmtree(folder / PACKAGE, ignore_errors=True)
    pending, done = list(ROOTS), set[str]()
    while pending:
        module = pending.pop()
        if module in done:
            continue
        done.add(module)
        text = REPLACED.get(module) or _source(module)
        path = folder / (module.replace(".", "/") + ".py")
        if module in REPLACED and module != f"{PACKAGE}._tvm":
            path = path.with_suffix("") / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        pending += _imported(text)
    for directory in {path.parent for path in (folder / PACKAGE).rglob("*.py")}:
        (directory / "__init__.py").touch()


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"There is no module {module} to copy.")
    return Path(found.origin).read_text(encoding="utf-8")


def _imported(text: str) -> Iterator[str]:
    """Yield the modules of this project that a module imports when it is imported itself."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(PACKAGE + "."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            module = node.module or ""
            if not _is_package(module) or module in REPLACED:
                yield module
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if module not in REPLACED and _is_module(module, inner):
                    yield inner


def _is_package(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.submodule_search_locations is not None


def _is_module(package: str, name: str) -> bool:
    return _is_package(package) and importlib.util.find_spec(name) is not None
