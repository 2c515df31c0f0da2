"""The graph phase changes no result: modules before and after it, run on the same numbers.

After it, the linear ops are run by the numpy reference, so that no kernel takes part.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gqsa_compiler._tvm import relax, tvm, tvm_ffi
from gqsa_compiler.passes.bind import BindRecords
from gqsa_compiler.passes.linear_op import NAME
from gqsa_compiler.schedules import reference
from gqsa_compiler.schedules.spec import LinearSpec
from tests.passes.helpers import apply
from tests.passes.test_graph import MLP_RECORDS, Mlp, Qkv, graph_phase, qkv_records


def _linear(text: str, x: object, weights: object, *operands: object) -> object:
    """Run one `gqsa.linear` call."""
    spec = LinearSpec.from_json(str(text))
    rest = list(operands)
    weight = np.concatenate([w.numpy() for w in weights])  # type: ignore[attr-defined]
    norm = rest.pop(0).numpy() if spec.norm_eps is not None else None  # type: ignore[attr-defined]
    bias = (
        np.concatenate([b.numpy() for b in rest.pop(0)])  # type: ignore[attr-defined]
        if spec.epilogue.bias
        else None
    )
    residual = rest.pop(0).numpy() if spec.epilogue.residual else None  # type: ignore[attr-defined]
    out = reference.linear(
        spec,
        weight,
        x.numpy(),  # type: ignore[attr-defined]
        norm=norm,
        bias=bias,
        residual=residual,
    )
    return tvm.runtime.tensor(out.astype(np.float32))


@pytest.fixture
def _reference_linear() -> Iterator[None]:
    tvm_ffi.register_global_func(NAME, _linear, override=True)
    yield
    tvm_ffi.registry.remove_global_func(NAME)


def _run(mod: tvm.IRModule, arrays: list[np.ndarray]) -> np.ndarray:
    executable = relax.build(mod, tvm.target.Target("llvm"))
    vm = relax.VirtualMachine(executable, tvm.cpu())
    return np.asarray(vm["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy())


@pytest.mark.usefixtures("_reference_linear")
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("mod", "records"), [(Mlp, MLP_RECORDS), (Qkv, qkv_records())], ids=["mlp", "qkv"]
)
def test_the_graph_phase_keeps_the_numbers(mod: tvm.IRModule, records: list, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    arrays = [x, *(rng.standard_normal(r.shape).astype(np.float32) for r in records)]
    after = apply(mod, BindRecords(records), *graph_phase())
    np.testing.assert_allclose(_run(after, arrays), _run(mod, arrays), rtol=2e-4, atol=2e-4)
