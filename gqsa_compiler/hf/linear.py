"""A linear layer that keeps its weights compressed and decodes them each time it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gqsa_compiler.checkpoint import BSRLayer, LayerScheme, symmetric_zero
from gqsa_compiler.checkpoint.bits import packed_size
from gqsa_compiler.checkpoint.names import MARKER


class GQSALinear(nn.Module):
    """``y = W x (+ bias)`` with W as docs/format.md stores it.

    Buffers have the names, dtypes and shapes of the checkpoint's tensors, so that a state dict
    loads and saves them as they are. W is decoded to float32 and rounded to the input's dtype for
    each call: memory is that of the codes plus one dense matrix at a time.

    Parameters
    ----------
    in_features, out_features : int
        K and N.
    kept : int
        Groups that are stored.
    scheme : LayerScheme
        Bits, group size and symmetry.
    bias : bool
    dtype : torch.dtype, optional
        Of the bias.
    device : torch.device, optional
    measured : bool
        The checkpoint has `input_rms`, which is kept for who saves it again.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        scheme: LayerScheme,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        measured: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = scheme.bits
        self.group_size = scheme.group_size
        width = packed_size(scheme.group_size, scheme.bits)
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "shape": ((2,), torch.int64),
            "indptr": ((out_features + 1,), torch.int32),
            "indices": ((kept,), torch.uint16),
            "qweight": ((kept, width), torch.uint8),
            "scales": ((kept,), torch.float16),
            MARKER: ((0,), torch.uint8),
        }
        if not scheme.symmetric:
            buffers["qzeros"] = ((packed_size(kept, scheme.bits),), torch.uint8)
        if measured:
            buffers["input_rms"] = ((in_features,), torch.float32)
        for name, (size, kind) in buffers.items():
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=device))
        if bias:
            values = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(values, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def nnz(self) -> int:
        """Number of kept groups."""
        return int(self.get_buffer("indices").shape[0])

    def dense(self) -> Tensor:
        """Decode W to float32 [N, K], exactly; absent groups are 0."""
        n, groups = self.out_features, self.in_features // self.group_size
        indptr = self.get_buffer("indptr").long()
        rows = torch.repeat_interleave(
            torch.arange(n, device=indptr.device), indptr.diff(), output_size=self.nnz
        )
        codes = unpack_codes(self.get_buffer("qweight"), self.bits, self.group_size)
        values = codes.float() - self._zeros()
        values *= self.get_buffer("scales").float()[:, None]
        weight = torch.zeros((n, groups, self.group_size), device=values.device)
        weight[rows, self.get_buffer("indices").int().long()] = values
        return weight.reshape(n, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; `x` is [..., K], the result [..., N] in the same dtype."""
        return functional.linear(x, self.dense().to(x.dtype), self.bias)

    def layer(self, name: str) -> BSRLayer:
        """Return the layer as the checkpoint package holds it, e.g. to validate it."""
        arrays = {part: buffer.cpu().numpy() for part, buffer in self.named_buffers(recurse=False)}
        n, k = (int(size) for size in arrays.pop("shape"))
        del arrays[MARKER]
        zeros = arrays.pop("qzeros", None)
        return BSRLayer(
            name=name,
            shape=(n, k),
            group_size=self.group_size,
            qzeros=zeros,
            bits=self.bits,
            **arrays,
        )

    def extra_repr(self) -> str:
        """Show the sizes and the scheme."""
        total = self.out_features * (self.in_features // self.group_size)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, "
            f"sparsity={1 - self.nnz / total:.3f}"
        )

    def _zeros(self) -> Tensor | float:
        packed = self._buffers.get("qzeros")
        if packed is None:
            return float(symmetric_zero(self.bits))
        return unpack_codes(packed, self.bits, self.nnz).float()[:, None]


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack uint8 [..., ceil(count * bits / 8)] to uint8 [..., count]; see `checkpoint.bits`."""
    spare = -packed.shape[-1] % bits
    if spare:
        packed = functional.pad(packed, (0, spare))
    units = packed.unflatten(-1, (-1, bits)).int()
    mask = (1 << bits) - 1
    codes = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = units[..., byte] >> shift
        if shift + bits > 8:
            code = code | units[..., byte + 1] << (8 - shift)
        codes.append((code & mask).to(torch.uint8))
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]
