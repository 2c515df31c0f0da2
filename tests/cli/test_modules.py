"""`gqsa compress` and `gqsa compile` of an ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from gqsa_compiler.runtime import load_module
from tests.cli.conftest import Gqsa
from tests.frontends.onnx.graphs import model, node


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an MLP, model.onnx, and two calls of it."""
    folder = tmp_path_factory.mktemp("onnx")
    rng = np.random.default_rng(0)
    arrays = {
        "up": rng.standard_normal((32, 64)).astype(np.float32) / 6,
        "down": rng.standard_normal((64, 32)).astype(np.float32) / 8,
        "last": rng.standard_normal((32, 5)).astype(np.float32) / 6,
        "bias": rng.standard_normal(32).astype(np.float32),
    }
    nodes = [
        node("MatMul", "x up", "a"), node("Relu", "a", "b"), node("Gemm", "b down bias", "c"),
        node("MatMul", "c last", "y"),
    ]  # fmt: skip
    graph = model(nodes, {"x": (TensorProto.FLOAT, ["rows", 32])}, {"y": ["rows", 5]}, arrays)
    onnx.save(graph, str(folder / "model.onnx"))
    for name, rows in (("a", 40), ("b", 24)):
        np.savez(folder / f"{name}.npz", x=rng.standard_normal((rows, 32)).astype(np.float32))
    return folder


def _output(verb: str, folder: Path) -> tuple[str | Path, ...]:
    return ("-o", folder / "x") if verb == "export" else ()


def test_from_a_file_to_an_artefact(gqsa: Gqsa, place: Path, tmp_path: Path) -> None:
    calls = ["--inputs", place / "a.npz", "--inputs", place / "b.npz"]
    done = gqsa(
        "compress", place / "model.onnx", "-o", tmp_path / "ckpt", "--recipe", "w4s30g16", *calls,
        "--size", "rows=1:64", "--ignore", "las*",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.startswith("2 layers compressed to 5.")
    assert "last stays dense: left dense on purpose" in done.err
    assert f"Next: gqsa compile {tmp_path / 'ckpt'}" in done.err
    done = gqsa("compile", tmp_path / "ckpt", "-o", tmp_path / "a", "--activations", "float32")
    assert done.code == 0, done.err
    x = np.random.default_rng(1).standard_normal((7, 32)).astype(np.float32)
    evaluator = ReferenceEvaluator(str(tmp_path / "ckpt" / "model.onnx"))
    (wanted,) = evaluator.run(None, {"x": x})
    assert "KV cache" not in done.out
    assert "head" not in done.out
    shown = gqsa("inspect", tmp_path / "ckpt", "--json").json
    assert [layer["name"] for layer in shown["layers"]] == ["down", "up"]
    for words in (("export", "--to", "gptq"), ("tune", "--db", tmp_path / "db")):
        wrong = gqsa(words[0], tmp_path / "ckpt", *words[1:], *_output(words[0], tmp_path))
        assert (wrong.code, "is that of a module" in wrong.error) == (1, True), wrong.err
    with load_module(tmp_path / "a") as module:
        np.testing.assert_allclose(module(x), wanted, rtol=1e-4, atol=1e-5)
    done = gqsa("compress", tmp_path / "ckpt", "-o", tmp_path / "b", *calls)
    assert (done.code, "is compressed already" in done.error) == (2, True)


def test_json(gqsa: Gqsa, place: Path, tmp_path: Path) -> None:
    done = gqsa(
        "compress",
        place / "model.onnx",
        "-o",
        tmp_path / "c",
        "--inputs",
        place / "a.npz",
        "--json",
    )
    assert [layer["name"] for layer in done.json["layers"]] == ["up", "down", "last"]
    assert done.json["dense"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --inputs FILE.npz"),
        (["--inputs", "a.npz", "--stages", "none"], "--stages is for language models"),
        (["--inputs", "a.npz", "--calibration", "x.txt"], "--calibration is for language models"),
        (["--inputs", "a.npz", "--device", "cuda"], "--device is for language models"),
        (["--inputs", "a.npz", "--restart"], "--restart is for language models"),
        (["--inputs", "a.npz", "--size", "rows=0:4"], "Size 'rows' cannot go from 0 to 4"),
        (["--inputs", "a.npz", "--size", "rows"], "not of the form NAME=N"),
        (["--inputs", "a.npz", "--size", "rows=1:8"], "axis 0 of input x has size 40"),
        (["--inputs", "none.npz"], "There is no file none.npz"),
        (["--inputs", "a.npz", "--ignore", "lost*"], "No linear layer is called 'lost*'"),
        (["--inputs", "a.npz", "-o", "model.onnx"], "model.onnx"),
    ],
)
def test_bad_requests(
    gqsa: Gqsa, place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(place)
    done = gqsa("compress", "model.onnx", *([] if "-o" in words else ["-o", "out"]), *words)
    assert (done.code, message in done.error) == (2, True), done.err
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--recipe", "w4s30g16"), ("--context", "64"), ("--max-batch", "2"), ("--db", "tuning"),
        ("--prefill-chunk", "64"), ("--head", "stored"), ("--kv-cache", "float32"),
        ("--chip", "x"), ("--adapter", "a=b"), ("--merge-adapter", "b"),
        ("--adapter-dtype", "float32"),
    ],
)  # fmt: skip
def test_compile_refuses_what_a_module_does_not_have(
    gqsa: Gqsa, place: Path, tmp_path: Path, words: tuple[str, str]
) -> None:
    done = gqsa("compile", place / "model.onnx", "-o", tmp_path / "a", *words)
    assert (done.code, f"{words[0]} is for language models" in done.error) == (2, True), done.err
    assert not (tmp_path / "a").exists()


def test_a_file_that_is_not_there(gqsa: Gqsa, tmp_path: Path) -> None:
    for verb in ("compress", "compile"):
        done = gqsa(verb, tmp_path / "none.onnx", "-o", tmp_path / "a")
        assert (done.code, "There is no file" in done.error) == (2, True)


def test_options_and_files_of_other_kinds(gqsa: Gqsa, place: Path, tmp_path: Path) -> None:
    for option, value in (("--inputs", "a.npz"), ("--size", "n=1"), ("--ignore", "x")):
        done = gqsa("compress", "smollm2-135m", "-o", tmp_path / "c", option, value)
        assert (done.code, f"{option} is for ONNX files" in done.error) == (2, True)
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),))
    torch.export.save(program, tmp_path / "m.pt2")
    for verb in ("compress", "compile"):
        done = gqsa(verb, tmp_path / "m.pt2", "-o", tmp_path / "c")
        assert (done.code, "can run code that is in it" in done.error) == (2, True)
