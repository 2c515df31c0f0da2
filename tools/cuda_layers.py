"""Random layers on the machine that measures: weights from a seed, packed, with what is expected.

Needs numpy and `gqsa_compiler`'s packing (`cuda_library.py` copies it).
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.cuda import pack
from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.reference import decode, linear
from gqsa_compiler.schedules.spec import LinearSpec

Array = npt.NDArray[Any]
Kernel = Mapping[str, Any]
"""A kernel's entry of the manifest."""
SCALES = (1e-3, 1e-2)
"""Random scales are log-uniform between these."""
NOT_READ_FOR_ONE = ("slabs", "arrivals", "partials")
"""Packed tensors of which a token's kernel reads nothing, or a few bytes."""


def random_layer(
    n: int, k: int, sparsity: float, group_size: int, seed: int, bits: int = 4
) -> BSRLayer:
    """Make a layer [n, k] that lacks each group with a probability of `sparsity`."""
    rng = np.random.default_rng([seed, n, k, round(sparsity * 1000)])
    keep = rng.random((n, k // group_size), np.float32) >= sparsity
    nnz = int(keep.sum())
    low, high = np.log(SCALES)
    return BSRLayer(
        f"{n}x{k}",
        (n, k),
        group_size,
        np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        np.nonzero(keep)[1].astype(np.uint16),
        rng.integers(0, 256, (nnz, group_size * bits // 8), np.uint8),
        np.exp(rng.uniform(low, high, nnz)).astype(np.float16),
        rng.integers(0, 256, -(-nnz * bits // 8), np.uint8),
        bits,
    )


def packing_key(kernel: Kernel) -> str:
    """Name what a kernel's packed tensors depend on, but for the layer."""
    config, spec = kernel["config"], kernel["spec"]
    gated = "-gated" if spec["epilogue"]["gated"] else ""
    code = f"g{spec['group_size']}{spec['weight_dtype']}"
    return f"{code}b{config['blocks']}s{config['scale_bits']}{gated}"


def expected_key(kernel: Kernel) -> str:
    """Name what a kernel's results depend on, but for the layer and the inputs."""
    text = json.dumps([kernel["spec"], kernel["config"]["scale_bits"]], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def random_operands(spec: LinearSpec, tokens: int, seed: int) -> dict[str, Array]:
    """Make float32 inputs: ``x`` and what the spec's norm and epilogue take."""
    rng = np.random.default_rng([seed, spec.n, spec.k])
    operands = {"x": rng.standard_normal((tokens, spec.k), np.float32)}
    if spec.norm_eps is not None:
        operands["norm"] = rng.uniform(0.5, 1.5, spec.k).astype(np.float32)
    if spec.epilogue.bias:
        operands["bias"] = rng.standard_normal(spec.n, np.float32)
    if spec.epilogue.residual:
        operands["residual"] = rng.standard_normal((tokens, spec.n_out), np.float32)
    return operands


def prepare(
    folder: Path, kernels: Iterable[Kernel], sparsity: float, tokens: int, seed: int
) -> None:
    """Pack a random layer for kernels of one shape, and compute what they have to give.

    Writes ``packed-<packing_key>.npz`` and ``expected-<expected_key>.npz`` into `folder`; each file
    is there only when it is whole.

    Parameters
    ----------
    tokens : int
        The most that are measured; fewer are the first ones.
    """
    layer: BSRLayer | None = None
    weights: dict[int, Array] = {}
    for kernel in sorted(kernels, key=packing_key):
        spec = LinearSpec.from_json(json.dumps(kernel["spec"]))
        if layer is None or (layer.group_size, layer.bits) != (spec.group_size, spec.bits):
            layer = random_layer(spec.n, spec.k, sparsity, spec.group_size, seed, spec.bits)
            weights.clear()
        spec, config = replace(spec, nnz=layer.nnz), CudaConfig(**kernel["config"])
        path = folder / f"packed-{packing_key(kernel)}.npz"
        if not path.exists():
            _save(path, pack.pack(spec, config, [layer]))
        path = folder / f"expected-{expected_key(kernel)}.npz"
        if not path.exists():
            if config.scale_bits not in weights:
                weights.clear()  # one dense float64 copy at a time
                scales = pack.stored_scales(config, layer)
                weights[config.scale_bits] = decode(replace(layer, scales=scales))
            operands = random_operands(spec, tokens, seed)
            known = {name: value for name, value in operands.items() if name != "x"}
            value = linear(spec, weights[config.scale_bits], operands["x"], **known)
            _save(path, {**operands, "expected": value})


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.rename(path)


@dataclass(frozen=True)
class Problem:
    """What a kernel is run on.

    Parameters
    ----------
    packed : mapping of str to array
    operands : mapping of str to array
        ``x`` and what the epilogue takes, for the most tokens.
    expected : float64 [tokens, N_out]
    """

    packed: Mapping[str, Array]
    operands: Mapping[str, Array]
    expected: Array

    @classmethod
    def load(cls, folder: Path, kernel: Kernel) -> Problem:
        """Read what `prepare` wrote."""
        with np.load(folder / f"packed-{packing_key(kernel)}.npz") as file:
            packed = {name: file[name] for name in file.files}
        with np.load(folder / f"expected-{expected_key(kernel)}.npz") as file:
            operands = {name: file[name] for name in file.files}
        expected = operands.pop("expected")
        return cls(packed, operands, expected)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return sum(a.nbytes for name, a in self.packed.items() if name not in NOT_READ_FOR_ONE)


def main() -> int:
    """Prepare what standard input says, one JSON object."""
    order = json.load(sys.stdin)
    folder = Path(order["folder"])
    prepare(folder, order["kernels"], order["sparsity"], order["tokens"], order["seed"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
