"""AddLowRank: adapters' paths beside the layers, in copies of the functions or in themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gqsa_compiler._tvm import relax, tirx, tvm
from gqsa_compiler.artefact import packed_tensors
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes import records as records_
from gqsa_compiler.passes.bind import BindRecords
from gqsa_compiler.passes.low_rank import PREFIX, AddLowRank, LowRankOptions
from gqsa_compiler.passes.pipeline import PipelineOptions, run
from gqsa_compiler.passes.plan import PackPlan
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.targets import parse_target
from tests.passes.helpers import apply, linears, weight_names
from tests.passes.test_graph import MLP_RECORDS, Mlp, Qkv, graph_phase, qkv_records
from tests.passes.test_select_kernels import MIXED_RECORDS, Weights

HOST = parse_target("cpu")


def rewritten(
    mod: tvm.IRModule,
    given: list[ParamRecord],
    options: LowRankOptions,
    target: str = "cpu",
) -> tuple[tvm.IRModule, PackPlan]:
    """Run the graph phase and the pass over a module whose function is called `forward`."""
    forward = tvm.IRModule({"forward": mod["main"].with_attr("global_symbol", "forward")})
    plan = PackPlan()
    added = AddLowRank(parse_target(target), options, plan)
    return apply(forward, BindRecords(given), *graph_phase(), added), plan


@pytest.mark.parametrize("target", ["cpu", "x86-64-v3", "aarch64", "cuda:sm_80"])
def test_folds_stay_and_get_one_path(target: str) -> None:
    options = LowRankOptions({"q": 4, "v": 6})
    mod, plan = rewritten(Qkv, qkv_records(), options, target)
    (site,) = plan.sites
    assert (site.layers, site.changed, site.rank) == (("q", "k", "v"), ("q", "v"), 6)
    assert [r.shape for r in site.records] == [(12, 64), (6, 128)]
    base, inputs = linears(mod, PREFIX + "forward")
    assert list(weight_names(base)) == ["q", "k", "v"]
    assert (inputs.spec.n, inputs.spec.k, inputs.spec.weight_dtype) == (12, 64, "float16")
    (alone,) = linears(mod, "forward")
    assert alone.spec == base.spec
    assert records_.read(mod)[-2:] == site.records
    assert len([f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]) == 1


def test_what_has_to_wait_moves_out_of_the_layers() -> None:
    mod, plan = rewritten(Mlp, MLP_RECORDS, LowRankOptions({"up": 4, "down": 2}))
    assert [site.layers for site in plan.sites] == [("gate", "up"), ("down",)]
    for name in ("forward", PREFIX + "forward"):
        both, down = (c for c in linears(mod, name) if c.spec.weight == "bsr")
        assert (both.spec.n, both.spec.epilogue.gated, both.spec.epilogue.activation) == (
            256,
            False,
            None,
        )
        assert down.spec.epilogue.residual
    a, _ = (c for c in linears(mod, PREFIX + "forward") if c.spec.weight == "dense")
    assert a.norm is not None
    assert a.spec.norm_eps == pytest.approx(1e-5)


def test_gates_stay_where_no_adapter_is() -> None:
    mod, _ = rewritten(Mlp, MLP_RECORDS, LowRankOptions({"down": 2}))
    for name in ("forward", PREFIX + "forward"):
        assert linears(mod, name)[0].spec.epilogue.gated


def test_a_merged_adapter_needs_no_copies() -> None:
    mod, _ = rewritten(Mlp, MLP_RECORDS, LowRankOptions({"down": 2}, merged=True))
    names = {str(g.name_hint) for g, f in mod.functions_items() if isinstance(f, relax.Function)}
    assert names == {"forward"}
    assert len(linears(mod, "forward")) == 3


def test_a_layer_that_is_none_is_named() -> None:
    with pytest.raises(CompileError, match="An adapter changes norm, which the compiled model"):
        rewritten(Mlp, MLP_RECORDS, LowRankOptions({"norm": 2}))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(MLP_RECORDS, id="folded"),
        pytest.param(MIXED_RECORDS, id="apart", marks=pytest.mark.slow),
    ],
)
def test_the_whole_pipeline_adds_the_products(given: list[ParamRecord]) -> None:
    """Of a model with the adapter in it, whose gate and up are one op, or two that stand alone."""
    weights = Weights(given, 0.5)
    records = [
        r if r.storage == "dense" else replace(r, nnz=weights.layers[r.name].nnz) for r in given
    ]
    low_rank = LowRankOptions({"gate": 3, "down": 5}, "float32", merged=True)
    options = PipelineOptions(HOST, None, {"n": 16}, low_rank=low_rank)
    mod, plan = run(Mlp, records, options)
    rng = np.random.default_rng(2)
    w: dict[str, Any] = {n: weights.decoded(n) for n in ("norm", "gate", "up", "down")}
    for site in plan.sites:
        a, b = (rng.standard_normal(r.shape).astype(np.float32) / 8 for r in site.records)
        column = 0
        for layer, features in zip(site.layers, site.features, strict=True):
            here = slice(column, column + features)
            if layer in site.changed:
                w[layer] = w[layer] + b[:, here].T @ a
            column += features
        weights.arrays |= {r.name: m for r, m in zip(site.records, (a, b), strict=True)}
    target = tvm.target.Target(HOST.tvm_dict())
    vm = relax.VirtualMachine(relax.build(mod, target, relax_pipeline=None), tvm.cpu())
    packed = [
        tvm.runtime.tensor(array)
        for _, array in packed_tensors(plan, weights, lambda _s, _d, _t: None)
    ]
    for tokens in (1, 9):
        x = rng.standard_normal((tokens, 64)).astype(np.float32)
        out = vm["main"](tvm.runtime.tensor(x), packed).numpy()
        h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w["norm"]
        gate = h @ w["gate"].T
        expected = (gate / (1 + np.exp(-gate)) * (h @ w["up"].T)) @ w["down"].T + x
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    alone = plan.without_adapters()
    assert len(plan.tensors) - len(alone.tensors) == 2 * len(plan.sites)
    assert [k.name for k in alone.kernels] == [k.name for k in plan.kernels if "lora" not in k.name]
