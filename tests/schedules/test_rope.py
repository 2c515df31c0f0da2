"""rope_qkv against numpy, against transformers, and inside a Relax module."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler._tvm import Target, nn, relax, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.rope import rope_qkv
from gqsa_compiler.targets import parse_target

Array = npt.NDArray[np.float32]
CONTEXT = 128
EPS = 1e-5
# Hq, Hkv, D, rotary_dim
SIZES = [(9, 3, 64, 64), (2, 1, 24, 12), (4, 2, 80, 32), (1, 1, 256, 256), (2, 2, 16, 10)]


def target() -> Any:
    """Return this machine as TVM's target."""
    return Target(parse_target("cpu").tvm_dict())


@cache
def kernel(size: tuple[int, int, int, int], norm: bool) -> Any:
    """Compile one kernel."""
    function = rope_qkv(*size, qk_norm=norm, eps=EPS).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target())["main"]


def reference(
    size: tuple[int, int, int, int], qkv: Array, positions: Any, table: Array, norms: list[Array]
) -> Array:
    """Return what `rope_qkv` must."""
    queries, keys, dim, rotary = size
    rows = qkv.reshape(len(qkv), -1, dim).astype(np.float64)
    if norms:
        for part, weight in (
            (slice(0, queries), norms[0]),
            (slice(queries, queries + keys), norms[1]),
        ):
            square = (rows[:, part] ** 2).mean(axis=-1, keepdims=True)
            rows[:, part] = rows[:, part] / np.sqrt(square + EPS) * weight
    turned = rows[:, : queries + keys, :rotary]
    cos, sin = np.split(table[positions][:, None], 2, axis=-1)
    first, second = np.split(turned, 2, axis=-1)
    rows[:, : queries + keys, :rotary] = np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rows.reshape(qkv.shape)


def table_of(rotary: int) -> Array:
    """Return cosines and sines [CONTEXT, rotary] for theta 10000."""
    frequency = 10000.0 ** -(np.arange(0, rotary, 2) / rotary)
    angle = np.arange(CONTEXT)[:, None] * frequency
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=8, deadline=None)
@given(
    positions=st.lists(st.integers(0, CONTEXT - 1), min_size=1, max_size=9),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_agrees_with_numpy(
    size: tuple[int, int, int, int], norm: bool, positions: list[int], scale: float
) -> None:
    queries, keys, dim, rotary = size
    rng = np.random.default_rng(len(positions))
    qkv = (rng.standard_normal((len(positions), (queries + 2 * keys) * dim)) * scale).astype(
        np.float32
    )
    norms = [rng.standard_normal(dim).astype(np.float32) for _ in range(2 * norm)]
    where = np.array(positions, np.int32)
    table = table_of(rotary)
    out = tvm.runtime.tensor(np.full_like(qkv, 7.0))
    kernel(size, norm)(*(tvm.runtime.tensor(x) for x in (qkv, where, table, *norms)), out)
    want = reference(size, qkv, where, table, norms)
    np.testing.assert_allclose(out.numpy(), want, atol=2e-6 * np.abs(want).max())


def test_agrees_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    size = (9, 3, 64, 64)
    rng = np.random.default_rng(1)
    qkv = rng.standard_normal((6, 15 * 64)).astype(np.float32)
    positions = np.array([0, 1, 2, 50, 51, 127], np.int32)
    table = table_of(64)
    cos, sin = (torch.from_numpy(np.tile(x[positions], 2))[None] for x in np.split(table, 2, -1))
    rows = torch.from_numpy(qkv).reshape(1, 6, 15, 64).transpose(1, 2)
    q, k = llama.apply_rotary_pos_emb(rows[:, :9], rows[:, 9:12], cos, sin)
    want = torch.cat([q, k, rows[:, 12:]], dim=1).transpose(1, 2).reshape(6, -1).numpy()
    out = tvm.runtime.tensor(np.zeros_like(qkv))
    kernel(size, False)(*(tvm.runtime.tensor(x) for x in (qkv, positions, table)), out)
    np.testing.assert_allclose(out.numpy(), want, atol=2e-6)


def test_inside_a_relax_module() -> None:
    # Symbolic token count, other operators around it to be fused, and no pass schedules it anew.
    class Model(nn.Module):
        def run(self, qkv: nn.Tensor, positions: nn.Tensor, table: nn.Tensor) -> nn.Tensor:
            qkv = nn.op.multiply(qkv, qkv)
            function = rope_qkv(4, 2, 16, 16)
            out = nn.Tensor.placeholder(qkv.shape, "float32")
            qkv = nn.op.tensor_ir_op(function, "rope_qkv", [qkv, positions, table], out)
            return nn.op.silu(nn.op.add(qkv, qkv))

    mod, _ = Model().export_tvm(
        {
            "run": {
                "qkv": nn.spec.Tensor(["n", 8 * 16], "float32"),
                "positions": nn.spec.Tensor(["n"], "int32"),
                "table": nn.spec.Tensor([CONTEXT, 16], "float32"),
                "$": {"param_mode": "none", "effect_mode": "none"},
            }
        }
    )
    vm = relax.VirtualMachine(tvm.compile(mod, target()), tvm.cpu())
    for n in (1, 11):
        qkv = np.random.default_rng(n).standard_normal((n, 8 * 16)).astype(np.float32)
        positions, table = np.arange(n, dtype=np.int32) * 7, table_of(16)
        out = vm["run"](*(tvm.runtime.tensor(x) for x in (qkv, positions, table))).numpy()
        want = 2 * reference((4, 2, 16, 16), qkv * qkv, positions, table, [])
        np.testing.assert_allclose(out, want / (1 + np.exp(-want)), atol=1e-5)


@pytest.mark.parametrize("rotary", [0, 15, 18])
def test_a_wrong_rotary_dim_is_refused(rotary: int) -> None:
    with pytest.raises(CompileError, match=f"cannot rotate {rotary} of a head's 16 features"):
        rope_qkv(4, 2, 16, rotary)
