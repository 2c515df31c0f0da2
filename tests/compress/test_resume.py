"""A run that ends early goes on: the checkpoint is that of an undisturbed run, byte for byte."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqsa_compiler.checkpoint import CheckpointReader, validate
from gqsa_compiler.compress import compress_model
from gqsa_compiler.compress.blocks import HEAD
from gqsa_compiler.compress.phases import model as model_phase
from gqsa_compiler.compress.phases.model import ModelPhase
from gqsa_compiler.compress.training.model_stage import ModelTrainer
from gqsa_compiler.compress.work.runlog import read_log
from gqsa_compiler.compress.work.workdir import WorkDirectory
from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.compress.kill_runs import content, quick_recipe
from tests.tiny_models import make_tiny

SETTINGS: dict[str, Any] = {"recipe": quick_recipe(), "samples": 8, "sequence_length": 32}
STAGES = (
    "sampling calibration text",
    "measuring sensitivities",
    "compressing blocks",
    "compressing the head",
    "running the dense model",
    "training weights",
    "training scales",
    "writing",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("dense") / "llama", num_hidden_layers=2)


@pytest.fixture(autouse=True)
def _save_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_phase, "SAVE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    compress_model(model, output, **SETTINGS)
    return content(output)


def failing(stage: str, error: BaseException, done: int = 1) -> Callable[[str, int, int], None]:
    """Return a callback that raises when a stage has done so much (or all that it has to)."""

    def progress(name: str, now: int, total: int) -> None:
        if name == stage and now >= min(done, total - 1):
            raise error

    return progress


def interrupt(
    model: Path, output: Path, stage: str = "compressing blocks", **settings: Any
) -> None:
    """Compress until a stage is in hand (of the blocks, until the first is done)."""
    stop = failing(stage, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compress_model(model, output, **settings, progress=stop)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_anywhere(
    stage: str, model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    interrupt(model, output, stage, **SETTINGS)
    begun = stage != "sampling calibration text"
    assert left(tmp_path) == (["out.work"] if begun else [])
    stages: list[str] = []
    compress_model(model, output, **SETTINGS, progress=lambda name, *_: stages.append(name))
    assert content(output) == expected
    assert left(tmp_path) == ["out"]
    # Stages that were over are not run again; but the head's inputs are what the blocks give.
    again = {"compressing blocks"} if stage == "compressing the head" else set()
    assert set(stages) & set(STAGES[: STAGES.index(stage)]) == again
    record = read_log(output / "compression.jsonl")
    assert [event.at for event in record.resumed] == ([] if not begun else [_place(stage)])
    assert len(record.blocks) == 2
    assert record.finish is not None
    assert set(record.steps) == {"weights", "scales"}
    assert "<svg" in (output / "compression.html").read_text()


def _place(stage: str) -> str:
    return {
        "measuring sensitivities": "the beginning",
        "compressing blocks": "block 1",
        "compressing the head": "block 2",
        "running the dense model": "what follows the head",
        "training weights": "stage weights",
        "training scales": "stage scales",
        "writing": "writing the checkpoint",
    }[stage]


def test_one_shot_goes_on(model: Path, tmp_path: Path) -> None:
    """Its blocks' outputs are those that a run that goes on computes from what is saved."""
    for name in ("whole", "parts"):
        if name == "parts":
            interrupt(model, tmp_path / name, stages="none", **SETTINGS)
        compress_model(model, tmp_path / name, stages="none", **SETTINGS)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stages", "which"),
    [
        ("block,weights,scales", "few"),
        pytest.param("block,weights,scales", "all", marks=pytest.mark.slow),
        pytest.param("none", "all", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere(which: str, stages: str, model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compress.kill_runs", model, tmp_path, stages, which],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(left(tmp_path)) == {"whole", "events"}


@pytest.fixture(scope="module")
def first_block(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work of a run that was interrupted after its first block."""
    output = tmp_path_factory.mktemp("begun") / "out"
    interrupt(model, output, **SETTINGS)
    return output.with_name("out.work")


@pytest.fixture
def begun(first_block: Path, tmp_path: Path) -> Path:
    """The output of such a run, whose work is the test's own."""
    shutil.copytree(first_block, tmp_path / "out.work")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": "w4s30g16"}, "recipe.name"),
        ({"samples": 9}, "calibration.samples"),
        ({"seed": 1}, "calibration.seed"),
        ({"stages": "block"}, "recipe.weights"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], named: str, begun: Path, model: Path
) -> None:
    with pytest.raises(UsageError, match=rf"{named} was .* and is now .*\(--restart\)"):
        compress_model(model, begun, **{**SETTINGS, **changes})
    assert left(begun.parent) == ["out.work"]


def test_other_settings_begin_anew(begun: Path, model: Path) -> None:
    compress_model(model, begun, **{**SETTINGS, "stages": "none", "seed": 1}, restart=True)
    assert left(begun.parent) == ["out"]


def test_another_model_of_the_same_sizes_is_refused(
    begun: Path, model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """One byte of one weight differs; where the model lies does not matter."""
    other = shutil.copytree(model, tmp_path / "elsewhere" / model.name)
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"files\.model\.safetensors was"):
        compress_model(other, begun, **SETTINGS)
    shutil.copy(model / "model.safetensors", file)
    compress_model(other, begun, **SETTINGS)
    assert content(begun) == expected


def test_another_calibration_text_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    request = {**SETTINGS, "calibration": text, "stages": "none"}
    interrupt(model, tmp_path / "out", **request)
    text.write_text(text.read_text().upper())
    with pytest.raises(UsageError, match=r"texts\..*text\.txt was .*\(--restart\)"):
        compress_model(model, tmp_path / "out", **request)


def test_restart_begins_anew(begun: Path, model: Path, expected: dict[str, bytes]) -> None:
    stages: list[str] = []
    compress_model(
        model, begun, **SETTINGS, restart=True, progress=lambda name, *_: stages.append(name)
    )
    assert "sampling calibration text" in stages
    assert content(begun) == expected
    assert read_log(begun / "compression.jsonl").resumed == ()


def test_an_output_that_appears_meanwhile(
    begun: Path, model: Path, expected: dict[str, bytes]
) -> None:
    shutil.copytree(model, begun)
    with pytest.raises(UsageError, match="exists"):
        compress_model(model, begun, **SETTINGS)
    assert left(begun.parent) == ["out", "out.work"]
    shutil.rmtree(begun)
    begun.mkdir()  # an empty one may be replaced
    compress_model(model, begun, **SETTINGS, overwrite=True)
    assert content(begun) == expected
    assert left(begun.parent) == ["out"]


def test_two_runs_at_once(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    refused: list[str] = []

    def progress(name: str, done: int, total: int) -> None:
        if name == "compressing blocks" and done == 1:
            with pytest.raises(UsageError) as error:
                compress_model(model, tmp_path / "out", **SETTINGS, restart=True)
            refused.append(str(error.value))

    compress_model(model, tmp_path / "out", **SETTINGS, progress=progress)
    assert len(refused) == 1
    assert "Another run is using" in refused[0]
    assert content(tmp_path / "out") == expected


MEMORY = (
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: out of memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_at_once(error: Exception, model: Path, tmp_path: Path) -> None:
    stop = failing("sampling calibration text", error)
    with pytest.raises(GqsaError) as caught:
        compress_model(model, tmp_path / "out", **SETTINGS, progress=stop)
    assert "while sampling calibration text. Use a machine with more" in str(caught.value)
    assert left(tmp_path) == []


def test_out_of_memory_on_the_way(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    output, error = tmp_path / "out", MEMORY[1]
    with pytest.raises(GqsaError) as caught:
        compress_model(model, output, **SETTINGS, progress=failing("training weights", error))
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith("Not enough memory while training weights. What is done")
    assert "run the same command again" in str(caught.value)
    assert "begin anew (--restart) without this stage (--stages block,scales) or with" in str(
        caught.value
    )
    compress_model(model, output, **SETTINGS)
    assert content(output) == expected


@pytest.mark.parametrize("state", ["block-0001", "weights", "scales-head"])
def test_the_disk_is_full_while_saving(
    state: str,
    model: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gqsa_compiler.compress.work import workdir

    write = workdir.write_state

    def full(path: Path, *rest: Any) -> None:
        write(path, *rest)
        if path.name.startswith(f"{state}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "write_state", full)
        with pytest.raises(GqsaError, match=r"No space left .* run the same command again"):
            compress_model(model, output, **SETTINGS)
    compress_model(model, output, **SETTINGS)
    assert content(output) == expected


def test_the_disk_is_full_while_writing(
    model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(GqsaError, match=r"while writing\. What is done is kept in .*out\.work"):
        compress_model(model, output, **SETTINGS, progress=failing("writing", full))
    assert left(tmp_path) == ["out.work"]
    compress_model(model, output, **SETTINGS)
    assert content(output) == expected


def test_a_state_that_the_disk_has_lost(begun: Path, model: Path) -> None:
    """It is not passed over: what is wrong on a disk is not ours to guess."""
    state = begun.with_name("out.work") / "block-0000.state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(GqsaError, match=r"block-0000.* is damaged.*--restart"):
        compress_model(model, begun, **SETTINGS)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "bfloat16"),
        ("gemma3", "float32"),
        pytest.param("llama", "float32", marks=pytest.mark.slow),
        pytest.param("gemma3", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_what_is_saved_is_what_was_trained(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and so are the logits: what training has evaluated is what is loaded."""
    trained: list[Any] = []
    start = ModelTrainer.__init__

    def watched(self: ModelTrainer, model: Any, *rest: Any, **more: Any) -> None:
        trained.append(model)
        start(self, model, *rest, **more)

    monkeypatch.setattr(ModelTrainer, "__init__", watched)
    # As if the CPU had no quick bfloat16: the module computes in float32.
    monkeypatch.setattr("gqsa_compiler.compress.devices.multiplies_bfloat16", lambda: False)
    dense = make_tiny(family, tmp_path / "dense", dtype=dtype)
    compress_model(dense, tmp_path / "out", **SETTINGS)
    module = trained[-1]
    loaded = load_checkpoint_dense(resolve(str(tmp_path / "out")))
    weights = dict(loaded.named_parameters())
    checked = 0
    for name, layer in module.named_modules():
        if hasattr(layer, "grid_shape"):
            assert torch.equal(layer.result().decode(), weights.pop(f"{name}.weight"))
            checked += 1
    assert checked == 3 * 7 + 1, "the head too"
    parts = dict(module.named_parameters())
    for name, weight in weights.items():
        assert torch.equal(parts[name], weight), name
    tokens = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(module(tokens).logits, loaded(tokens).logits)


def test_the_budget_is_kept_to_the_byte(model: Path, tmp_path: Path) -> None:
    report = compress_model(model, tmp_path / "out", **SETTINGS, stages="none", budget="3.1")
    with CheckpointReader(tmp_path / "out") as reader:
        validate(reader)
        layers = [reader.layer(name) for name in reader.layer_names if name != HEAD]
        assert reader.quantization.per_layer
        for layer in layers:
            scheme = reader.quantization.scheme(layer.name)
            assert layer.sparsity == pytest.approx(scheme.ratio, abs=1e-2)
    stored = sum(layer.nbytes for layer in layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    assert stored == sum(layer.bytes for layer in report.layers)
    assert 3.0 < 8 * stored / weights == report.bits_per_weight <= 3.1


def test_states_are_gone_when_a_stage_is_over(model: Path, tmp_path: Path) -> None:
    """The optimiser's are large: they go with their stage."""
    seen: dict[str, list[str]] = {}
    run = ModelPhase._run

    def watched(self: ModelPhase, stage: str, *rest: Any) -> float:
        divergence = run(self, stage, *rest)
        seen[stage] = next(item for item in rest if isinstance(item, WorkDirectory)).names()
        return divergence

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelPhase, "_run", watched)
        compress_model(model, tmp_path / "out", **SETTINGS)
    assert "weights" not in seen["weights"]
    assert "weights-done" in seen["weights"]
    assert "scales" not in seen["scales"]
