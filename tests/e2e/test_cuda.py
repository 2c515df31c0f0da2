"""Models compiled for GPUs: what the artefact holds, and their numbers under the emulation."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler._tvm import relax, tirx, tvm
from gqsa_compiler.compile import plan_kernels
from gqsa_compiler.compile_options import CompileOptions
from gqsa_compiler.errors import ArtefactError, CompileError, UsageError
from gqsa_compiler.frontends.hf import import_model
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.model_weights import ModelWeights, kv_spec
from gqsa_compiler.passes.add_decode import DECODE
from gqsa_compiler.passes.capture_decode import CAPTURED, RUN_OR_CAPTURE
from gqsa_compiler.passes.pipeline import PipelineOptions, run
from gqsa_compiler.runtime.gpus import open_driver
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.schedules.cuda import nvcc
from gqsa_compiler.schedules.generic.emit import SCHEDULED
from gqsa_compiler.schedules.kv_cache import ATTENTION
from gqsa_compiler.targets import parse_target
from tests.e2e.cuda_emulated import emulated_gpu
from tests.passes.helpers import values
from tests.schedules.cuda.test_nvcc import needs_nvcc
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

HOST = {
    "relax.vm.alloc_tensor",
    "vm.builtin.alloc_shape_heap",
    "vm.builtin.attention_kv_cache_get_query_positions",
    "vm.builtin.check_tensor_info",
    "vm.builtin.make_shape",
    "vm.builtin.match_shape",
    "vm.builtin.reshape",
    "vm.builtin.tuple_getitem",
}
TOKENS = np.random.default_rng(0).integers(3, 300, 45)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny compressed Llama with one layer."""
    folder = tmp_path_factory.mktemp("cuda")
    dense = make_tiny("llama", folder / "dense", num_hidden_layers=1)
    return make_checkpoint(dense, folder / "checkpoint")


def test_every_function_of_a_model_has_a_kernel(checkpoint: Path) -> None:
    plan, _ = plan_kernels(str(checkpoint), CompileOptions(target="cuda:sm_90"))
    assert {kernel.rule.name for kernel in plan.kernels} == {"cuda.bsr_int4", "cuda.bsr_int8"}
    assert plan.kernels[-1].rule.name == "cuda.bsr_int8"  # the head, the last layer of all
    stored = CompileOptions(target="cuda:sm_80", head="stored", activations="int16")
    plan, _ = plan_kernels(str(checkpoint), stored)
    assert {kernel.rule.name for kernel in plan.kernels} == {"cuda.bsr_int4", "cuda.dense"}


def test_without_nvcc_nothing_is_begun(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc.shutil, "which", lambda _: None)
    monkeypatch.setattr(nvcc, "_package_folders", lambda: ())
    with pytest.raises(CompileError, match=r"nvcc.*pip install 'gqsa-compiler\[cuda\]'"):
        gqsa_compile(str(checkpoint), tmp_path / "artefact", target="cuda:sm_90")


def test_a_gpu_keeps_keys_and_values_in_float16(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"kept in float16, not in float32"):
        gqsa_compile(str(checkpoint), tmp_path / "a", target="cuda:sm_90", kv_cache="float32")


@needs_nvcc
@pytest.mark.slow
def test_an_artefact_holds_machine_code(checkpoint: Path, tmp_path: Path) -> None:
    """No source, one cubin of the named architecture; here, without a driver, it says so."""
    output = tmp_path / "artefact"
    gqsa_compile(str(checkpoint), output, target="cuda:sm_90", bundle=True)
    target = Manifest.read(output).variants[0].target
    assert (target.kind, target.arch, target.flags) == ("cuda", "sm_90", ("sm_90",))
    assert (target.device_type, target.triple.endswith("-linux-gnu")) == (2, True)
    code = (output / "model.so").read_bytes()
    assert b"__global__" not in code
    assert (output / "lib" / "libtvm_runtime_cuda.so").is_file()
    try:
        open_driver()
    except ArtefactError:
        with pytest.raises(ArtefactError, match="no NVIDIA driver"):
            runtime.load(output)


def test_a_token_is_one_graph(checkpoint: Path) -> None:
    """All that `forward` launches, but the choice of rows, is in the captured function."""
    source = resolve(str(checkpoint))
    imported = import_model(source, context_length=64)
    options = PipelineOptions(
        parse_target("cuda:sm_80"),
        kv_spec(imported, "float16"),
        {"n": 16, "m": 64},
        "float16",
        captured_batch=2,
    )
    mod, _ = run(imported.mod, ModelWeights(source, imported).records(), options)
    launched = {name: _calls(mod, name) for name in ("forward", DECODE, CAPTURED)}
    kernels = {str(g.name_hint) for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
    kernels = {name for name in kernels if SCHEDULED in (mod[name].attrs or {})} | {ATTENTION}
    forward, captured = ([c for c in launched[n] if c in kernels] for n in ("forward", CAPTURED))
    assert len(captured) == len(forward) - 1
    assert captured.count(ATTENTION) == 1
    assert not kernels.intersection(launched[DECODE])
    assert RUN_OR_CAPTURE in launched[DECODE]
    # What else it calls is done by the host and asks nothing of the GPU.
    computed = "compute_symbolic_expr"  # numbers
    others = {n for n in launched[CAPTURED] if n not in kernels and not n.startswith(computed)}
    assert others <= HOST, others - HOST


def _calls(mod: Any, name: str) -> list[str]:
    """Name what a lowered function calls."""
    found = []
    for value in values(mod, name):
        if isinstance(value, relax.Call):
            op: Any = value.op
            if isinstance(op, tvm.ir.Op) and op.name == "relax.call_builtin_with_ctx":
                op = value.args[0]
            symbol = getattr(op, "global_symbol", None) or getattr(op, "name_hint", None)
            found.append(str(symbol or op.name))
    return found


def _logits(artefact: Path) -> list[Any]:
    """Return logits after a prompt, after tokens on their own, and of a scored text."""
    with runtime.load(artefact) as model, closing(model.session()) as session:
        number = session.add()
        found = [np.array(session.prefill(number, TOKENS[:30]))]
        # A page of the cache is filled on the way: the same graph serves the next one.
        found += [np.array(session.decode([number], [int(t)])[0]) for t in TOKENS[30:35]]
        found.append(np.array(session.prefill(number, TOKENS[35:42])))
        other = session.add()
        session.prefill(other, TOKENS[:5])
        found += [np.array(session.decode([number, other], [7, 8])) for _ in range(2)]
        found.append(np.array(session.decode([number], [9])))
        answers = model.generate_batch([list(TOKENS[:9]), list(TOKENS[9:20])], max_tokens=4)
        found += [np.array(answer.token_ids) for answer in answers]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["float16", "int16"])
def test_the_emulated_model_agrees_with_the_cpu(
    checkpoint: Path, tmp_path: Path, activations: str
) -> None:
    options: dict[str, Any] = {"prefill_chunk": 16, "max_batch": 2, "context_length": 64}
    gqsa_compile(str(checkpoint), tmp_path / "cpu", activations="float32", **options)
    want = _logits(tmp_path / "cpu")
    with emulated_gpu() as graphs:
        options["activations"] = activations
        gqsa_compile(str(checkpoint), tmp_path / "gpu", target="cuda:sm_90", **options)
        got = _logits(tmp_path / "gpu")
    # One for a sequence, one for two, in the session and in the model's own; the rest is played.
    assert (graphs.captured, graphs.played) == (3, 8)
    report = json.loads((tmp_path / "gpu" / "report.json").read_text())
    assert set(report["kernel_counts"]) == {"cuda.bsr_int4", "cuda.bsr_int8"}
    for mine, theirs in zip(got, want, strict=True):
        assert np.abs(mine - theirs).max() < 0.01 * np.abs(theirs).max()
