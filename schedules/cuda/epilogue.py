"""What happens to a finished output on a GPU: bias, activation, gating, residual, the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.spec import Activation, LinearSpec


def _sigmoid_times(x: Expr, t: Expr) -> Expr:
    """``x * sigmoid(t)``; an exponential that is infinite gives 0."""
    one, zero = const(1.0, "float32"), const(0.0, "float32")
    return B.bind(x / (one + T.exp(zero - t)))


def activate(name: Activation, x: Expr) -> Expr:
    """Emit an activation that `Epilogue.activation` names, of a float32."""
    x = B.bind(x)
    functions: dict[Activation, Callable[[], Expr]] = {
        "silu": lambda: _sigmoid_times(x, x),
        "gelu": lambda: (
            x
            * const(0.5, "float32")
            * (const(1.0, "float32") + T.erf(x * const(0.7071067811865476, "float32")))
        ),
        "gelu_tanh": lambda: _sigmoid_times(
            x,
            (x + const(0.044715, "float32") * x * x * x) * const(2 * 0.7978845608028654, "float32"),
        ),
        "relu": lambda: B.max(x, const(0.0, "float32")),
    }
    return B.bind(functions[name]())


@dataclass(frozen=True)
class Outputs:
    """The buffers an epilogue works on."""

    spec: LinearSpec
    args: Arguments

    def finish(self, sums: Buffer, output: Expr, token: Expr) -> None:
        """Emit the epilogue of one output of one token and store the result, if there is one.

        Parameters
        ----------
        sums : Buffer
            Registers: the dot product, and when gated that of the up row behind it.
        output : Expr
            int32.
        token : Expr
            int64; nothing is stored beyond the last one.
        """
        epilogue = self.spec.epilogue
        with B.If(token < self.args.tokens), B.Then():
            value = self._biased(sums, 0, output)
            if epilogue.activation is not None:
                value = activate(epilogue.activation, value)
            if epilogue.gated:
                value = value * self._biased(sums, 1, output + const(self.spec.n // 2, "int32"))
            if self.args.residual is not None:
                value = value + load(self.args.residual, token, output)
            store(self.args.out, value, token, output)

    def _biased(self, sums: Buffer, at: int, row: Expr) -> Expr:
        value = load(sums, at)
        if self.args.bias is not None:
            value = value + load(self.args.bias, row)
        return B.bind(value)
