"""Several processes: the same numbers as one, no process left behind, errors before any work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gqsa_compiler.checkpoint import CheckpointReader, validate
from gqsa_compiler.compress import compress_model
from gqsa_compiler.compress.parallel import distributed
from gqsa_compiler.compress.parallel.distributed import LaunchedRanks, own_device
from gqsa_compiler.compress.parallel.launch import Launch, find_launch
from gqsa_compiler.compress.parallel.together import compress_together
from gqsa_compiler.compress.phases import model as model_phase
from gqsa_compiler.compress.recipes.recipe_file import load_recipe
from gqsa_compiler.compress.result import CompressReport, LayerReport, report_from_dict
from gqsa_compiler.compress.training.losses import LossParts
from gqsa_compiler.compress.training.ranks import Ranks
from gqsa_compiler.compress.work.reader import WorkReader
from gqsa_compiler.compress.work.runlog import LOG_FILE, read_log
from gqsa_compiler.compress.work.workdir import WorkDirectory, work_path
from gqsa_compiler.errors import UsageError
from tests.compress.processes import launch_environment, start
from tests.compress.train_alone_or_not import main as train
from tests.tiny_models import make_tiny

MAIN = ["-m", "gqsa_compiler.cli.main", "compress"]
PATIENCE = 120.0  # on a busy machine
SOON = 60.0
SECOND = Launch(index=1, local_index=1, count=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test starts; none outlives it."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def await_text(file: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while text not in file.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, file.read_text(encoding="utf-8")
        time.sleep(0.05)


def test_two_processes_train_as_one(
    llama: Path, tmp_path: Path, running: list[subprocess.Popen[bytes]]
) -> None:
    """Shares of 2 and 1 of 3 sequences, weights and norms too, with gradient checkpoints."""
    program = ["-m", "tests.compress.train_alone_or_not", str(llama)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    running += start([*program, str(tmp_path / "two")], tmp_path / "logs")
    train(str(llama), str(tmp_path / "one"))
    for index, process in enumerate(running):
        assert process.wait(PATIENCE) == 0, (tmp_path / f"logs/{index}.err").read_text()
    alone = load_file(tmp_path / "one/0.safetensors")
    first, second = (load_file(tmp_path / f"two/{index}.safetensors") for index in range(2))
    assert alone.keys() == first.keys() == second.keys()
    assert len(alone["losses"]) == 6
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if name != "losses" and "/" not in name:
            assert torch.allclose(tensor, alone[name], rtol=1e-4, atol=1e-5), name
    assert torch.allclose(first["losses"], alone["losses"], rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_one_process_is_finished_by_two(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    running: list[subprocess.Popen[bytes]],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: w4s50g16\nblock: {epochs: 1}\n"
        "weights: {batch_tokens: 96, epochs: 3}\nscales: {batch_tokens: 96, epochs: 2}\n"
    )
    sizes = {"samples": 9, "sequence_length": 32}
    compress_model(str(llama), tmp_path / "alone", str(recipe), **sizes)  # type: ignore[arg-type]
    monkeypatch.setattr(model_phase, "SAVE_SECONDS", -1.0)
    done = 0

    def stop_at_fourth_step(_text: str) -> None:
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt

    output = tmp_path / "shared"
    with pytest.raises(KeyboardInterrupt):
        compress_model(
            str(llama),
            output,
            str(recipe),
            status=stop_at_fourth_step,
            **sizes,  # type: ignore[arg-type]
        )
    words = ["--recipe", str(recipe), "--samples", "9", "--sequence-length", "32", "--json"]
    logs = tmp_path / "logs"
    running += start([*MAIN, str(llama), "-o", str(output), *words], logs)
    for index, process in enumerate(running):
        assert process.wait(PATIENCE) == 0, (logs / f"{index}.err").read_text()
    assert json.loads((logs / "0.out").read_text())["recipe"] == "recipe"
    assert (logs / "1.out").read_text() == ""
    assert "error" not in (logs / "1.err").read_text()
    assert not work_path(output).exists()

    record = read_log(output / LOG_FILE)
    assert [step.step for step in record.steps["weights"]] == list(range(1, 10))
    assert len(record.resumed) == 1
    with CheckpointReader(output) as have, CheckpointReader(tmp_path / "alone") as want:
        validate(have)
        for name in want.layer_names:
            ours, theirs = have.layer(name), want.layer(name)
            assert (ours.indices == theirs.indices).all()
            assert (ours.qweight == theirs.qweight).mean() > 0.99
            assert abs(ours.scales.astype(float) - theirs.scales.astype(float)).max() < 1e-3
    before = read_log(tmp_path / "alone" / LOG_FILE).steps["scales"]
    after = record.steps["scales"]
    assert [s.loss for s in after] == pytest.approx([s.loss for s in before], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "moment", "said"),
    [
        (0, "sampling calibration text", "process 0 has failed"),
        (1, "training weights", "has lost the others"),
    ],
)
def test_the_death_of_one_ends_the_other(
    dies: int,
    moment: str,
    said: str,
    llama: Path,
    tmp_path: Path,
    running: list[subprocess.Popen[bytes]],
) -> None:
    output = tmp_path / "out"
    recipe = tmp_path / "long.yaml"
    recipe.write_text("base: w4s50g16\nblock: {epochs: 1}\nweights: {epochs: 10000}\n")
    words = ["--recipe", str(recipe), "--samples", "8", "--sequence-length", "32"]
    running += start([*MAIN, str(llama), "-o", str(output), *words], tmp_path / "logs")
    await_text(tmp_path / "logs/0.err", moment)
    left = 1 - dies
    time.sleep(0.5)
    assert running[left].poll() is None
    running[dies].kill()
    assert running[left].wait(SOON) == 1
    assert said in (tmp_path / f"logs/{left}.err").read_text()
    assert work_path(output).exists()  # the same command goes on
    assert not output.exists()


@pytest.mark.slow
def test_an_error_of_process_0_is_said_once(
    llama: Path, tmp_path: Path, running: list[subprocess.Popen[bytes]]
) -> None:
    words = [*MAIN, str(llama), "-o", str(tmp_path / "out"), "--samples", "1"]
    running += start(words, tmp_path / "logs")
    assert [process.wait(PATIENCE) for process in running] == [2, 1]
    assert "too few for 2 processes" in (tmp_path / "logs/0.err").read_text()
    error = (tmp_path / "logs/1.err").read_text()
    assert "too few" not in error
    assert "process 0 has failed" in error
    assert not work_path(tmp_path / "out").exists()


def test_a_launch_is_found_in_the_environment() -> None:
    environment = launch_environment(1, 3, 29500)
    assert find_launch(environment) == Launch(1, 1, 3)
    assert find_launch({}) is None
    assert find_launch({"WORLD_SIZE": "4", "RANK": "0"}) is None  # a cluster's, not a launcher's
    assert find_launch(launch_environment(0, 1, 29500)) is None
    with pytest.raises(UsageError, match="RANK=3"):
        find_launch(launch_environment(3, 3, 29500))
    with pytest.raises(UsageError, match="WORLD_SIZE=two"):
        find_launch({**environment, "WORLD_SIZE": "two"})


def test_every_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_device("auto", SECOND) == torch.device("cpu")
    assert own_device("cpu", SECOND) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"more processes than GPUs on this machine \(0\)"):
        own_device("cuda", SECOND)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("auto", SECOND) == torch.device("cuda:1")
    assert own_device("cuda", SECOND) == torch.device("cuda:1")
    with pytest.raises(UsageError, match="cuda:0 cannot be named"):
        own_device("cuda:0", SECOND)


def test_missing_accelerate_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UsageError, match=r"gqsa-compiler\[distributed\]"):
        LaunchedRanks(SECOND, torch.device("cpu"))


def test_one_process_does_not_load_accelerate() -> None:
    code = "import sys, gqsa_compiler.compress.pipeline; print('accelerate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_recipe_without_shared_stages_is_refused() -> None:
    recipe = load_recipe("w4s50g16", ["block"])

    def begin(_ranks: Ranks, _device: str) -> None:
        raise AssertionError("nothing is begun")

    with pytest.raises(UsageError, match="start one process"):
        compress_together(SECOND, "cpu", recipe, begin)  # type: ignore[arg-type]
    weights = replace(load_recipe("w4s50g16", ["weights"]), scales=None)
    assert weights.weights is not None


def test_shares_cover_the_batch() -> None:
    batch = torch.tensor([7, 3, 5, 1, 0])
    taken = []
    for index in range(3):
        ranks = LaunchedRanks.__new__(LaunchedRanks)
        ranks.index, ranks.count = index, 3
        taken.append(ranks.take(batch).tolist())
        ranks.check_batch(3)
        with pytest.raises(UsageError, match="2 sequences, too few for 3 processes"):
            ranks.check_batch(2)
    assert sorted(index for share in taken for index in share) == sorted(batch.tolist())
    assert {len(share) for share in taken} == {1, 2}


def test_gradients_are_added_up_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over three of four sequences, with nothing from the other process."""
    monkeypatch.setattr(distributed, "BUCKET_ELEMENTS", 5)
    ranks = LaunchedRanks.__new__(LaunchedRanks)
    sent: list[int] = []

    def alone(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.numel())
        return tensor

    monkeypatch.setattr(ranks, "_sum", alone)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (3,), (1,), (6,))]
    for value, parameter in enumerate(parameters):
        parameter.grad = None if value == 2 else torch.full_like(parameter, float(value + 1))
    ranks.add_gradients(parameters, 0.75)
    assert sent == [7, 6]
    for value, parameter in enumerate(parameters):
        if value == 2:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.full_like(parameter, 0.75 * (value + 1)))


def test_alone_nothing_is_shared() -> None:
    ranks = Ranks()
    batch, losses = torch.arange(3), LossParts(1.0, 2.0, 3.0)
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    ranks.check_batch(1)
    ranks.announce({})
    ranks.add_gradients([parameter], 1.0)
    assert ranks.take(batch) is batch
    assert ranks.mean_losses(losses, 1.0) is losses
    assert torch.equal(parameter.grad, torch.ones(2))


def test_processes_compare_what_they_were_started_with(tmp_path: Path) -> None:
    settings = {"seed": 1, "sizes": (2, 3)}
    with WorkDirectory.open(tmp_path / "work", settings) as work:
        work.save("tokens", {"tokens": torch.arange(3)}, {"step": 2})
        reader = WorkReader.of_other(tmp_path / "work", settings)
        found = reader.load("tokens")
        assert found is not None
        assert torch.equal(found[0]["tokens"], torch.arange(3))
        assert reader.load("other") is None
        with pytest.raises(UsageError, match="seed is 1 in process 0 and 2 in this one"):
            WorkReader.of_other(tmp_path / "work", {**settings, "seed": 2})
    with pytest.raises(UsageError, match="same file system"):
        WorkReader.of_other(tmp_path / "nowhere", settings)


def test_a_report_travels_as_json() -> None:
    layer = LayerReport("a", 2, 16, 4, 16, 0.5, 20)
    values = {"model": "m", "recipe": "r", "output": "o", "calibration": "c", "divergence": None}
    numbers = {"bits_per_weight": 3.6, "nominal_bits_per_weight": None, "seconds": 0.1}
    counts = {"calibration_samples": 2, "calibration_tokens": 64}
    report = CompressReport(layers=(layer,), block_losses=(0.1,), **values, **numbers, **counts)  # type: ignore[arg-type]
    assert report_from_dict(json.loads(json.dumps(report.to_dict()))) == report
