"""The distinct kernels of a compiled model, and how often a workload calls each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.passes.plan import Kernel, PackPlan
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.tuning.lookup import density_of

QUANTILES = 33
"""Points of a task's distribution of groups over rows."""
_LAYERS_READ = 4


@dataclass(frozen=True)
class Workload:
    """What a model is tuned for: prompts, and tokens generated after each.

    Parameters
    ----------
    prompt : int
        Tokens of a prompt.
    gen : int
        Tokens generated after it; each is a call with one token.
    chunk : int
        Most tokens of one call.
    """

    prompt: int = 128
    gen: int = 128
    chunk: int = 512

    def calls(self) -> dict[int, float]:
        """Return how often a layer is called with so many tokens."""
        calls: dict[int, float] = {}
        if self.gen:
            calls[1] = float(self.gen)
        whole, rest = divmod(self.prompt, self.chunk)
        for tokens, count in ((self.chunk, whole), (rest, 1)):
            if tokens and count:
                calls[tokens] = calls.get(tokens, 0.0) + count
        return calls


@dataclass(frozen=True)
class Task:
    """One kernel function of a model: the layers of one shape.

    Parameters
    ----------
    name : str
        After its layers: ``q+k+v 960x576``.
    rule : ScheduleRule
    spec : LinearSpec
        Of one of the layers; `nnz` is their mean.
    rows : tuple of int
        `QUANTILES` quantiles of the number of groups a row over all layers, ascending; empty for
        dense layers.
    layers : int
        How many there are.
    calls : dict of int to float
        Calls of one layer with so many tokens in the workload.
    """

    name: str
    rule: ScheduleRule[Any]
    spec: LinearSpec
    rows: tuple[int, ...]
    layers: int
    calls: dict[int, float]

    @property
    def code(self) -> LinearSpec:
        """What records know the task by."""
        return self.rule.code_key(self.spec)

    @property
    def density(self) -> float:
        """Share of the groups that are kept, the mean of the layers."""
        return density_of(self.spec)

    def describe(self) -> dict[str, Any]:
        """Return what a session's record says of it."""
        return {
            "name": self.name,
            "rule": self.rule.name,
            "n": self.spec.n,
            "k": self.spec.k,
            "density": self.density,
            "layers": self.layers,
            "spec": self.code.to_json(),
        }


class Layers(Protocol):
    """Where compressed layers come from."""

    def layer(self, name: str) -> BSRLayer:
        """Return a compressed layer by its parameter's name."""


def extract(plan: PackPlan, weights: Layers, workload: Workload) -> tuple[Task, ...]:
    """List the tasks of a compiled model.

    Kernels of one rule whose code is the same (`ScheduleRule.code_key`) are one task.

    Parameters
    ----------
    plan : PackPlan
        Of the compiled model.
    weights : Layers
    workload : Workload

    Returns
    -------
    tuple of Task
        In the order of their first layer.
    """
    groups: dict[tuple[str, LinearSpec], list[Kernel]] = {}
    for kernel in plan.kernels:
        groups.setdefault((kernel.rule.name, kernel.rule.code_key(kernel.spec)), []).append(kernel)
    return tuple(_task(kernels, weights, workload) for kernels in groups.values())


def _task(kernels: Sequence[Kernel], weights: Layers, workload: Workload) -> Task:
    first = kernels[0]
    rows: tuple[int, ...] = ()
    spec = first.spec
    if spec.weight == "bsr":
        # A few layers tell the distribution; all of them would mean to read the whole model.
        counts = np.concatenate([_counts(k, weights) for k in kernels[:_LAYERS_READ]])
        places = np.linspace(0, 1, QUANTILES)
        rows = tuple(int(q) for q in np.quantile(counts, places, method="nearest"))
        spec = replace(spec, nnz=round(sum(k.spec.nnz for k in kernels) / len(kernels)))
    calls = workload.calls()
    if _is_head(first):
        # The head is asked for one row of a prompt, the last.
        calls = {1: workload.gen + 1.0}
    return Task(_name(first), first.rule, spec, rows, len(kernels), calls)


def _counts(kernel: Kernel, weights: Layers) -> npt.NDArray[np.int64]:
    """Return how many groups each row of a kernel's layers has."""
    spec = kernel.spec
    if kernel.compressed:
        layers = [weights.layer(record.name) for record in kernel.records]
        return np.concatenate([np.diff(layer.indptr) for layer in layers]).astype(np.int64)
    return np.full(spec.n, spec.k // spec.group_size, np.int64)  # rounded here, nothing dropped


def _is_head(kernel: Kernel) -> bool:
    return any(record.layer.endswith(("lm_head", "embed_tokens")) for record in kernel.records)


def _name(kernel: Kernel) -> str:
    leaves = [record.layer.rpartition(".")[2].removesuffix("_proj") for record in kernel.records]
    return f"{'+'.join(leaves)} {kernel.spec.n}x{kernel.spec.k}"
