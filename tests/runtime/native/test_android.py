"""A program for phones with everything linked in, run by an emulator that has no system beside it:
the tokens that this machine gives.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.native import PROGRAM, is_built
from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.toolchain import ANDROID, find_zig
from tests.runtime.native.programs import Programs, refusal, run
from tests.runtime.toy import edit_manifest
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

PROMPT = "The quick brown fox"
EXACT: Any = "float32"  # activations that every target rounds alike


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("there is no qemu-aarch64")
    if find_zig() is None or not is_built(ANDROID):
        pytest.skip("gqsa native android-arm64 has not been run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny checkpoint and its artefact for a phone."""
    folder = tmp_path_factory.mktemp("phone")
    make_tiny("llama", folder / "dense")
    checkpoint = make_checkpoint(folder / "dense", folder / "checkpoint")
    gqsa_compile(str(checkpoint), folder / "phone", target="android-arm64", activations=EXACT)
    return folder


@pytest.fixture
def phone(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the artefact."""
    return Path(shutil.copytree(folder / "phone", tmp_path / "phone"))


def _run(directory: Path, *words: str, cpu: str = "max") -> subprocess.CompletedProcess[bytes]:
    # -L names an empty folder: nothing of this machine's can help.
    command = ["qemu-aarch64", "-cpu", cpu, "-L", str(directory), str(directory / PROGRAM)]
    return subprocess.run([*command, *words], capture_output=True, timeout=600, check=False)


def _tokens(directory: Path, prompt: str, count: int) -> dict[str, Any]:
    words = ["-p", prompt, "--max-tokens", str(count), "--temperature", "0", "--json"]
    done = _run(directory, *words)
    assert done.returncode == 0, done.stderr.decode()
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_same_tokens(folder: Path, phone: Path) -> None:
    gqsa_compile(str(folder / "checkpoint"), folder / "here", activations=EXACT)
    with runtime.load(folder / "here") as model:
        wanted = model.generate(PROMPT, max_tokens=12, temperature=0)
    got = _tokens(phone, PROMPT, 12)
    assert tuple(got["token_ids"]) == wanted.token_ids
    assert got["text"] == wanted.text


def test_the_bundle_needs_nothing(phone: Path) -> None:
    data = (phone / PROGRAM).read_bytes()
    assert int.from_bytes(data[18:20], "little") == 183  # aarch64
    assert b"/lib/ld-" not in data  # no dynamic loader
    assert not list(phone.glob("*.so"))
    assert not (phone / "lib").exists()
    assert len(data) < 10_000_000


def test_another_compilations_weights(phone: Path) -> None:
    edit_manifest(phone, lambda d: d["variants"][0]["library"].update(sha256="0" * 64))
    assert "has the code of another artefact" in refusal(_run(phone, "-p", "The"), 1)


@pytest.mark.parametrize("file", ["manifest.json", "tokenizer.json", "params.safetensors"])
def test_truncated_files(phone: Path, file: str) -> None:
    (phone / file).write_bytes((phone / file).read_bytes()[:100])
    assert file in refusal(_run(phone, "-p", "The"), 1)


def test_cores_without_what_the_code_needs(phone: Path) -> None:
    assert "lacks asimddp" in refusal(_run(phone, "-p", "The", cpu="cortex-a53"), 1)
    edit_manifest(phone, lambda d: d["variants"][0]["target"].update(flags=["asimddp", "i8mm"]))
    assert "lacks i8mm" in refusal(_run(phone, "-p", "The", cpu="cortex-a76"), 1)


def test_a_context_that_is_too_long(phone: Path) -> None:
    assert "leaves no room" in refusal(_run(phone, "-p", "word " * 4000), 2)
    assert "compiled for" in refusal(_run(phone, "-p", "The", "--context", "999999"), 2)


def test_other_runtimes_say_what_to_run(programs: Programs, phone: Path) -> None:
    assert "compiled for 'android-arm64'" in refusal(run(programs, phone, "-p", "The"), 1)
    with pytest.raises(ArtefactError, match="compiled for android-arm64"):
        runtime.load(phone)


def test_smollm2(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("smollm2-135m", tmp_path / "checkpoint", sparsity=0.2)
    options: dict[str, Any] = {"context_length": 256, "activations": EXACT}
    gqsa_compile(str(checkpoint), tmp_path / "here", **options)
    gqsa_compile(str(checkpoint), tmp_path / "phone", target="android-arm64", **options)
    with runtime.load(tmp_path / "here") as model:
        wanted = model.generate("The capital of France is", max_tokens=6, temperature=0)
    got = _tokens(tmp_path / "phone", "The capital of France is", 6)
    assert tuple(got["token_ids"]) == wanted.token_ids
