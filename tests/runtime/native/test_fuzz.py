"""Mutated files: every one is read or refused in a sentence. The long runs are sanitized."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.runtime.native.programs import Programs, refusal, run
from tests.runtime.native.test_tokenizer import KINDS

FILES = {"manifest": "manifest.json", "params": "manifest.json", "tokenizer": "tokenizer.json"}


def _fuzz(programs: Programs, kind: str, file: Path, seed: int, count: int) -> None:
    done = subprocess.run(
        [str(programs.probe), "fuzz", kind, str(file), str(seed), str(count)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{count} mutants" in done.stdout


@pytest.mark.parametrize("kind", FILES)
def test_some_mutants(programs: Programs, artefact: Path, kind: str) -> None:
    _fuzz(programs, kind, artefact / FILES[kind], seed=1, count=400)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_many_mutants(sanitized: Programs, artefact: Path, kind: str) -> None:
    for seed in range(4):
        count = 1000 if kind == "params" else 5000  # each is written out and mapped
        _fuzz(sanitized, kind, artefact / FILES[kind], seed, count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutants_of_every_tokenizer(sanitized: Programs, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    KINDS[kind]().save(str(path))
    _fuzz(sanitized, "tokenizer", path, seed=7, count=300)


@pytest.mark.slow
def test_a_sanitized_run(sanitized: Programs, programs: Programs, artefact: Path) -> None:
    words = [
        "-p",
        "the man in the inner",
        "--max-tokens",
        "24",
        "--temperature",
        "1",
        "--seed",
        "4",
    ]
    # TVM keeps objects for the life of the process.
    leaks = "detect_leaks=0"
    clean = run(sanitized, artefact, *words, ASAN_OPTIONS=leaks)
    assert clean.returncode == 0, clean.stderr.decode()[-3000:]
    assert clean.stdout == run(programs, artefact, *words).stdout
    done = subprocess.run(
        [str(sanitized.api), str(artefact), "the man"], capture_output=True, check=False,
        env={"ASAN_OPTIONS": leaks},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.slow
def test_sanitized_refusals(sanitized: Programs, artefact: Path, tmp_path: Path) -> None:
    for file in ("manifest.json", "tokenizer.json", "params.safetensors", "model.so"):
        copy = Path(shutil.copytree(artefact, tmp_path / file))
        data = (copy / file).read_bytes()
        (copy / file).write_bytes(data[: len(data) // 2])
        assert file in refusal(run(sanitized, copy, "-p", "the", ASAN_OPTIONS="detect_leaks=0"), 1)
