"""`gqsa compress` and `gqsa compile` on a tiny model, to the figures that `gqsa eval` gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gqsa_compiler.cli.compile import default_output
from gqsa_compiler.cli.compile_report import print_report
from gqsa_compiler.cli.main import main_compile
from gqsa_compiler.targets import host_flags, parse_target
from tests.cli.conftest import Gqsa
from tests.tiny_models import make_tiny

FEW = ("--samples", "2", "--sequence-length", "16")
TEXT = "The quick brown fox jumps over the lazy dog, and the words were many. " * 8


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("path") / "dense", num_hidden_layers=1)


@pytest.fixture(scope="module")
def checkpoint(dense: Path) -> Path:
    from gqsa_compiler.compress import compress_model

    output = dense.parent / "checkpoint"
    compress_model(str(dense), output, "w4s30g16", stages="none", samples=2, sequence_length=16)
    return output


def test_compress_says_what_it_did(gqsa: Gqsa, dense: Path, tmp_path: Path) -> None:
    words = ("compress", dense, "--recipe", "w4s50g16", "--stages", "none", *FEW)
    done = gqsa(*words, "-o", tmp_path / "a", "--json", "--seed", "3", "--balance", "row")
    assert done.code == 0
    assert done.json["recipe"] == "w4s50g16"
    assert len(done.json["layers"]) == 7
    for setting in ("recipe", "w4s50g16", "text that the model writes", "row"):
        assert setting in done.err
    found = gqsa("inspect", tmp_path / "a", "--json").json
    head, *layers = found["layers"]
    assert head == done.json["head"]
    assert (head["name"], head["bits"], head["group_size"]) == ("lm_head", 4, 32)
    assert head["sparsity"] == 0
    assert [layer["name"] for layer in layers] == sorted(
        layer["name"] for layer in done.json["layers"]
    )
    for layer in layers:
        assert layer.keys() == {"name", "n", "k", "bits", "group_size", "sparsity", "bytes"}
        assert (layer["bits"], layer["group_size"]) == (4, 16)
        assert layer["sparsity"] == pytest.approx(0.5, abs=0.02)
    for what, some in (found, found["layers"]), (done.json, layers):
        weights = sum(layer["n"] * layer["k"] for layer in some)
        stored = sum(layer["bytes"] for layer in some)
        assert what["bits_per_weight"] == pytest.approx(8 * stored / weights)


def test_compress_prints_a_line_and_overwrites(gqsa: Gqsa, dense: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "text.txt"
    calibration.write_text(TEXT)
    words = ("compress", dense, "-o", tmp_path / "a", "--stages", "none", *FEW)
    for extra in ((), ("--overwrite",)):
        done = gqsa(*words, "--calibration", calibration, *extra)
        assert done.code == 0
        assert done.out.startswith("7 layers compressed to ")
        assert ", the head to 5." in done.out
    table = gqsa("inspect", tmp_path / "a")
    assert "8 compressed layers" in table.out
    assert "model.layers.0.mlp.down_proj" in table.out


def test_compile_reports_runs_and_agrees_with_the_checkpoint(
    gqsa: Gqsa,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = gqsa("compile", checkpoint, "--debug-dump", "dump", "--context", "64", "--json")
    assert done.code == 0
    report = done.json
    artefact = tmp_path / "checkpoint-cpu"
    assert report == json.loads((artefact / "report.json").read_text())
    assert list((tmp_path / "dump").iterdir())
    assert sum(report["kernel_counts"].values()) == len(report["kernels"])

    print_report(report)
    out = capfd.readouterr().out
    for words in ("compressed layers", "bits a weight", "read to decode a token", "KV cache"):
        assert words in out
    for kernel in report["kernel_counts"]:
        assert kernel in out

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    eval_words = ("--text", text, "--context", "48", "--json")
    scores = gqsa("eval", artefact, "--reference", checkpoint, *eval_words).json
    assert scores["perplexity"] == pytest.approx(scores["reference_perplexity"], rel=5e-3)
    assert scores["kl_divergence"] < 1e-3
    alone = gqsa("eval", checkpoint, *eval_words).json
    assert alone["perplexity"] == pytest.approx(scores["reference_perplexity"], rel=1e-6)

    answer = gqsa("run", artefact, "-p", "The", "--max-tokens", "4", "--temperature", "0")
    assert answer.code == 0
    assert answer.out


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("activations", ["float32", "int16", "int8"])
def test_other_targets_run_here(
    gqsa: Gqsa, checkpoint: Path, tmp_path: Path, target: str, activations: str
) -> None:
    missing = set(parse_target(target).required_flags) - host_flags()
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}, which {target} needs")
    artefact = tmp_path / "artefact"
    words = ("--target", target, "--activations", activations, "-o", artefact)
    assert gqsa("compile", checkpoint, *words).code == 0
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    scores = gqsa(
        *("eval", artefact, "--reference", checkpoint, "--text", text, "--context", "48", "--json")
    ).json
    assert scores["kl_divergence"] < (5e-2 if activations == "int8" else 1e-3)


def test_gqsa_compile_fails_as_the_verb_does(capfd: pytest.CaptureFixture[str]) -> None:
    assert main_compile(["none", "--target", "z80"]) == 2
    assert "Unknown target" in capfd.readouterr().err
    assert main_compile(["none", "--frob"]) == 2
    assert "gqsa-compile --help" in capfd.readouterr().err


def test_a_report_without_sparse_layers(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = {"kernel": "generic.dense", "bytes": 1000}
    fallback = {"layer": "a.b", "reason": "why", "bytes": 1000, "extra_bytes": 900}
    report = {
        "bytes_by_kind": {"compressed": 0, "dense_linear": 1000, "tables": 0, "other": 0},
        "bits_per_weight": 0.0,
        "bytes_per_token": 1000,
        "kv_cache_dtype": "float16",
        "kv_cache_bytes_per_token": 8,
        "workspace_bytes": 16,
        "kernels": [kernel],
        "kernel_counts": {"generic.dense": 1},
        "fallbacks": [fallback] * 10,
        "configuration_sources": {},
        "seconds": {"generating code": 61.0},
    }
    print_report(report)
    out = capsys.readouterr().out
    assert "bits a weight" not in out
    assert "8 B a token, float16" in out
    assert "10 linear layers stayed dense and cost 9.0 kB more a token" in out
    assert "and 2 more" in out
    assert "generating code 1 min 01 s" in out
    print_report({**report, "fallbacks": []})
    assert "Nothing fell back." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "target", "name"),
    [
        ("smollm2-135m", "cpu", "smollm2-135m-cpu"),
        ("owner/Model-1B", "cuda:sm_90", "Model-1B-cuda-sm_90"),
        ("folder/model.Q4_1.gguf", "x86-64-v3", "model.Q4_1-x86-64-v3"),
        ("owner/Model", "x86-64-v3, x86-64-v4", "Model-x86-64-v3-x86-64-v4"),
    ],
)
def test_default_output(model: str, target: str, name: str) -> None:
    assert default_output(model, target) == Path(name)


def test_default_output_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert default_output(f"{tmp_path}/model/", "cpu") == Path("model-cpu")
