"""Layers packed and decoded by the quantisers' own packages, where they are installed.

They are no dependency: ``pip install --no-deps gptqmodel compressed-tensors`` and what they import.
The sparse formats are in compressed-tensors up to 0.14.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.frontends.quantised.awq import AWQFormat
from gqsa_compiler.frontends.quantised.bitmask import BitmaskTensors
from gqsa_compiler.frontends.quantised.compressed_tensors import PackedFormat
from gqsa_compiler.frontends.quantised.gptq import GPTQFormat, GPTQSettings
from gqsa_compiler.frontends.quantised.layer_format import LayerFormat
from gqsa_compiler.frontends.quantised.marlin24 import Marlin24Format
from gqsa_compiler.frontends.torch_model import to_numpy
from tests.frontends.quantised.packers import (
    Matrix,
    MemoryTensors,
    make_two_four,
    pack_awq,
    random_matrix,
)

pytestmark = pytest.mark.slow


def tensors(state: dict[str, Any]) -> MemoryTensors:
    """Show a module's tensors as those of a layer p."""
    return MemoryTensors(
        {f"p.{name}": to_numpy(value.contiguous()) for name, value in state.items()}
    )


def decoded(found: LayerFormat) -> npt.NDArray[np.float32]:
    return to_dense(found.matrix("p").layer("p", "model"))


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def gptq_layer(m: Matrix) -> Any:
    """Pack a matrix with GPTQModel."""
    module = pytest.importorskip(
        "gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed"
    )
    n, k = m.codes.shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = to_torch(m.dense.astype(np.float32))
    layer = module.TorchLinear(
        bits=m.bits, group_size=32, sym=False, desc_act=False, in_features=k, out_features=n
    )
    scales, zeros = to_torch(m.scales.astype(np.float32)), to_torch(m.zeros.astype(np.float32))
    layer.pack_original(linear, scales, zeros, to_torch(m.columns.astype(np.int32)))
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptqmodel(bits: int, version: int) -> None:
    m = random_matrix(64, 128, bits=bits)  # zero points of 0, too: version 1 borrows
    layer = gptq_layer(m)
    want = layer.dequantize_weight().float().numpy().T
    np.testing.assert_array_equal(want.astype(np.float16), m.dense.astype(np.float16))
    if version == 1:
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        said = SimpleNamespace(bits=bits, pack_dtype=torch.int32, planar=False)
        convert_gptq_v2_to_v1_format_module(layer, quantize_config=said)
    names = ("qweight", "qzeros", "scales", "g_idx")
    state = {name: getattr(layer, name) for name in names}
    fields = {
        "bits": bits,
        "group_size": 32,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    found = GPTQFormat(tensors(state), "model", GPTQSettings.read(fields, "model"))
    np.testing.assert_array_equal(decoded(found), m.dense)


def test_awq() -> None:
    packing = pytest.importorskip(
        "gptqmodel.quantization.awq.utils.packing_utils", reason="gptqmodel is not installed"
    )
    m = random_matrix(64, 128)
    qweight, qzeros = packing.pack_awq(
        to_torch(m.codes.T.astype(np.int32)), to_torch(m.zeros.T.astype(np.int32)), 4
    )
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": to_torch(m.scales.T)}
    for name, array in pack_awq(m).items():
        np.testing.assert_array_equal(parts[name].numpy(), array)
    want = packing.dequantize_gemm(qweight, qzeros, parts["scales"], 4, 32).numpy().T
    found = decoded(AWQFormat(tensors(parts), "model", 32))
    np.testing.assert_array_equal(found, m.dense)
    np.testing.assert_array_equal(found.astype(np.float16), want)


def compressor(name: str, **weights: Any) -> tuple[Any, Any]:
    """Return compressed-tensors' compressor of a format, and a scheme."""
    library = pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed"
    )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(type="int", **weights)
    try:
        found = BaseCompressor.get_value_from_registry(name)
    except KeyError:
        pytest.skip(f"compressed-tensors {library.__version__} does not have {name}")
    return found, QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(bits: int, symmetric: bool) -> None:
    found, scheme = compressor(
        "pack-quantized", num_bits=bits, symmetric=symmetric, group_size=32, strategy="group"
    )
    m = random_matrix(64, 128, bits=bits, symmetric=symmetric)
    half = 1 << (bits - 1)
    state = {
        "weight": to_torch(m.dense.astype(np.float32)),
        "weight_scale": to_torch(m.scales.astype(np.float32)),
        "weight_zero_point": to_torch((m.zeros - half).astype(np.int8)),
    }
    if symmetric:
        del state["weight_zero_point"]
    if hasattr(found, "decompress_weight"):  # up to 0.14
        instance = found(config=None)
        packed = instance.compress_weight(
            weight=state["weight"],
            scale=state["weight_scale"],
            zero_point=state.get("weight_zero_point"),
            quantization_args=scheme.weights,
        )
        packed["weight_scale"] = state["weight_scale"]
    else:
        packed = found.compress(state, scheme)
        want = found.decompress(packed, scheme)["weight"]
        np.testing.assert_array_equal(want.numpy(), m.dense)
    layers = PackedFormat(tensors(packed), "model", frozenset({bits}))
    np.testing.assert_array_equal(decoded(layers), m.dense)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "group"), [(128, 128), (512, 128)])
def test_marlin24(bits: int, k: int, group: int) -> None:
    found, scheme = compressor(
        "marlin-24", num_bits=bits, symmetric=True, group_size=group, strategy="group"
    )
    m = make_two_four(random_matrix(128, k, bits=bits, group=group, symmetric=True))
    state = {
        "p.weight": to_torch(m.dense.astype(np.float32)),
        "p.weight_scale": to_torch(m.scales),
        "p.weight_zero_point": torch.zeros(m.zeros.shape, dtype=torch.int8),
    }
    packed = found(config=None).compress(state, {"p": scheme})
    layers = Marlin24Format(
        tensors({name.removeprefix("p."): value for name, value in packed.items()}), "model"
    )
    np.testing.assert_array_equal(decoded(layers), m.dense)


def test_sparse_24_bitmask() -> None:
    sparse = pytest.importorskip(
        "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask",
        reason="compressed-tensors up to 0.14 is not installed",
    )
    dense = make_two_four(random_matrix(64, 128, symmetric=True)).dense.astype(np.float32)
    packed = sparse.Sparse24BitMaskTensor.from_dense(to_torch(dense)).dict(name_prefix="p")
    shown = BitmaskTensors(
        tensors({name.removeprefix("p."): value for name, value in packed.items()}), "model"
    )
    np.testing.assert_array_equal(shown.read("p.weight"), dense)
