"""What a kernel must compute: frozen descriptions that rules, passes and reports share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gqsa_compiler.errors import CompileError
from gqsa_compiler.limits import BITS, GROUP_SIZES

WeightKind = Literal["bsr", "dense"]
ActivationDtype = Literal["float32", "float16", "int16", "int8"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATION_BLOCK = 8
"""Consecutive columns of a token that share one float32 scale when activations are int8.

That is what the generic kernels do. Arm's own, for targets with dot products, have one scale a
token, and for a layer that keeps all its groups one a token and group
(`schedules.arm.narrow_inputs`).

Every group size is a multiple. One scale for a whole group of 16 changes SmolLM2-135M's logits by
2.1 to 2.4 %, beyond the accepted 2 %; one for 8 columns by 1.4 to 1.6 %.
"""


@dataclass(frozen=True)
class Epilogue:
    """What happens to a linear layer's output, in this order.

    ``y = W x``; ``+ bias``; then `activation`, or, when `gated`,
    ``activation(y[:N/2]) * y[N/2:]`` (gate rows first, up rows second); ``+ residual``.

    Parameters
    ----------
    bias : bool
        Operand ``bias`` float32 [N].
    activation : str or None
        ``silu``, ``gelu`` (erf), ``gelu_tanh`` or ``relu``.
    gated : bool
        The output has N/2 features. Needs `activation`.
    residual : bool
        Operand ``residual`` float32 [m, N_out], added last.
    """

    bias: bool = False
    activation: Activation | None = None
    gated: bool = False
    residual: bool = False


@dataclass(frozen=True)
class LinearSpec:
    """One (possibly folded) linear layer as a kernel sees it.

    Two things that decide speed are not fields. How the groups are distributed over the rows: the
    packed weights carry a partition into tasks of nearly equal cost (`ScheduleRule.pack`), so the
    code does not depend on it. The number of tokens: one function takes any, and has code for
    several ranges of it among which it branches (`ScheduleRule.build`).

    Parameters
    ----------
    n, k : int
        Rows (output features before gating) and columns (input features).
    weight : str
        ``bsr`` or ``dense``.
    weight_dtype : str
        ``int2``, ``int3``, ``int4`` or ``int8`` (the bits of a code) for BSR; ``float16``,
        ``bfloat16`` or ``float32`` for dense storage.
    group_size : int
        G; 0 for dense.
    nnz : int
        Kept groups; 0 for dense.
    symmetric : bool
        BSR without stored zero points.
    activation_dtype : str
        ``float32``; ``float16``: inputs are rounded to halves after the norm, scaled by a power of
        two a token; ``int16``: quantised per token; ``int8``: per token and block of 8 columns
        (`ACTIVATION_BLOCK`). Dense layers ignore it and use float32.
    norm_eps : float or None
        When set, the input is RMS-normalised first, with operand ``norm`` float32 [K]:
        ``x * rsqrt(mean(x^2) + eps) * norm``.
    epilogue : Epilogue
    """

    n: int
    k: int
    weight: WeightKind
    weight_dtype: str
    group_size: int = 0
    nnz: int = 0
    symmetric: bool = False
    activation_dtype: ActivationDtype = "float32"
    norm_eps: float | None = None
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for dense."""
        return int(self.weight_dtype.removeprefix("int")) if self.weight == "bsr" else 0

    @property
    def n_out(self) -> int:
        """Output features after gating."""
        return self.n // 2 if self.epilogue.gated else self.n

    def check(self) -> None:
        """Refuse a description that no kernel can mean.

        Raises
        ------
        CompileError
            Naming the field.
        """
        size = self.group_size
        if self.n < 1 or self.k < 1:
            raise CompileError(f"A linear layer of {self.n} x {self.k} has nothing to compute.")
        if self.weight == "bsr":
            if self.weight_dtype not in {f"int{bits}" for bits in BITS}:
                raise CompileError(f"There are no sparse layers of {self.weight_dtype} codes.")
            if size not in GROUP_SIZES:
                sizes = ", ".join(map(str, GROUP_SIZES))
                raise CompileError(f"Group size {size} is not one of {sizes}.")
            if self.k % size:
                raise CompileError(f"Group size {size} does not divide {self.k} input features.")
            if not 0 <= self.nnz <= self.n * (self.k // size):
                raise CompileError(
                    f"{self.nnz} groups of {size} do not fit a layer of {self.n} x {self.k}."
                )
        if self.epilogue.gated and (self.n % 2 or self.epilogue.activation is None):
            raise CompileError("A gated layer needs an even number of rows and an activation.")

    def to_json(self) -> str:
        """Serialise to one line of JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LinearSpec:
        """Inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        fields["epilogue"] = Epilogue(**fields["epilogue"])
        return cls(**fields)


@dataclass(frozen=True)
class ParamSpec:
    """One tensor that a kernel reads: `name` (unique in the kernel), shape and dtype.

    A one-dimensional tensor whose length depends on the weights has the shape ``(None,)``.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
