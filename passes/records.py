"""What the compiler knows of each weight: how the checkpoint stores it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from gqsa_compiler._tvm import tvm

ATTR = "gqsa.records"
"""Module attribute that holds the records, as JSON, in the order of the functions' parameters."""


@dataclass(frozen=True)
class ParamRecord:
    """One model parameter as the checkpoint stores it.

    Parameters
    ----------
    name : str
        Tensor name in the model, e.g. ``model.layers.0.mlp.up_proj.weight``.
    storage : str
        ``bsr`` (a compressed linear layer) or ``dense``.
    dtype : str
        Storage dtype of a dense tensor; ``int2``, ``int3``, ``int4`` or ``int8`` (the bits of
        a code) for a compressed one.
    shape : tuple of int
        Of the decoded tensor.
    group_size, nnz : int
        G and kept groups; 0 for dense.
    symmetric : bool
        No stored zero points.
    linear_bits, linear_group : int
        Of a dense tensor: where a linear layer reads it, it is rounded to such codes in groups of
        so many columns when it is packed; 0: it stays as it is.
    """

    name: str
    storage: Literal["bsr", "dense"]
    dtype: str
    shape: tuple[int, ...]
    group_size: int = 0
    nnz: int = 0
    symmetric: bool = False
    linear_bits: int = 0
    linear_group: int = 0

    @property
    def layer(self) -> str:
        """The module that owns the parameter: the name without ``.weight``."""
        return self.name.removesuffix(".weight")


def attach(mod: tvm.IRModule, records: Sequence[ParamRecord]) -> tvm.IRModule:
    """Return `mod` with the records as an attribute."""
    return mod.with_attr(ATTR, json.dumps([asdict(record) for record in records]))


def read(mod: tvm.IRModule) -> tuple[ParamRecord, ...]:
    """Read the records of `mod`, in parameter order; empty when none are attached."""
    text = mod.attrs.get(ATTR) if mod.attrs else None
    if text is None:
        return ()
    fields = json.loads(str(text))
    return tuple(ParamRecord(**{**f, "shape": tuple(f["shape"])}) for f in fields)
