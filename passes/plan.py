"""What the compiled module reads: every parameter tensor, in order, and how it is made."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.schedules.choice import Source
from gqsa_compiler.schedules.low_rank.spec import LowRankDtype
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec


@dataclass(frozen=True)
class RawTensor:
    """A parameter stored as the model has it (embedding, norm weight, RoPE table)."""

    record: ParamRecord

    @property
    def name(self) -> str:
        """Name in the artefact: the model's own."""
        return self.record.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the artefact."""
        return self.record.shape

    @property
    def dtype(self) -> str:
        """Dtype in the artefact."""
        return self.record.dtype


@dataclass(frozen=True)
class BiasTensor:
    """The biases of the layers of one kernel, one after the other, float32 [N]."""

    records: tuple[ParamRecord, ...]

    @property
    def name(self) -> str:
        """Name in the artefact."""
        return folded_name([record.name.removesuffix(".bias") for record in self.records]) + ".bias"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the artefact."""
        return (sum(record.shape[0] for record in self.records),)

    @property
    def dtype(self) -> str:
        """Dtype in the artefact."""
        return "float32"


@dataclass(frozen=True, eq=False)
class Kernel:
    """One linear kernel with its weights: the unit of packing and of the report.

    `source` and `detail` say where its configuration comes from, see `Choice`.
    """

    records: tuple[ParamRecord, ...]
    spec: LinearSpec
    rule: ScheduleRule[Any]
    config: KernelConfig
    source: Source = "default"
    detail: str = ""

    @property
    def name(self) -> str:
        """The layers' names, folded: ``model.layers.0.self_attn.{q_proj+k_proj+v_proj}``."""
        return folded_name([record.layer for record in self.records])

    @property
    def compressed(self) -> bool:
        """Whether its weights are compressed in the checkpoint."""
        return all(record.storage == "bsr" for record in self.records)

    @property
    def layout(self) -> Hashable:
        """What the bytes of its packed tensors depend on besides the weights."""
        return self.name, self.rule.name, self.rule.layout_version, self.rule.packed_by(self.config)

    @property
    def shares_stored_tensor(self) -> bool:
        """Whether the kernel reads the one stored tensor itself, so that no copy is packed."""
        return len(self.records) == 1 and self.rule.reads_stored_layout


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One of the tensors that a kernel's rule packs.

    Its length is None until it is packed, where the rule says that it follows from the weights.
    """

    kernel: Kernel
    part: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def name(self) -> str:
        """Name in the artefact."""
        return f"{self.kernel.name}.{self.part}"


Tensor = RawTensor | BiasTensor | PackedTensor


@dataclass(frozen=True)
class LowRankSite:
    """A linear op with a low-rank path beside it, and the two tensors of it that adapters fill.

    Parameters
    ----------
    layers : tuple of str
        The layers folded into the op.
    features : tuple of int
        The outputs of each.
    changed : tuple of str
        Those that an adapter changes: the path's slots, in order.
    rank : int
        Of every slot: the largest of any adapter.
    k : int
        The op's input features.
    dtype : str
    """

    layers: tuple[str, ...]
    features: tuple[int, ...]
    changed: tuple[str, ...]
    rank: int
    k: int
    dtype: LowRankDtype

    @property
    def name(self) -> str:
        """The layers' names, folded, as a kernel's."""
        return folded_name(list(self.layers))

    @property
    def slots(self) -> int:
        """How many layers are changed."""
        return len(self.changed)

    @property
    def records(self) -> tuple[ParamRecord, ParamRecord]:
        """A of all slots, one below the other [slots * rank, K], and B transposed [rank, N]."""
        shapes = (self.slots * self.rank, self.k), (self.rank, sum(self.features))
        a, b = (
            ParamRecord(f"{self.name}.lora_{which}.weight", "dense", self.dtype, shape)
            for which, shape in zip("AB", shapes, strict=True)
        )
        return a, b


@dataclass
class PackPlan:
    """Filled by the pass `SelectKernels`, read by the artefact's writer.

    Attributes
    ----------
    tensors : list
        In the order of the parameter tuple that every compiled function takes last.
    kernels : list of Kernel
    sites : list of LowRankSite
        Where adapters have their paths.
    """

    tensors: list[Tensor] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    _index: dict[str, int] = field(default_factory=dict)
    sites: list[LowRankSite] = field(default_factory=list)

    @property
    def layout(self) -> Hashable:
        """What the packed parameters depend on besides the weights: tensors, and their bytes."""
        tensors = tuple((tensor.name, tensor.shape, tensor.dtype) for tensor in self.tensors)
        return tensors, tuple(kernel.layout for kernel in self.kernels)

    def add(self, tensor: Tensor) -> int:
        """Return the tensor's place, appending it when its name is new."""
        if tensor.name not in self._index:
            self._index[tensor.name] = len(self.tensors)
            self.tensors.append(tensor)
        return self._index[tensor.name]

    def packed(self, shapes: Mapping[str, tuple[int, ...]]) -> PackPlan:
        """Return the plan with the shapes that tensors have got, by name."""
        tensors = [
            replace(tensor, shape=shapes[tensor.name])
            if isinstance(tensor, PackedTensor)
            else tensor
            for tensor in self.tensors
        ]
        return PackPlan(tensors, self.kernels, self._index, self.sites)

    def without_adapters(self) -> PackPlan:
        """Return the plan of the model alone, without the tensors that adapters fill."""
        if not self.sites:
            return self
        filled = {record.name for site in self.sites for record in site.records}
        tensors = [tensor for tensor in self.tensors if tensor.name not in filled]
        kernels = [k for k in self.kernels if k.records[0].name not in filled]
        return PackPlan(tensors, kernels, {t.name: i for i, t in enumerate(tensors)})


def np_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a TVM dtype name."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of one tensor of a plan that is packed."""
    if None in tensor.shape:
        raise ValueError(f"{tensor.name} is not packed yet.")
    return math.prod(size or 0 for size in tensor.shape) * np_dtype(tensor.dtype).itemsize


def folded_name(layers: list[str]) -> str:
    """Join layer names at their common parent: ``a.b.{x+y}``."""
    if len(layers) == 1:
        return layers[0]
    parents = {layer.rpartition(".")[0] for layer in layers}
    if len(parents) > 1:
        return "+".join(layers)
    leaves = "+".join(layer.rpartition(".")[2] for layer in layers)
    return f"{parents.pop()}.{{{leaves}}}"
