"""How many groups of a layer are kept, and the bytes they take (no PyTorch: sizes only)."""

from __future__ import annotations

from gqsa_compiler.checkpoint.bits import packed_size
from gqsa_compiler.compress.counts import kept_groups
from gqsa_compiler.compress.recipes.target import LayerTarget

POINTER_BYTES = 4
"""Of an entry of ``indptr``."""

INDEX_BYTES = 2
SCALE_BYTES = 2


def stored_groups(shape: tuple[int, int], target: LayerTarget, balance: str = "matrix") -> int:
    """Count the groups that a layer of `shape` (N, K) keeps.

    Parameters
    ----------
    shape : tuple of int
    target : LayerTarget
        Its group size divides K.
    balance : str
        With ``row`` each row keeps as many; otherwise the matrix as a whole keeps its share.
    """
    n, k = shape
    columns, left = divmod(k, target.group_size)
    if left:
        raise ValueError(f"groups of {target.group_size} do not divide {k}")
    if balance == "row":
        return n * kept_groups(columns, target.sparsity)
    return kept_groups(n * columns, target.sparsity)


def stored_bytes(shape: tuple[int, int], target: LayerTarget, balance: str = "matrix") -> int:
    """Count the bytes of a layer in the checkpoint: exactly the `nbytes` of its `BSRLayer`.

    Codes, scales, zero points, column indices and row pointers, as docs/format.md stores them.

    Parameters
    ----------
    shape, target, balance
        As for `stored_groups`.
    """
    groups = stored_groups(shape, target, balance)
    group = packed_size(target.group_size, target.bits) + SCALE_BYTES + INDEX_BYTES
    return POINTER_BYTES * (shape[0] + 1) + groups * group + packed_size(groups, target.bits)
