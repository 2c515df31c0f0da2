"""A bundle cross-compiled for aarch64, run by an emulator: the tokens that this machine gives."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.native import PROGRAM, is_built, native_folder
from gqsa_compiler.targets import host_arch
from tests.runtime.native.programs import refusal
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if host_arch() == "aarch64":
        pytest.skip("this machine is aarch64 itself")
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    if not is_built("aarch64"):
        pytest.skip("gqsa native aarch64 has not been run")


def _run(directory: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [*EMULATOR, str(directory / PROGRAM), *words]
    return subprocess.run(command, capture_output=True, timeout=600, check=False)


def _same_tokens(checkpoint: Path, folder: Path, prompt: str, count: int, **options: Any) -> Path:
    """Compile for both machines, run both, and return the aarch64 bundle."""
    options = {"activations": "float32", **options}  # which round alike everywhere
    gqsa_compile(str(checkpoint), folder / "here", **options)
    gqsa_compile(str(checkpoint), folder / "there", target="aarch64", bundle=True, **options)
    with runtime.load(folder / "here") as model:
        wanted = model.generate(prompt, max_tokens=count, temperature=0)
    words = ["-p", prompt, "--max-tokens", str(count), "--temperature", "0", "--json"]
    done = _run(folder / "there", *words)
    assert done.returncode == 0, done.stderr.decode()
    got = json.loads(done.stdout)
    assert tuple(got["token_ids"]) == wanted.token_ids
    assert got["text"] == wanted.text
    return folder / "there"


def test_a_tiny_model(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "dense")
    checkpoint = make_checkpoint(tmp_path / "dense", tmp_path / "checkpoint")
    bundle = _same_tokens(checkpoint, tmp_path, "The quick brown fox", 12)
    said = refusal(_run(bundle, "-p", "The", "--context", "999999"), 2)
    assert "compiled for" in said
    shutil.copy(native_folder("aarch64") / PROGRAM, tmp_path / "here")
    said = refusal(_run(tmp_path / "here", "-p", "The"), 1)
    assert "this machine is aarch64" in said


def test_smollm2(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("smollm2-135m", tmp_path / "checkpoint", sparsity=0.2)
    _same_tokens(checkpoint, tmp_path, "The capital of France is", 6, context_length=256)
