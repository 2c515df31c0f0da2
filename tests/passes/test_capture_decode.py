"""A GPU's function for decoding, and what of it is captured."""

from __future__ import annotations

from typing import Any

import pytest

from gqsa_compiler._tvm import R, relax, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes.add_choice import CHOOSE, AddChoice
from gqsa_compiler.passes.add_decode import DECODE, AddDecode
from gqsa_compiler.passes.capture_decode import (
    CACHED_ALLOC,
    CAPTURED,
    POSITIONS,
    RUN_OR_CAPTURE,
    CaptureDecode,
)
from gqsa_compiler.passes.memory import STORAGES, UPPER_BOUND, BoundTokens, workspace_bytes
from tests.passes.helpers import apply, ops, values


@tvm.script.ir_module
class Forward:
    """Two operators around the choice of rows."""

    @R.function
    def forward(
        tokens: R.Tensor(("n",), "int32"),
        rows: R.Tensor(("m",), "int32"),
        kv: R.Any,
        table: R.Tensor((8, 4), "float32"),
    ):
        R.func_attr({"num_input": 3})
        with R.dataflow():
            x = R.take(table, tokens, axis=0, mode="clip")
            y = R.multiply(x, x)
            h = R.take(y, rows, axis=0, mode="clip")
            out = R.add(h, h)
            R.output(out)
        return out


def planned() -> tvm.IRModule:
    """Return the module with a decode function for 5 sequences, its memory planned."""
    transform = relax.transform
    return apply(
        Forward,
        AddDecode(5),
        BoundTokens({"n": 100, "m": 7}),
        transform.LegalizeOps(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
    )


def names(mod: tvm.IRModule, function: str) -> list[str]:
    """Name what a function calls, in order; builtins that take the machine by their own names."""
    found = []
    for value in values(mod, function):
        if not isinstance(value, relax.Call):
            continue
        op: Any = value.op
        if isinstance(op, tvm.ir.Op) and op.name == "relax.call_builtin_with_ctx":
            op = value.args[0]
        found.append(
            str(
                op.global_symbol
                if isinstance(op, relax.ExternFunc)
                else op.name_hint
                if isinstance(op, relax.GlobalVar)
                else op.name
            )
        )
    return found


def test_decode_is_forward_of_all_rows() -> None:
    mod = apply(Forward, AddDecode(5))
    decode = mod[DECODE]
    assert [str(param.name) for param in decode.params] == ["tokens", "kv", "table"]
    assert ops(mod, DECODE) == ["relax.take", "relax.multiply", "relax.add"]
    assert int(decode.attrs["num_input"]) == 2
    assert dict(decode.attrs[UPPER_BOUND]) == {"n": 5}
    assert decode.ret_ty.shape[0].same_as(decode.params[0].ty.shape[0])
    assert ops(mod, "forward").count("relax.take") == 2


def test_decode_keeps_its_own_bound() -> None:
    mod = apply(Forward, AddDecode(5), BoundTokens({"n": 100, "m": 7}))
    assert dict(mod[DECODE].attrs[UPPER_BOUND]) == {"n": 5}
    assert dict(mod["forward"].attrs[UPPER_BOUND]) == {"n": 100, "m": 7}


def test_all_launches_are_captured() -> None:
    before = planned()
    mod = apply(before, CaptureDecode())
    assert names(mod, DECODE) == [POSITIONS, CACHED_ALLOC, RUN_OR_CAPTURE]
    launches = {str(g.name_hint) for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
    captured = [name for name in names(mod, CAPTURED) if name in launches]
    assert captured == [name for name in names(before, DECODE) if name in launches]
    assert len(captured) == 3
    # All memory is given to it, that of its result too, which lies where it lay when it is played.
    assert not any("alloc_storage" in n or "builtin.alloc" in n for n in names(mod, CAPTURED))
    storages = names(mod, STORAGES)
    assert set(storages) == {"relax.memory.alloc_storage"}
    assert len(mod[CAPTURED].params) == 3 + len(storages)
    assert [str(p.name) for p in mod[DECODE].params] == ["tokens", "layout", "kv", "table"]
    for name in ("forward", "decode"):
        assert mod[name].attrs["num_input"] == before[name].attrs["num_input"]


def test_the_graphs_memory_comes_on_top() -> None:
    row = 4 * 4  # bytes
    mod = planned()
    kept, forward = 5 * row, 100 * row
    assert workspace_bytes(mod) >= 2 * forward
    captured = apply(mod, CaptureDecode())
    assert workspace_bytes(captured) == workspace_bytes(mod) + 3 * kept


def test_rows_without_a_bound_are_refused() -> None:
    mod = planned()
    mod[DECODE] = mod[DECODE].with_attr(UPPER_BOUND, {"other": 3})
    with pytest.raises(CompileError, match="decode has a tensor of n rows, which has no bound"):
        CaptureDecode()(mod)


def test_other_functions_are_not_taken_for_forward() -> None:
    with pytest.raises(CompileError, match="forward chooses rows 0 times, not once"):
        AddDecode(2)(apply(Forward, _without_rows()))


def _without_rows() -> tvm.transform.Pass:
    def transform(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        decode = AddDecode(2)(mod)[DECODE]
        tokens, kv, table = decode.params
        rows = relax.Var("rows", relax.TensorType([tirx.Var("m", "int64")], "int32"))
        func = relax.Function([tokens, rows, kv, table], decode.body, decode.ret_ty)
        out = mod.clone()
        out["forward"] = func.with_attr("num_input", 3)
        return out

    return tvm.transform.module_pass(transform, opt_level=0, name="WithoutRows")


def test_tokens_are_chosen_by_one_kernel() -> None:
    mod = apply(Forward, AddDecode(5), AddChoice())
    assert ops(mod, CHOOSE) == ["relax.call_tir"]
    logits, draws = mod[CHOOSE].params
    assert [int(p.ty.shape[1]) for p in (logits, draws)] == [4, 5]
    assert str(mod[CHOOSE].ret_ty.dtype) == "int32"
