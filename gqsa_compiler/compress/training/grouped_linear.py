"""A linear layer that trains through its quantiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.gemm import linear
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.quantizer import MIN_SCALE, max_code, stored_scale


class GroupedLinear(nn.Module):
    """A linear layer whose weight is decoded from codes, scales and zero points in every pass.

    The decoded weight is what the checkpoint will say, bit for bit: every scale is rounded to
    float16 and every zero point to an integer before it is used.

    Parameters
    ----------
    weight : GroupedWeight
        Where training starts.
    bias : float32 [N] or None
        Not trained.
    latent : float32 [N, K], optional
        Weights that are trained, and quantised in every pass. Taken over, not copied: training
        changes them. Without them the codes are frozen.
    dtype : torch.dtype
        What products are computed in.
    """

    codes: Tensor | None
    keep: Tensor  # replaced when a mask is chosen anew, never written to: it is the caller's
    elements: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: GroupedWeight,
        bias: Tensor | None,
        *,
        latent: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.grid_shape = weight.codes.shape
        self.bits = weight.bits
        self.max_code = max_code(weight.bits)
        self.dtype = dtype
        # What dropped groups have there means nothing, and times 0 it might not be 0.
        self.scale = nn.Parameter(weight.scales.where(weight.keep, MIN_SCALE))
        self.zero = nn.Parameter(weight.zeros.where(weight.keep, 0.0))
        self.latent = None if latent is None else nn.Parameter(latent.detach())
        self.register_buffer("codes", weight.codes.byte() if latent is None else None)
        self.register_buffer("keep", weight.keep)
        self.register_buffer("elements", weight.elements)
        self.register_buffer("bias", bias)
        self.exploring = False
        self._power: Tensor | None = None
        self._tokens = 0

    def explore(self, on: bool) -> None:
        """Let latent weights of dropped groups have gradients, and watch the inputs' sizes."""
        self.exploring = on

    def input_power(self) -> Tensor:
        """Return the mean square of each input that was seen while exploring, float32 [K]."""
        assert self._power is not None, "nothing was seen"
        return self._power / self._tokens

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply with the decoded weight; [..., K] to [..., N] in the layer's dtype."""
        if self.exploring:
            rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            power = rows.square().sum(0)
            self._power = power if self._power is None else self._power + power
            self._tokens += len(rows)
        result: Tensor = _Product.apply(inputs, self.latent, self.scale, self.zero, self)
        return result if self.bias is None else result + self.bias.to(self.dtype)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return scales and zero points as they are stored, float32 [N, K/G, 1]."""
        zero = self.zero.detach().round().clamp_(0, self.max_code)
        return stored_scale(self.scale.detach()).unsqueeze(-1), zero.unsqueeze(-1)

    def units(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return code minus zero point, 0 where the weight is dropped; float32 [N, K/G, G]."""
        if self.codes is not None:
            units = self.codes - zero
        else:
            assert self.latent is not None
            units = (self.latent.detach().view(self.grid_shape) / scale).round_()
            units = torch.maximum(torch.minimum(units, self.max_code - zero, out=units), -zero)
        return self.drop(units)

    @torch.no_grad()
    def decoded(self) -> Tensor:
        """Return the weight that the layer computes with now, [N, K] in its dtype."""
        stored, rounded = self.grid()
        return self.units(stored, rounded).mul_(stored).flatten(1).to(self.dtype)

    @torch.no_grad()
    def pass_back(self, slope: Tensor) -> None:
        """Set the gradients of what is trained, for a layer that computes outside of `forward`.

        Parameters
        ----------
        slope : float32 [N, K]
            The gradient with respect to the decoded weight. Changed.
        """
        by_latent, by_scale, by_zero = self.slopes(slope, zero=self.zero.requires_grad)
        for parameter, gradient in (
            (self.latent, by_latent),
            (self.scale, by_scale),
            (self.zero, by_zero),
        ):
            if parameter is not None and parameter.requires_grad:
                parameter.grad = gradient

    def slopes(self, slope: Tensor, *, zero: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the gradients of latent weights, scales and, if asked for, zero points.

        Parameters
        ----------
        slope : float32 [N, K]
            The gradient with respect to the decoded weight. Changed.
        zero : bool
            Whether those of the zero points are wanted.

        Returns
        -------
        by_latent : float32 [N, K] or None
            None where the codes are frozen.
        by_scale : float32 [N, K/G]
        by_zero : float32 [N, K/G] or None
        """
        slope = slope.view(self.grid_shape)
        everywhere = slope.clone() if self.exploring else None
        slope = self.drop(slope)
        scale, middle = self.grid()
        units = self.units(scale, middle)
        if self.latent is None:
            by_scale = units.mul_(slope).sum(-1)
            by_zero = slope.sum(-1).mul_(-scale.squeeze(-1)) if zero else None
            return None, by_scale, by_zero
        ratio = self.latent.detach().view(self.grid_shape) / scale
        low, high = -middle - 0.5, self.max_code - middle + 0.5
        inside = (ratio >= low).logical_and_(ratio <= high)
        by_scale = units.sub_(ratio.mul_(inside)).mul_(slope).sum(-1)
        by_latent = slope * inside
        if everywhere is not None:
            by_latent += everywhere.mul_(~self.keep.unsqueeze(-1))
        by_zero = None
        if zero:
            by_zero = slope.mul_(~inside).sum(-1).mul_(-scale.squeeze(-1))
        return by_latent.flatten(1), by_scale, by_zero

    def drop(self, values: Tensor) -> Tensor:
        """Set what belongs to dropped weights to 0, in place; float32 [N, K/G, G]."""
        values.mul_(self.keep.unsqueeze(-1))
        return values if self.elements is None else values.mul_(self.elements.view_as(values))

    @torch.no_grad()
    def result(self) -> GroupedWeight:
        """Return the trained weight as it is stored, dropped weights as code = zero point."""
        scale, zero = self.grid()
        codes = (self.units(scale, zero) + zero).clamp_(0, self.max_code)
        return GroupedWeight(
            self.keep, codes, scale.squeeze(-1), zero.squeeze(-1), self.bits, self.elements
        )


class _Product(torch.autograd.Function):
    """``inputs @ decoded.T``; rounding passes gradients on as if it were not there.

    For a decoded weight w = (q - z) s with q = clip(round(latent / s) + z, 0, max):

    - inside the range, dw/dlatent = 1, dw/ds = q - z - latent / s and dw/dz = 0;
    - where q is clipped or frozen, dw/dlatent = 0, dw/ds = q - z and dw/dz = -s.

    (The straight-through estimator of LSQ and EfficientQAT.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        latent: Tensor | None,
        scale: Tensor,
        zero: Tensor,
        layer: GroupedLinear,
    ) -> Tensor:
        weight = layer.decoded()
        x = inputs.to(layer.dtype)
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        ctx.inputs_dtype = inputs.dtype
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer: GroupedLinear = ctx.layer
        gradient = gradients[0].to(layer.dtype)
        back = None
        if ctx.needs_input_grad[0]:
            back = _times(gradient, weight).to(ctx.inputs_dtype)
        if not any(ctx.needs_input_grad[1:]):
            return back, None, None, None, None
        rows = gradient.reshape(-1, gradient.shape[-1])
        columns = x.reshape(-1, x.shape[-1])
        slope = _times(rows.T, columns).float()
        return back, *layer.slopes(slope, zero=ctx.needs_input_grad[3]), None


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right.T``, by whatever is quickest; [..., K] and [N, K] to [..., N]."""
    return linear(left, right) if _is_single(left) else left @ right.T


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, by whatever is quickest; [..., N] and [N, K] to [..., K]."""
    return linear(left.contiguous(), right.T.contiguous()) if _is_single(left) else left @ right


def _is_single(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"
