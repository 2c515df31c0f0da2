"""One artefact for AVX2 and AVX-512: the same weights, and the same text from both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.runtime import library
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.schedules.x86.bsr import X86Bsr
from gqsa_compiler.targets import host_flags, parse_target
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

V3, V4 = (parse_target(f"x86-64-v{level}") for level in (3, 4))
TARGETS = f"{V3.name},{V4.name}"
PROMPT = [5, 17, 80, 33, 9, 41, 42, 43, 44, 45]

pytestmark = pytest.mark.skipif(
    not set(V4.required_flags) <= host_flags(), reason="this machine cannot run x86-64-v4 code"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny compressed Llama with one layer."""
    folder = tmp_path_factory.mktemp("variants")
    dense = make_tiny("llama", folder / "dense", num_hidden_layers=1)
    return make_checkpoint(dense, folder / "checkpoint")


@pytest.fixture(scope="module")
def stages() -> list[str]:
    """Collect the stages that the compilation of `artefact` reports."""
    return []


@pytest.fixture(scope="module")
def artefact(checkpoint: Path, stages: list[str]) -> Path:
    """Return it compiled for both levels."""
    output = checkpoint.parent / "artefact"
    gqsa_compile(
        str(checkpoint),
        output,
        target=TARGETS,
        debug_dump=checkpoint.parent / "dump",
        progress=lambda stage, done, total: stages.append(stage) if done == total else None,
    )
    return output


def test_two_libraries_and_one_set_of_weights(artefact: Path, stages: list[str]) -> None:
    names = {path.name for path in artefact.iterdir()}
    assert {"model.x86-64-v3.so", "model.x86-64-v4.so", "params.safetensors"} <= names
    assert "model.so" not in names
    manifest = Manifest.read(artefact)
    found = [(v.target.name, v.library.file, v.target.flags) for v in manifest.variants]
    assert found == [
        (t.name, f"model.{t.name}.so", t.required_flags) for t in (V4, V3)
    ]  # the most capable first
    for what in ("running passes", "generating code"):
        assert {f"{what} for {target.name}" for target in (V3, V4)} <= set(stages)
    assert stages.count("packing weights") == 1
    report = json.loads((artefact / "report.json").read_text())
    assert report["target"] == "x86-64-v4,x86-64-v3"
    dumped = {path.name for path in (artefact.parent / "dump").iterdir()}
    assert dumped == {V3.name, V4.name}


def test_both_give_the_same_text(artefact: Path) -> None:
    texts, logits = [], []
    for name in (V3.name, V4.name):
        with runtime.load(artefact, variant=name) as model:
            assert model.variant == name
            result = model.generate(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True)
            texts.append(result.token_ids)
            logits.append(np.concatenate([block.copy() for block in model.score(PROMPT)]))
    assert texts[0] == texts[1]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)


def test_the_machine_decides_which_one_runs(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.load(artefact) as model:
        assert model.variant == V4.name
    flags = frozenset(V3.required_flags)
    monkeypatch.setattr(library, "host_flags", lambda _path: flags)
    with runtime.load(artefact) as model:
        assert model.variant == V3.name
    monkeypatch.setattr(library, "host_flags", lambda _path: flags - {"avx2", "fma"})
    with pytest.raises(runtime.ArtefactError, match=r"for x86-64-v3 .* lacks avx2, fma; compile"):
        runtime.load(artefact)


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_layouts_that_differ_are_refused_before_any_work(tmp_path: Path, activations: str) -> None:
    with pytest.raises(UsageError, match=f"With {activations} activations the weights are packed"):
        gqsa_compile("no model", tmp_path / "out", target=TARGETS, activations=activations)
    assert list(tmp_path.iterdir()) == []


def test_kernels_that_pack_differently_after_all(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule whose layout follows the vectors may not slip through."""
    monkeypatch.setattr(X86Bsr, "packed_by", lambda _rule, config: config)
    with pytest.raises(CompileError, match="x86-64-v4 and x86-64-v3 cannot share one set"):
        gqsa_compile(str(checkpoint), tmp_path / "out", target=TARGETS)
