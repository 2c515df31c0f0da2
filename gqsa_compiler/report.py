"""What a compilation came to: bytes by kind, kernels, fallbacks and their cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes.plan import (
    BiasTensor,
    Kernel,
    PackedTensor,
    PackPlan,
    RawTensor,
    np_dtype,
    tensor_bytes,
)
from gqsa_compiler.runtime.schema import Kernel as KernelInfo
from gqsa_compiler.runtime.schema import Parameter


@dataclass(frozen=True)
class Fallback:
    """A linear layer that did not become sparse, why, and the bytes a token that it costs."""

    layer: str
    reason: str
    bytes: int
    extra_bytes: int
    by_choice: bool


@dataclass(frozen=True)
class ConfigurationUse:
    """Where a kernel's configuration comes from: `Choice.source` and `Choice.detail`."""

    layer: str
    source: str
    detail: str


@dataclass(frozen=True)
class CompileReport:
    """The result of `gqsa_compiler.compile.compile_model`.

    Parameters
    ----------
    output : str
        The artefact's directory.
    target : str
    bytes_by_kind : dict
        ``compressed``, ``head`` (where it is rounded here), ``dense_linear``, ``tables``
        (embeddings and rotary tables, of which a token reads one row) and ``other`` (norms,
        biases); their sum is the size of the weights in memory. A tied embedding that is not
        rounded counts as ``dense_linear``: the head reads all of it. With adapters also
        ``adapters``, all of them.
    bits_per_weight : float
        Of the compressed layers, packed, over their decoded size N * K; 0 when there are none.
    bytes_per_token : int
        Weight bytes that one decoded token reads; without adapters that can be chosen.
    workspace_bytes : int
    kv_cache_dtype : str
    kv_cache_bytes_per_token : int
    kernels : tuple of KernelInfo
    kernel_counts : dict
        Layers served, by kernel name.
    fallbacks : tuple of Fallback
    seconds : dict
        Wall time by stage.
    configurations : tuple of ConfigurationUse
        In the order of `kernels`; of the first target, where there are several.
    configuration_sources : dict
        Kernels by the source of their configuration.
    """

    output: str
    target: str
    bytes_by_kind: dict[str, int]
    bits_per_weight: float
    bytes_per_token: int
    workspace_bytes: int
    kv_cache_dtype: str
    kv_cache_bytes_per_token: int
    kernels: tuple[KernelInfo, ...]
    kernel_counts: dict[str, int]
    fallbacks: tuple[Fallback, ...]
    seconds: dict[str, float]
    configurations: tuple[ConfigurationUse, ...] = ()
    configuration_sources: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, as `report.json` has them."""
        return asdict(self)

    def write(self, directory: Path) -> None:
        """Write `report.json` into an artefact directory."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        (directory / "report.json").write_text(text + "\n", encoding="utf-8")


def kernel_bytes(plan: PackPlan, kernel: Kernel) -> int:
    """Bytes of weights that one pass of a kernel reads."""
    if kernel.shares_stored_tensor:
        return tensor_bytes(RawTensor(kernel.records[0]))
    return sum(
        tensor_bytes(t) for t in plan.tensors if isinstance(t, PackedTensor) and t.kernel is kernel
    )


def kernel_uses(
    plan: PackPlan, compressed: bool, ignored: Sequence[str]
) -> tuple[tuple[KernelInfo, ...], tuple[Fallback, ...]]:
    """Describe every kernel of a plan and list the layers that stayed dense.

    Parameters
    ----------
    plan : PackPlan
    compressed : bool
        The model is a GQSA checkpoint, so a dense linear layer is worth a line.
    ignored : sequence of str
        Layers that the checkpoint leaves out on purpose.
    """
    uses, dense = [], []
    packed_bytes = packed_weights = 0
    for kernel in plan.kernels:
        spec, size = kernel.spec, kernel_bytes(plan, kernel)
        is_dense = spec.weight == "dense"
        on_purpose = _on_purpose(kernel, ignored)
        total = spec.n * (spec.k // spec.group_size) if spec.group_size else 0
        uses.append(
            KernelInfo(
                kernel.name,
                kernel.rule.name,
                kernel.rule.layout_version,
                asdict(kernel.config),
                spec.n,
                spec.k,
                spec.weight_dtype if is_dense else f"bsr-{spec.weight_dtype}",
                spec.group_size or None,
                1.0 - spec.nnz / total if total else 0.0,
                size,
                compressed and is_dense and not on_purpose,
            )
        )
        if is_dense:
            dense.append((kernel, size, on_purpose))
        elif kernel.compressed:
            packed_bytes += size
            packed_weights += spec.n * spec.k
    if not compressed:
        return tuple(uses), ()
    mean = packed_bytes / packed_weights if packed_weights else 0.0
    fallbacks = tuple(
        Fallback(
            kernel.name,
            "left dense on purpose (`ignore` in the checkpoint)"
            if on_purpose
            else "not compressed in the checkpoint",
            size,
            max(0, round(size - mean * kernel.spec.n * kernel.spec.k)),
            on_purpose,
        )
        for kernel, size, on_purpose in dense
    )
    return tuple(uses), fallbacks


def configuration_uses(plan: PackPlan) -> tuple[ConfigurationUse, ...]:
    """Say where the configuration of every kernel comes from."""
    return tuple(ConfigurationUse(k.name, k.source, k.detail) for k in plan.kernels)


def unwanted_fallbacks(plan: PackPlan, compressed: bool, ignored: Sequence[str]) -> list[str]:
    """List the layers that stay dense though nobody asked for it; none if nothing is compressed."""
    return [
        kernel.name
        for kernel in plan.kernels
        if compressed and kernel.spec.weight == "dense" and not _on_purpose(kernel, ignored)
    ]


def refuse_fallbacks(plan: PackPlan, compressed: bool, ignored: Sequence[str]) -> None:
    """Check that no layer stays dense though nobody asked for it (``--no-fallback``).

    Raises
    ------
    CompileError
        Some do; the first five are named.
    """
    unwanted = unwanted_fallbacks(plan, compressed, ignored)
    if unwanted:
        raise CompileError(
            f"{len(unwanted)} layers stayed dense, and --no-fallback forbids it: "
            f"{', '.join(unwanted[:5])}{' ...' if len(unwanted) > 5 else ''}."
        )


def _on_purpose(kernel: Kernel, ignored: Sequence[str]) -> bool:
    """Whether the checkpoint leaves all layers of a kernel out."""
    return all(_is_ignored(record.layer, ignored) for record in kernel.records)


def _is_ignored(layer: str, ignored: Sequence[str]) -> bool:
    """Whether the checkpoint lists a layer; a head that is tied to the embedding is `lm_head`."""
    return layer in ignored or (layer.endswith("embed_tokens") and "lm_head" in ignored)


def bytes_per_token(plan: PackPlan) -> int:
    """Weight bytes that one decoded token reads: all kernels, norms and biases, a row of tables."""
    total = sum(kernel_bytes(plan, kernel) for kernel in plan.kernels)
    heads = {k.records[0].name for k in plan.kernels if k.shares_stored_tensor}
    for tensor in plan.tensors:
        if isinstance(tensor, PackedTensor) or tensor.name in heads:
            continue
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        total += tensor_bytes(tensor) // rows
    return total


def bytes_by_kind(plan: PackPlan) -> dict[str, int]:
    """Sum the plan's bytes by kind of tensor."""
    heads = {k.records[0].name for k in plan.kernels if k.shares_stored_tensor}
    kinds: Counter[str] = Counter(compressed=0, head=0, dense_linear=0, tables=0, other=0)
    for tensor in plan.tensors:
        if isinstance(tensor, PackedTensor):
            kind = "dense_linear" if tensor.kernel.spec.weight == "dense" else "compressed"
            if kind == "compressed" and not tensor.kernel.compressed:
                kind = "head"
        elif isinstance(tensor, BiasTensor) or len(tensor.shape) < 2:
            kind = "other"
        elif tensor.name in heads:
            kind = "dense_linear"
        else:
            kind = "tables"
        kinds[kind] += tensor_bytes(tensor)
    return dict(kinds)


def adapter_bytes(parameters: Sequence[Parameter], plan: PackPlan) -> int:
    """Sum the bytes of an artefact's parameters that `plan`, its model's alone, does not have."""
    own = {tensor.name for tensor in plan.tensors}
    return sum(
        math.prod(parameter.shape) * np_dtype(parameter.dtype).itemsize
        for parameter in parameters
        if parameter.name not in own
    )


def bits_per_weight(plan: PackPlan) -> float:
    """Packed bits of the compressed layers over their decoded weights."""
    kernels = [k for k in plan.kernels if k.compressed]
    weights = sum(k.spec.n * k.spec.k for k in kernels)
    return 8 * sum(kernel_bytes(plan, k) for k in kernels) / weights if weights else 0.0
