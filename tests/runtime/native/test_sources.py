"""The C++ sources: formatted, and all in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "runtime" / "native"


def test_they_are_formatted() -> None:
    program = shutil.which("clang-format", path=f"{Path(sys.executable).parent}")
    if program is None:
        pytest.skip("there is no clang-format in this environment (pip install -e '.[dev]')")
    folders = ("src", "test", "tvm_support")
    files = [
        str(f) for name in folders for f in (NATIVE / name).rglob("*.[ch]*") if f.suffix != ".c"
    ]
    assert len(files) > 40
    done = subprocess.run(
        [program, "--dry-run", "-Werror", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]


def test_they_are_in_the_wheel() -> None:
    """What pyproject.toml lists is all that a build of an installed package reads."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["gqsa_compiler.runtime"]
    listed = {f for pattern in patterns for f in (ROOT / "runtime").glob(pattern) if f.is_file()}
    needed = {
        f
        for f in NATIVE.rglob("*")
        if f.is_file() and not f.name.startswith(".")
        and f.relative_to(NATIVE).parts[0] not in ("build", "test")
    }  # fmt: skip
    assert needed - listed == set()
