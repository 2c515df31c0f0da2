"""What the GPU benchmarks measure: linear layers of known models, token counts, sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GROUP_SIZE = 16
TOKENS = (1, 2, 4, 8, 16, 64, 512)
SPARSITIES = (0.5, 0.3, 0.0)
"""Shares of groups dropped; what matters most comes first, as time may run out."""
ACTIVATIONS = ("int16", "float16")


@dataclass(frozen=True)
class Shape:
    """A linear layer.

    Parameters
    ----------
    n, k : int
        Output and input features.
    layers : tuple of str
        Which layers of which models have it.
    """

    n: int
    k: int
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called in results."""
        return f"{self.n}x{self.k}"


SHAPES = (
    Shape(4096, 11008, ("llama-2-7b down",)),
    Shape(11008, 4096, ("llama-2-7b gate, up",)),
    Shape(4096, 14336, ("llama-3-8b down",)),
    Shape(14336, 4096, ("llama-3-8b gate, up",)),
    Shape(4096, 4096, ("llama-2-7b o, q, k, v", "llama-3-8b o, q")),
    Shape(22016, 4096, ("llama-2-7b gate+up",)),
    Shape(28672, 4096, ("llama-3-8b gate+up",)),
    Shape(12288, 4096, ("llama-2-7b qkv",)),
    Shape(6144, 4096, ("llama-3-8b qkv",)),
    Shape(3584, 18944, ("qwen2.5-7b down",)),
    Shape(37888, 3584, ("qwen2.5-7b gate+up",)),
    Shape(4608, 3584, ("qwen2.5-7b qkv",)),
    Shape(3584, 3584, ("qwen2.5-7b o",)),
)
"""The first four are those that goals are set for."""
GOAL_SHAPES = tuple(shape.name for shape in SHAPES[:4])
SWEPT = tuple(shape.name for shape in SHAPES[:5])
"""Where all configurations are compared."""

_ALL, _FEW = list(TOKENS), [1, 8]
RIVALS = {
    "cublas-fp16": _ALL,
    "torch-int4-g32": _ALL,
    "torch-int4-g128": _ALL,
    "cusparselt-2:4-fp16": _ALL,
    "gemlite-w4-g16": _FEW,
    "gemlite-w4-g128": _FEW,
    "gemlite-w2-g64": _FEW,
}
"""Other people's kernels (`cuda_rivals.py`) and their token counts: Triton's tune for each."""

MODELS = {
    "llama-2-7b": {
        "shape": {
            "hidden": 4096, "inner": 11008, "layers": 32, "heads": 32, "kv_heads": 32,
            "head_dim": 128, "vocab": 32000,
        },
        "contexts": [128, 512, 1024],
        "linears": ["12288x4096", "4096x4096", "22016x4096", "4096x11008"],
    }
}  # fmt: skip
"""Whole models that `cuda_torch_model.py` times dense, and the linear layers of a block of each."""


def shapes_named(names: Sequence[str]) -> tuple[Shape, ...]:
    """Return the shapes of these names; a name that is not listed is read as N x K.

    Raises
    ------
    ValueError
        A name is no N x K.
    """
    known: Mapping[str, Shape] = {shape.name: shape for shape in SHAPES}
    found = []
    for name in names:
        if name in known:
            found.append(known[name])
            continue
        n, x, k = name.partition("x")
        if not (x and n.isdigit() and k.isdigit()):
            raise ValueError(f"{name!r} is no shape: write N x K as 4096x11008.")
        found.append(Shape(int(n), int(k), ()))
    return tuple(found)
