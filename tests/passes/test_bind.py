"""BindRecords: storage dtypes and records."""

from __future__ import annotations

import pytest

from gqsa_compiler._tvm import R, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes import records
from gqsa_compiler.passes.bind import BindRecords
from tests.passes.helpers import apply, bsr, dense, ops, values


@tvm.script.ir_module
class Embed:
    @R.function
    def main(
        tokens: R.Tensor(("n",), "int32"),
        table: R.Tensor((100, 64), "float32"),
        head: R.Tensor((32, 64), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            rows = R.take(table, tokens, axis=0)
            weight = R.permute_dims(head)
            out = R.matmul(rows, weight)
            R.output(out)
        return out


def test_a_half_precision_table_is_gathered_before_it_is_converted() -> None:
    mod = apply(
        Embed, BindRecords([dense("table", 100, 64, dtype="float16"), dense("head", 32, 64)])
    )
    assert ops(mod) == ["relax.take", "relax.astype", "relax.permute_dims", "relax.matmul"]
    take = values(mod)[0]
    assert str(take.ty.dtype) == "float16"
    assert str(mod["main"].params[1].ty.dtype) == "float16"


def test_other_uses_of_a_half_precision_parameter_read_a_converted_copy() -> None:
    mod = apply(
        Embed, BindRecords([dense("table", 100, 64), dense("head", 32, 64, dtype="bfloat16")])
    )
    assert ops(mod) == ["relax.take", "relax.astype", "relax.permute_dims", "relax.matmul"]
    assert str(mod["main"].params[2].ty.dtype) == "bfloat16"


def test_the_records_travel_with_the_module() -> None:
    given = [dense("table", 100, 64), bsr("head.weight", 32, 64)]
    assert records.read(apply(Embed, BindRecords(given))) == tuple(given)
    assert records.read(Embed) == ()


def test_a_missing_record_is_an_error_that_names_the_function() -> None:
    with pytest.raises(CompileError, match=r"'main' has 2 parameters, but 1 are known"):
        apply(Embed, BindRecords([dense("table", 100, 64)]))


def test_a_wrong_shape_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(CompileError, match=r"'head' has shape \[64, 32\].*needs \[32, 64\]"):
        apply(Embed, BindRecords([dense("table", 100, 64), dense("head", 64, 32)]))
