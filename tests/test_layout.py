"""Rules of the source tree: who may import whom, what is lazy, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = ("gqsa_compiler", "passes", "schedules", "runtime", "tools", "tests")
MAX_LINES = 600

# The packages and modules that each part may import from the project. A part always may import
# itself. Imports go one way: cli -> compile, compress, evaluate, bench -> frontends -> passes ->
# schedules -> checkpoint. `runtime` imports nothing of the others.
_LEAVES = {"errors", "limits", "targets", "_tvm", "_callable", "outdir", "progress", "units"}
_CHECKPOINT = _LEAVES | {"checkpoint"}
_SCHEDULES = _CHECKPOINT | {"schedules"}
_PASSES = _SCHEDULES | {"passes"}
_MODELS = _SCHEDULES | {"models"}
_FRONTENDS = _PASSES | {"models", "frontends"}
_VERBS = _FRONTENDS | {
    "compress",
    "compile",
    "compile_options",
    "modules",
    "convert",
    "evaluate",
    "export",
    "bench",
    "profile",
    "inspect",
    "lora",
    "native",
    "remote",
    "runtime",
    "tune",
    "tuning",
}
MAY_IMPORT = {
    "runtime": set(),
    "errors": {"runtime"},
    "arm_cores": set(),
    "gpu_names": set(),
    "targets": {"arm_cores", "errors", "gpu_names", "runtime"},
    "_tvm": {"errors"},
    "_callable": set(),
    "_child": {"errors"},
    "outdir": {"errors", "runtime"},
    "progress": set(),
    "limits": set(),
    "units": set(),
    "bandwidth": {"errors"},
    "checkpoint": _LEAVES,
    "schedules": _CHECKPOINT,
    "passes": _SCHEDULES,
    "models": _SCHEDULES,
    "frontends": _PASSES | {"models"},
    "report": _PASSES | {"runtime"},
    "head": {"checkpoint", "limits"},
    "artefact": _FRONTENDS | {"runtime", "_child", "bundle", "head", "native", "toolchain"},
    "bundle": _SCHEDULES | {"native", "runtime", "toolchain"},
    "native": {"errors", "runtime", "toolchain"},
    "toolchain": {"errors", "targets"},
    "remote": {"_tvm", "errors", "runtime"},
    "compress": _FRONTENDS | {"bandwidth", "modules"},
    "modules": _FRONTENDS | {"artefact", "bundle", "compress", "export", "report", "runtime"},
    "lora": _FRONTENDS | {"artefact", "compile_options", "runtime"},
    "compile_options": _SCHEDULES,
    "model_weights": _FRONTENDS,
    "compile": _FRONTENDS
    | {"artefact", "bundle", "compile_options", "compress", "head", "lora", "model_weights"}
    | {"modules", "report", "runtime", "tuning"},
    "tuning": _PASSES | {"_child", "compress", "native", "runtime", "toolchain"},
    "tune": _PASSES | {"bandwidth", "compile", "compile_options", "runtime", "tuning"},
    "evaluate": _FRONTENDS | {"runtime"},
    "convert": _FRONTENDS,
    "export": _FRONTENDS,
    "hf": _CHECKPOINT,
    "bench": {"errors", "bandwidth", "profile", "progress", "runtime"},
    "profile": {"progress", "runtime", "trace"},
    "trace": {"errors", "runtime"},
    "inspect": {"errors", "checkpoint", "frontends", "models", "runtime"},
    "cli": _VERBS,
    "__init__": {"errors", "compile", "compress", "runtime"},
}
# Parts of TVM that other releases have elsewhere, or under another name.
MOVING = {"nd", "relax", "rpc", "runtime", "s_tir", "script", "sym", "te", "tir", "tirx"}
# Any change of its code makes the records in schedules/tuned unused: mend it with the next ones.
MEASURED = {ROOT / "schedules" / "generic" / "emit.py"}
# What may be imported from outside where starting up has to stay cheap.
RUNTIME_NEEDS = {"numpy", "tvm_ffi", "safetensors", "tokenizers", "jinja2"}
LIGHT = {
    "cli": {"typer"},
    "errors": set(),
    "targets": set(),
    "outdir": set(),
    "progress": set(),
    "limits": set(),
    "units": set(),
    "checkpoint": {"numpy", "ml_dtypes", "safetensors"},
    "bench": {"numpy"},
    "profile": set(),
    "trace": set(),
    "inspect": set(),
    "__init__": set(),
}


@dataclass(frozen=True)
class Import:
    """One import statement."""

    file: Path
    line: int
    module: str
    at_start: bool  # runs when the module is imported

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def _walk(node: ast.AST, at_start: bool) -> Iterator[tuple[ast.stmt, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_start
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for statement in child.orelse:
                yield from _walk(statement, at_start)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, at_start and not inside)


def _imports(file: Path) -> Iterator[Import]:
    """List the imports of a file; those only for type checkers are left out."""
    for node, at_start in _walk(ast.parse(file.read_text(encoding="utf-8")), True):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write absolute imports"
            names = [node.module or ""]
            if node.module == "gqsa_compiler":
                names = [f"gqsa_compiler.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(file, node.lineno, name, at_start)


def _sources() -> list[tuple[str, Path]]:
    """List (part, file) for every source file of the package."""
    found = []
    for name in ("passes", "schedules", "runtime"):
        found += [(name, file) for file in (ROOT / name).rglob("*.py")]
    package = ROOT / "gqsa_compiler"
    for file in package.rglob("*.py"):
        found.append((file.relative_to(package).with_suffix("").parts[0], file))
    return sorted(found)


def _python_files() -> list[Path]:
    return sorted(file for name in TOP for file in (ROOT / name).rglob("*.py"))


def test_imports_go_one_way() -> None:
    wrong = []
    for part, file in _sources():
        for found in _imports(file):
            words = found.module.split(".")
            if words[0] != "gqsa_compiler" or len(words) == 1:
                continue
            if words[1] != part and words[1] not in MAY_IMPORT[part]:
                wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_every_part_has_its_rule() -> None:
    assert {part for part, _ in _sources()} <= set(MAY_IMPORT)


@pytest.mark.parametrize("part", LIGHT)
def test_start_up_is_light(part: str) -> None:
    allowed = LIGHT[part] | set(sys.stdlib_module_names) | {"gqsa_compiler"}
    wrong = [
        str(found)
        for name, file in _sources()
        if name == part
        for found in _imports(file)
        if found.at_start and found.module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_runtime_needs_five_packages() -> None:
    allowed = RUNTIME_NEEDS | set(sys.stdlib_module_names) | {"gqsa_compiler"}
    wrong = [
        str(found)
        for part, file in _sources()
        if part == "runtime"
        for found in _imports(file)
        if found.module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, gqsa_compiler; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "gqsa_compiler" in loaded
    assert not loaded & (RUNTIME_NEEDS | {"torch", "tvm", "transformers", "typer", "scipy"})


def test_tvm_is_imported_in_one_place() -> None:
    """Names that TVM renames between releases come from `_tvm.py`."""
    wrong = [
        str(found)
        for part, file in _sources()
        if part not in ("_tvm", "runtime")
        for found in _imports(file)
        if found.module.split(".")[0] in ("tvm", "tvm_ffi")
    ]
    assert not wrong, "\n".join(wrong)


def test_tvms_moving_parts_are_named_in_one_place() -> None:
    """``tvm.tirx.Var`` is such a name as well, although nothing is imported."""
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno} says tvm.{node.attr}"
        for part, file in _sources()
        if part not in ("_tvm", "runtime") and file not in MEASURED
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr in MOVING) == ("tvm", True)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    long = [
        f"{file.relative_to(ROOT)}: {lines} lines"
        for file in _python_files()
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    ]
    assert not long, "\n".join(long)


def test_every_package_is_packaged() -> None:
    """A folder with Python files that pyproject.toml does not list would not be installed."""
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for part, file in _sources():
        folder = file.parent.relative_to(ROOT)
        name = ".".join(folder.parts)
        if folder.parts[0] != "gqsa_compiler":
            name = f"gqsa_compiler.{name}"
        assert f'"{name}",' in listed, f"{name} ({part}) is missing in pyproject.toml"
