"""The runtime in a virtual environment with its five dependencies and a bundle, nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from gqsa_compiler.runtime import library
from gqsa_compiler.runtime.manifest import Manifest
from tests.runtime.toy import SPECIAL

ROOT = Path(__file__).parents[2]
FOLDERS = ["gqsa_compiler", "passes", "schedules", "runtime"]
FILES = ["pyproject.toml", "README.md", "LICENSE"]
# The five, and what they themselves need at import: MarkupSafe by jinja2, typing_extensions by
# tvm_ffi. tokenizers also declares huggingface-hub, for downloads, which the runtime never makes.
PACKAGES = ["numpy", "apache-tvm-ffi", "safetensors", "tokenizers", "jinja2", "MarkupSafe",
            "typing_extensions"]  # fmt: skip
SCRIPT = """
import importlib.util, sys
for name in ("tvm", "torch", "transformers", "ml_dtypes", "huggingface_hub", "scipy"):
    assert importlib.util.find_spec(name) is None, name
from gqsa_compiler import runtime
with runtime.load(sys.argv[1]) as model:
    print(model.generate("the man", max_tokens=12, temperature=1.0, seed=4).token_ids)
    print(model.chat([{"role": "user", "content": "hi"}], max_tokens=3).finish_reason)
"""


def install(package: str, site: Path) -> None:
    """Link an installed package into another environment, as if installed there."""
    dist = distribution(package)
    for top in {Path(file).parts[0] for file in dist.files or ()} - {"..", "__pycache__"}:
        (site / top).symlink_to(Path(str(dist.locate_file(top))))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Make the environment and build this package into it, with no dependencies."""
    for needed in ("setuptools", "pip"):
        try:
            distribution(needed)
        except PackageNotFoundError:
            pytest.skip(f"{needed} is not here to build the package with")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    for package in PACKAGES:
        install(package, site)
    for folder in FOLDERS:  # a copy: building leaves files behind
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / "src" / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / "src" / file)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--target", str(site), str(tmp_path / "src")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    return python


def test_bundle_runs_with_five_dependencies(copy: Path, environment: Path) -> None:
    (copy / library.BUNDLE).mkdir()
    for path in library.find_runtime(copy.parent / "none", Manifest.read(copy)):
        shutil.copy(path, copy / library.BUNDLE)
    result = subprocess.run(
        [str(environment), "-I", "-c", SCRIPT, str(copy)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    tokens, reason = result.stdout.splitlines()
    from gqsa_compiler.runtime.model import load

    with load(copy) as model:
        here = model.generate("the man", max_tokens=12, temperature=1.0, seed=4)
    assert tokens == str(here.token_ids)
    assert reason in ("eos", "length")
    assert SPECIAL[0] not in here.text
