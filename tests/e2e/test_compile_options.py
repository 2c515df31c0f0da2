"""What `compile` accepts, refuses and reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler import bundle as bundles
from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime, toolchain
from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.report import CompileReport
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.schedules.activations import default_activations
from gqsa_compiler.targets import parse_target
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

PROMPT = [5, 17, 80, 33, 9]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny dense Llama with two layers."""
    return make_tiny("llama", tmp_path_factory.mktemp("llama") / "dense", num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(dense: Path) -> Path:
    """Return it compressed."""
    return make_checkpoint(dense, dense.parent / "checkpoint")


@pytest.fixture(scope="module")
def artefact(checkpoint: Path) -> Path:
    """Return it compiled, with the runtime's libraries and the modules of every phase."""
    output = checkpoint.parent / "artefact"
    gqsa_compile(
        str(checkpoint), output, bundle=True, debug_dump=checkpoint.parent / "dump", max_batch=3
    )
    return output


@pytest.fixture(scope="module")
def plain(checkpoint: Path, artefact: Path) -> tuple[Path, CompileReport]:
    """Return it compiled with a float32 cache and the head as it is stored, and the report.

    The modules of its phases go to where the first one's are, and a file of somebody else's.
    """
    dump = Path(shutil.copytree(artefact.parent / "dump", artefact.parent / "dump-again"))
    (dump / "notes.py").write_text("# mine\n")
    output = checkpoint.parent / "plain"
    report = gqsa_compile(
        str(checkpoint), output, kv_cache="float32", head="stored", debug_dump=dump
    )
    return output, report


def test_the_artefact_is_whole(artefact: Path) -> None:
    names = {path.name for path in artefact.iterdir()}
    assert {
        "model.so",
        "params.safetensors",
        "manifest.json",
        "report.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "lib",
    } <= names
    assert {path.name for path in (artefact / "lib").iterdir()} == {
        "SHA256SUMS",
        "libtvm_runtime.so",
        "libtvm_runtime_extra.so",
        "libtvm_ffi.so",
    }
    manifest = Manifest.read(artefact)
    assert (manifest.model.architecture, manifest.model.max_batch) == ("llama", 3)
    assert manifest.memory.weights_bytes == sum(
        int(np.prod(p.shape)) * np.dtype(p.dtype).itemsize for p in manifest.parameters
    )


def test_the_report_accounts_for_every_layer(artefact: Path) -> None:
    report = json.loads((artefact / "report.json").read_text())
    # Two layers of qkv, o, gate+up and down, and the tied head.
    kind = "x86" if default_activations(parse_target("cpu")) == "int16" else "generic"
    assert report["kernel_counts"] == {f"{kind}.bsr_int4": 8, f"{kind}.bsr_int8": 1}
    assert report["fallbacks"] == []
    assert 0.2 < np.mean([k["sparsity"] for k in report["kernels"][:-1]]) < 0.6
    assert 3 < report["bits_per_weight"] < 6
    kinds = report["bytes_by_kind"]
    # One row each is read of RoPE's table and of the embedding, whose rounded copy the head reads.
    rope, row = 256 * 16 * 4, 64 * 4
    assert kinds["tables"] == rope + 320 * row
    assert report["bytes_per_token"] == sum(kinds.values()) - kinds["tables"] + 16 * 4 + row


def test_keys_and_values_are_float16_unless_float32_is_asked_for(
    artefact: Path, plain: tuple[Path, CompileReport]
) -> None:
    output, report = plain
    wide, narrow = Manifest.read(output).kv_cache, Manifest.read(artefact).kv_cache
    assert (
        (wide.dtype, narrow.dtype) == (report.kv_cache_dtype, "float16") == ("float32", "float16")
    )
    assert wide.bytes_per_token == 2 * narrow.bytes_per_token == report.kv_cache_bytes_per_token


def test_the_head_stays_as_it_is_stored_if_that_is_asked_for(
    plain: tuple[Path, CompileReport],
) -> None:
    report = plain[1]
    assert report.kernel_counts["generic.dense"] == 1
    assert [f.layer for f in report.fallbacks] == ["model.embed_tokens"]
    assert report.fallbacks[0].by_choice
    # A tied embedding is the head; what is left of the tables is RoPE's.
    assert report.bytes_by_kind["tables"] == 256 * 16 * 4
    assert report.bytes_by_kind["head"] == 0


def test_the_dump_has_a_module_for_each_phase(artefact: Path) -> None:
    names = sorted(path.name for path in (artefact.parent / "dump").iterdir())
    assert names == [
        "0-bind.py",
        "1-graph.py",
        "2-dispatch.py",
        "3-lower.py",
        "4-memory.py",
        "5-finalize.py",
    ]
    assert "gqsa.linear" in (artefact.parent / "dump" / "1-graph.py").read_text()


def test_a_batch_over_the_paged_cache_gives_what_each_prompt_gives_alone(artefact: Path) -> None:
    prompts = [PROMPT, [9, 8, 7], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
    with runtime.load(artefact) as model:
        alone = [model.generate(p, max_tokens=10, temperature=0.0).token_ids for p in prompts]
        together = model.generate_batch(prompts, max_tokens=10, temperature=0.0)
    assert [g.token_ids for g in together] == alone


def test_an_overwritten_artefact_is_replaced_and_another_file_is_not(
    dense: Path, artefact: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="exists"):
        gqsa_compile(str(dense), artefact, recipe="dense")
    output = tmp_path / "artefact"
    shutil.copytree(artefact, output)
    gqsa_compile(str(dense), output, recipe="dense", overwrite=True)
    assert {k.weight for k in Manifest.read(output).kernels} == {"float32"}


def test_a_dense_model_needs_a_recipe_and_the_error_names_both_ways(
    dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"gqsa compress .*--recipe dense"):
        gqsa_compile(str(dense), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_takes_no_recipe(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="compressed already"):
        gqsa_compile(str(checkpoint), tmp_path / "out", recipe="w4s50g16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "z80"}, "Unknown target 'z80'"),
        ({"context_length": 0}, "context length"),
        ({"context_length": 100_000}, r"100000 is more than the model's 256"),
        ({"prefill_chunk": 0}, "prefill chunk"),
        ({"max_batch": -1}, "max batch"),
        ({"max_batch": 9, "prefill_chunk": 8}, "max batch is 9, more than the prefill chunk 8"),
        ({"activations": "int4"}, "Unknown activations 'int4'"),
        ({"kv_cache": "int8"}, "Unknown KV cache 'int8'; choose one of float16, float32"),
    ],
)
def test_a_bad_option_is_one_sentence_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        gqsa_compile(str(checkpoint), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_no_fallback_names_the_layers_that_stayed_dense(dense: Path, tmp_path: Path) -> None:
    from gqsa_compiler.checkpoint import CheckpointWriter, QuantizationConfig, from_dense
    from gqsa_compiler.frontends.resolve import resolve

    source = resolve(str(dense))
    partly = tmp_path / "partly"
    with CheckpointWriter(partly, source.config, QuantizationConfig(ignore=("lm_head",))) as out:
        for name in source.tensor_names():
            if name.endswith("mlp.up_proj.weight"):
                out.add_layer(from_dense(name.removesuffix(".weight"), source.tensor(name), 16))
            else:
                out.add_tensor(name, source.tensor(name))
        source.save_tokenizer(out.directory)
    with pytest.raises(CompileError, match=r"layers stayed dense.*self_attn"):
        gqsa_compile(str(partly), tmp_path / "out", no_fallback=True)
    report = gqsa_compile(str(partly), tmp_path / "out")
    stayed = [f for f in report.fallbacks if not f.by_choice]
    # gate and up cannot fold any more: one is dense, the other is not.
    assert "model.layers.0.mlp.gate_proj" in [f.layer for f in stayed]
    assert all(f.extra_bytes > 0 for f in stayed)


def test_bundles_need_the_targets_libraries(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "library_linker", lambda _target: None)
    monkeypatch.setenv("GQSA_NATIVE", str(tmp_path / "nowhere"))
    with pytest.raises(CompileError, match="--bundle needs the runtime libraries for aarch64"):
        gqsa_compile(str(checkpoint), tmp_path / "out", target="aarch64", bundle=True)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_linker_is_found_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr(toolchain, "find_zig", lambda: None)
    with pytest.raises(CompileError, match=r"aarch64 needs aarch64-linux-gnu-g\+\+.*apt-get"):
        gqsa_compile("no such model", tmp_path / "out", target="aarch64")
    with pytest.raises(CompileError, match=r"cpu needs g\+\+"):
        gqsa_compile(str(checkpoint), tmp_path / "out")


def test_dense_and_no_fallback_contradict_each_other(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--no-fallback forbids"):
        gqsa_compile(str(dense), tmp_path / "out", recipe="dense", no_fallback=True)


def test_a_second_dump_replaces_the_first(
    artefact: Path, plain: tuple[Path, CompileReport]
) -> None:
    first, second = artefact.parent / "dump", artefact.parent / "dump-again"
    names = {path.name for path in first.iterdir()}
    assert {path.name for path in second.iterdir()} == {*names, "notes.py"}
    assert (second / "notes.py").read_text() == "# mine\n"
    for name in names - {"0-bind.py"}:
        assert (first / name).read_text() != (second / name).read_text(), name


def test_another_tvm_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tvm.py").write_text("__version__ = '0.19.0'\n")
    code = "import gqsa_compiler.compile"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "gqsa needs apache-tvm 0.27, and 0.19.0 is installed; pip install" in last
