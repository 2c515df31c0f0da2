"""Where time goes: calls by kernel, and sums that add up."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.errors import ArtefactError
from gqsa_compiler.profile import REST, PhaseProfile, Profile, profile_model, role
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.schema import Parameter
from gqsa_compiler.trace import ATTENTION, Trace
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

PROMPT, GEN, LAYERS = 12, 5, 2


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama with two layers and a tied head, compressed and compiled."""
    folder = tmp_path_factory.mktemp("profile")
    dense = make_tiny("llama", folder / "dense", num_hidden_layers=LAYERS)
    gqsa_compile(str(make_checkpoint(dense, folder / "checkpoint")), folder / "artefact")
    return folder / "artefact"


@pytest.fixture(scope="module")
def profile(artefact: Path) -> Profile:
    ids = np.random.default_rng(0).integers(0, 50, PROMPT).tolist()
    with runtime.load(artefact, threads=1, context_length=64, max_batch=1) as model:
        return profile_model(model, ids, GEN, repeats=2)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_kernel_appears_once(artefact: Path, profile: Profile, phase: str) -> None:
    kernels = Manifest.read(artefact).kernels
    lines = [x for x in getattr(profile, phase).lines if x.kind == "linear"]
    assert {(x.name, x.kernel, x.weight, x.n, x.k) for x in lines} == {
        (role(k.layer), k.kernel, k.weight, k.n, k.k) for k in kernels
    }
    layers = {"q_k_v": LAYERS, "o": LAYERS, "gate_up": LAYERS, "down": LAYERS, "lm_head": 1}
    assert {x.name: (x.calls, x.layers) for x in lines} == {k: (n, n) for k, n in layers.items()}
    for line in lines:
        served = [k for k in kernels if role(k.layer) == line.name]
        assert line.sparsity == pytest.approx(np.mean([k.sparsity for k in served]))
        if phase == "prefill":
            assert (line.bytes, line.bytes_per_second) == (None, None)
        else:
            assert line.bytes == sum(k.bytes for k in served)
            assert line.bytes_per_second == pytest.approx(line.bytes / line.microseconds * 1e6)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_lines_add_up(profile: Profile, phase: str) -> None:
    found: PhaseProfile = getattr(profile, phase)
    assert sum(line.microseconds for line in found.lines) == pytest.approx(found.microseconds)
    assert sum(line.share for line in found.lines) == pytest.approx(1)
    kinds = [line.kind for line in found.lines]
    last = ["sampling", "rest"] if phase == "prefill" else ["sampling", "detokenisation", "rest"]
    assert sorted(kinds[-len(last) : -1]) == sorted(last[:-1])
    assert found.lines[-1].name == REST
    times = [line.microseconds for line in found.lines[: -len(last)]]
    assert times == sorted(times, reverse=True)
    (attention,) = (line for line in found.lines if line.kind == "attention")
    assert (attention.name, attention.calls) == (ATTENTION, LAYERS)
    # The embedding's row and the rotations are kernels of their own, the machine's calls are not.
    names = {line.name for line in found.lines if line.kind == "kernel"}
    assert {"take", "rope_qkv"} <= names
    assert not any("builtin" in name for name in names)


def test_profiling_leaves_no_session_behind(artefact: Path) -> None:
    with runtime.load(artefact, threads=1, context_length=32, max_batch=1) as model:
        before = model.generate([5, 6], max_tokens=4, temperature=0, ignore_eos=True)
        profile_model(model, [5, 6], 2, repeats=1)
        after = model.generate([5, 6], max_tokens=4, temperature=0, ignore_eos=True)
        assert before.token_ids == after.token_ids
        assert model._session._workers._users == 1


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("model.layers.0.self_attn.{q_proj+k_proj+v_proj}", "q_k_v"),
        ("model.layers.11.mlp.{gate_proj+up_proj}", "gate_up"),
        ("model.decoder.layers.1.fc1", "fc1"),
        ("a.x_proj+b.y_proj", "x_y"),
        ("model.embed_tokens", "lm_head"),
        ("lm_head", "lm_head"),
    ],
)
def test_roles(layer: str, name: str) -> None:
    assert role(layer) == name


@dataclass(frozen=True)
class Data:
    """A tensor, to a trace."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def call(trace: Trace, name: str, *arguments: object, seconds: float = 0.0) -> None:
    trace(None, name, True, None, *arguments)
    time.sleep(seconds)
    trace(None, name, False, None, *arguments)


@pytest.fixture
def traced(artefact: Path) -> tuple[Trace, dict[str, int]]:
    """Return a trace, and the addresses that its parameters are said to have."""
    manifest = Manifest.read(artefact)
    addresses = {p.name: 64 * i for i, p in enumerate(manifest.parameters)}
    # Empty ones begin where the next one does.
    empty = Parameter("model.embed_tokens.none", "uint8", (0,), "")
    addresses[empty.name] = addresses["model.layers.0.mlp.down_proj.records"]
    manifest = replace(manifest, parameters=(*manifest.parameters, empty))
    return Trace(manifest, addresses), addresses


def test_calls_are_told_by_their_weights(
    artefact: Path, traced: tuple[Trace, dict[str, int]]
) -> None:
    trace, addresses = traced
    down = Data(addresses["model.layers.0.mlp.down_proj.records"])
    table = Data(addresses["model.embed_tokens.weight"])
    layer = Manifest.read(artefact).kernels
    index, kernel = next((i, k) for i, k in enumerate(layer) if k.layer.endswith("0.mlp.down_proj"))
    name = f"{kernel.kernel}_{kernel.n}x{kernel.k}".replace(".", "_")
    call(trace, name, Data(1), down)
    call(trace, f"{name}_1", Data(1), down)
    call(trace, "take", table, Data(1))
    call(trace, "vm.builtin.reshape", down)
    call(trace, "shape_func", Data(2))
    call(trace, "vm.builtin.attention_kv_cache_get_query_positions", Data(3))
    call(trace, "vm.builtin.attention_kv_cache_attention_with_fused_qkv", 1, 2.0, Data(3))
    _, calls = trace.take()
    assert calls == {index: 2, "take": 1, ATTENTION: 1}


def test_time_of_inner_calls_is_theirs(traced: tuple[Trace, dict[str, int]]) -> None:
    trace, _ = traced
    trace(None, "outer", True, None)
    call(trace, "inner", seconds=0.02)
    trace(None, "outer", False, None)
    times, calls = trace.take()
    assert calls == {"outer": 1, "inner": 1}
    assert times["inner"] >= 20e6
    assert times["outer"] < times["inner"]


def test_nothing_reported(traced: tuple[Trace, dict[str, int]]) -> None:
    trace, _ = traced
    call(trace, "take")
    trace.take()
    with pytest.raises(ArtefactError, match="does not report its calls"):
        trace.take()
