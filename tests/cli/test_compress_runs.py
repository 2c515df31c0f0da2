"""`gqsa compress` from the outside: its options, and runs that end early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gqsa_compiler.cli import console
from gqsa_compiler.cli.main import main
from gqsa_compiler.compress.work.runlog import read_log
from tests.cli.conftest import Gqsa
from tests.compress.kill_runs import content
from tests.tiny_models import make_tiny

FEW = ("--samples", "4", "--sequence-length", "16")
STAGES = (
    "measuring sensitivities",
    "compressing blocks",
    "running the dense model",
    "training weights",
    "training scales",
    "writing",
)
QUICK = ("compressing blocks", "training scales", "writing")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("runs") / "dense", num_hidden_layers=1)


def at(monkeypatch: pytest.MonkeyPatch, stage: str, act: Callable[[], None]) -> None:
    """Do something when a stage begins."""

    def progress(self: object, name: str, done: int, total: int) -> None:
        if name == stage:
            act()

    monkeypatch.setattr(console.PlainProgress, "__call__", progress)


@pytest.fixture(scope="module")
def whole(dense: Path) -> dict[str, bytes]:
    """The files of a run that nothing disturbs."""
    output = dense.parent / "whole"
    assert main(["compress", str(dense), *FEW, "-o", str(output)]) == 0
    return content(output)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("training scales", signal.SIGTERM),
        *(
            # Every stage, by Python's interface: tests/compress/test_resume.py.
            pytest.param(stage, signal.SIGINT, marks=() if stage in QUICK else pytest.mark.slow)
            for stage in STAGES
        ),
    ],
)
def test_the_same_command_goes_on(
    stage: str,
    number: signal.Signals,
    gqsa: Gqsa,
    dense: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("compress", dense, *FEW, "-o")
    with monkeypatch.context() as patch:
        at(patch, stage, lambda: signal.raise_signal(number))
        done = gqsa(*words, tmp_path / "out")
    assert done.code == 128 + number
    assert done.error.startswith("Interrupted" if number == signal.SIGINT else "Stopped by SIGTERM")
    work = tmp_path / "out.work"
    assert f"What is done is kept in {work}: the same command goes on from there." in done.err
    again = gqsa(*words, tmp_path / "out")
    assert again.code == 0
    assert "sampling calibration text" not in again.err
    assert content(tmp_path / "out") == whole
    assert not work.exists()


def test_nothing_is_promised_where_nothing_was_done(
    gqsa: Gqsa, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "sampling calibration text", lambda: signal.raise_signal(signal.SIGINT))
    done = gqsa("compress", dense, "-o", tmp_path / "out", *FEW)
    assert done.error == "Interrupted."
    assert "goes on" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_restart(gqsa: Gqsa, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("compress", dense, "-o", tmp_path / "out", *FEW)
    with monkeypatch.context() as patch:
        at(patch, "training weights", lambda: signal.raise_signal(signal.SIGINT))
        gqsa(*words)
    done = gqsa(*words, "--seed", "1")
    assert done.code == 2
    assert "calibration.seed was 0 and is now 1" in done.error
    assert "(--restart)" in done.error
    assert "goes on" not in done.err
    assert gqsa(*words, "--seed", "1", "--restart").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_processes_and_a_real_ctrl_c(gqsa: Gqsa, dense: Path, tmp_path: Path) -> None:
    """A second run is refused; the first ends at Ctrl-C, and its work is free again."""
    recipe = tmp_path / "long.yaml"
    recipe.write_text("base: w4s50g16\nscales: {epochs: 100000}\nweights: null\n")
    words = [str(word) for word in ("compress", dense, "-o", tmp_path / "out", *FEW, "--recipe")]
    code = "import sys; from gqsa_compiler.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, str(recipe)], stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "out.work" / "compression.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and read_log(log).steps) and time.monotonic() < deadline:
            time.sleep(0.05)
        done = gqsa(*words, recipe)
        assert (done.code, "Another run is using" in done.error) == (2, True)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.endswith("goes on from there.\nerror: Interrupted.\n")
    done = gqsa(*words, "w4s50g16")
    assert "other settings: recipe.name was" in done.error


def test_options_reach_the_checkpoint(gqsa: Gqsa, dense: Path, tmp_path: Path) -> None:
    text, more = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in (text, more):
        path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    done = gqsa(
        *("compress", dense, "-o", tmp_path / "out", "--stages", "block, scales"),
        *("--budget", "3.1", "--balance", "row", "--calibration", text, "--calibration", more),
        *("--samples", "all", "--sequence-length", "16", "--device", "cpu", "--json"),
    )
    assert done.code == 0
    report = done.json
    assert report["bits_per_weight"] <= 3.1
    assert report["calibration"] == f"{text}, {more}"
    assert report["calibration_tokens"] == 16 * report["calibration_samples"]
    assert report["divergence"] > 0
    for line in (
        "training         block, scales",
        "budget           3.1bits",
        "samples          all",
    ):
        assert f"  {line}\n" in done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["sparsity"]["balance"] == "row"
    found = gqsa("inspect", tmp_path / "out", "--json").json
    layers = [layer for layer in found["layers"] if layer["name"] != "lm_head"]
    weights = sum(layer["n"] * layer["k"] for layer in layers)
    assert report["bits_per_weight"] == 8 * sum(layer["bytes"] for layer in layers) / weights
    ratios = {layer["sparsity"] for layer in layers}
    assert len(ratios) > 1
    record = read_log(tmp_path / "out" / "compression.jsonl")
    assert set(record.steps) == {"scales"}


def test_a_short_text_is_taken_whole(gqsa: Gqsa, dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    words = ("compress", dense, "-o", tmp_path / "out", "--calibration", text, "--stages", "none")
    done = gqsa(*words)
    assert done.code == 0
    assert "samples          up to 128\n" in done.err
    samples = int(done.err.split("Calibrated on ")[1].split()[0])
    assert 1 < samples < 128


def test_the_longest_sequence_is_the_models(gqsa: Gqsa, dense: Path, tmp_path: Path) -> None:
    """512 tokens suit training, but the tiny model takes 256."""
    done = gqsa("compress", dense, "-o", tmp_path / "out", "--samples", "2")
    assert done.code == 0
    assert "sequence length  256\n" in done.err
    done = gqsa("compress", dense, "-o", tmp_path / "b", "--sequence-length", "257")
    assert (done.code, "takes at most 256 tokens" in done.error) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stages", "blocks"), "no training stage 'blocks'; did you mean block?"),
        (("--stages", "none,block"), "name it alone"),
        (("--stages", "block, block"), "block is named twice"),
        (("--budget", "small"), "The budget 'small' is neither"),
        (("--budget", "0.1"), "budget"),
        (("--balance", "column"), "Invalid value for '--balance'"),
        (("--samples", "some"), "'some' samples: give a whole number of at least 1, or all."),
        (("--samples", "all"), "no whole to take"),
        (("--device", "abacus"), "no device 'abacus'"),
        (("--device", "meta"), "no device 'meta'"),
        (("--device", "cuda:77"), "no device 'cuda:77'"),
        (("--calibration", "hf:"), "names no data set"),
        (("--recipe", "w4s50"), "'w4s50' is not a recipe"),
        (("--recipe", "none.yaml"), "none.yaml"),
    ],
)
def test_bad_options(
    gqsa: Gqsa, dense: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = gqsa("compress", dense, "-o", tmp_path / "out", *FEW[:0], *words)
    assert message in done.error
    assert done.code == 2
    assert list(tmp_path.iterdir()) == []


def test_every_checkpoint_compiles(gqsa: Gqsa, dense: Path, tmp_path: Path) -> None:
    """Layers of different sparsities, as a budget makes them, and trained norms."""
    words = ("compress", dense, "-o", tmp_path / "c", *FEW, "--recipe", "w4s50g16")
    assert gqsa(*words, "--budget", "3.3").code == 0
    # It is the layers that are compared: a random model's loss moves by 1% with what is rounded.
    exact = ("--activations", "float32", "--head", "stored", "--kv-cache", "float32")
    done = gqsa(
        "compile", tmp_path / "c", "-o", tmp_path / "a", "--context", "64", *exact, "--json"
    )
    assert done.code == 0
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    scores = gqsa(
        *("eval", tmp_path / "a", "--reference", tmp_path / "c", "--text", text),
        *("--context", "48", "--json"),
    ).json
    assert scores["perplexity"] == pytest.approx(scores["reference_perplexity"], rel=5e-3)


def test_compile_with_a_recipe_says_that_it_does_not_train(
    gqsa: Gqsa, dense: Path, tmp_path: Path
) -> None:
    words = ("compile", dense, "--recipe", "w4s30g16", "-o", tmp_path / "a", "--context", "64")
    done = gqsa(*words)
    assert done.code == 0
    assert "in one shot here. gqsa compress trains it too" in done.err
    assert "training" not in done.err.split("gqsa compress trains")[1]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_wrong_options_are_found_without_pytorch(dense: Path, tmp_path: Path) -> None:
    """Up to and including the model's name and its longest sequence."""
    code = (
        "import sys; from gqsa_compiler.cli.main import main; code = main();"
        "sys.exit(100 if 'torch' in sys.modules else code)"
    )
    words = ["compress", str(dense), "-o", str(tmp_path / "out"), "--sequence-length", "999"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ
    )
    assert "takes at most 256 tokens" in done.stderr
    assert done.returncode == 2
