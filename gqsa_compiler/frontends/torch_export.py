"""A PyTorch module as Relax: `torch.export`, then TVM's importer of exported programs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler._tvm import from_exported_program, relax, tvm
from gqsa_compiler.errors import ModelError

op = relax.op
_NEVER = -3.0e38
"""What is added to a score that a mask forbids: finite, so that a row of such is no NaN."""


@dataclass(frozen=True, eq=False)
class TorchGraph:
    """An exported module.

    Parameters
    ----------
    mod : tvm.IRModule
        One function ``main`` with the attribute ``num_input``; buffers are constants in it.
    parameters : dict of str to Tensor
        By their names in the module, in the order of the function's parameters.
    inputs : tuple of str
    bounds : dict of str to (int, int)
        Smallest and largest value of each size that varies, by its name in the function.
    names : dict of str to str
        What `torch.export.Dim` called a size, by its name in the function.
    """

    mod: Any
    parameters: dict[str, Tensor]
    inputs: tuple[str, ...]
    bounds: dict[str, tuple[int, int]]
    names: dict[str, str]


def import_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    dynamic_shapes: Any = None,
    keywords: Mapping[str, Any] | None = None,
    largest: int = 4096,
) -> TorchGraph:
    """Export a module and import it as Relax.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode, float32, on the CPU.
    example_inputs : sequence
        Positional arguments of its `forward`.
    dynamic_shapes
        As `torch.export.export` takes it: which sizes vary.
    keywords : mapping, optional
        Keyword arguments.
    largest : int
        Largest value of a size whose `torch.export.Dim` says none.

    Raises
    ------
    ModelError
        `torch.export` cannot trace the module, or TVM lacks one of its operators.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module, tuple(example_inputs), dict(keywords or {}), dynamic_shapes=dynamic_shapes
            )
            # Only what makes it functional: linear layers, norms and attention stay whole.
            program = program.run_decompositions({})
    except Exception as error:  # torch.export raises of its own kinds, without a common base
        raise ModelError(
            f"torch.export cannot trace {type(module).__name__}: {_first(error)}"
        ) from error
    try:
        mod = from_exported_program(
            program,
            keep_params_as_input=True,
            unwrap_unit_return_tuple=True,
            run_ep_decomposition=False,
            custom_convert_map={
                "linear.default": _linear,
                "scaled_dot_product_attention.default": _attention,
                "slice.Tensor": _slice,
                "embedding.default": _embedding,
                "_unsafe_view.default": lambda node, importer: importer._reshape(node),
            },
        )
    except (tvm.error.InternalError, AssertionError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{type(module).__name__} cannot be imported from torch.export: {_first(error)}"
        ) from error
    mod = relax.transform.DeadCodeElimination()(mod)
    func = mod["main"]
    low = dict(func.attrs.get("tir_var_lower_bound", {}))
    high = dict(func.attrs.get("tir_var_upper_bound", {}))
    bounds = {str(k): (int(v), min(int(high.get(k, largest)), largest)) for k, v in low.items()}
    inputs = [str(var.name) for var in func.params[: int(func.attrs["num_input"])]]
    parameters = {name: tensor.detach() for name, tensor in program.named_parameters()}
    return TorchGraph(mod, parameters, tuple(inputs), bounds, _names(func, dynamic_shapes))


def _names(func: Any, dynamic_shapes: Any) -> dict[str, str]:
    """Find what the caller has called sizes that vary, where shapes are given input by input."""
    given = list(
        dynamic_shapes.values() if isinstance(dynamic_shapes, dict) else dynamic_shapes or ()
    )
    found: dict[str, str] = {}
    for var, shape in zip(func.params, given, strict=False):
        places = shape.items() if isinstance(shape, dict) else enumerate(shape or ())
        for axis, dim in places:
            name = getattr(dim, "__name__", None)
            if isinstance(name, str) and name.isidentifier():
                found[str(var.ty.shape[axis])] = name
    return found


def _first(error: BaseException) -> str:
    """Return the line of an error that says what is wrong: the last, but for torch.export's own."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines and lines[-1].startswith("The error above occurred"):
        lines = lines[:1]
    return lines[-1][:300] if lines else type(error).__name__


def _linear(node: Any, importer: Any) -> Any:
    """``x @ W.T + b``, the way that the passes look for it."""
    x, weight = (importer.env[argument] for argument in node.args[:2])
    emit = importer.block_builder.emit
    result = emit(op.matmul(x, emit(op.permute_dims(weight, [1, 0])), out_dtype="float32"))
    bias = node.args[2] if len(node.args) > 2 else None
    return result if bias is None else emit(op.add(result, importer.env[bias]))


def _embedding(node: Any, importer: Any) -> Any:
    """Rows of a table, by indices of any shape."""
    table, places = (importer.env[argument] for argument in node.args[:2])
    emit = importer.block_builder.emit
    shape = list(places.ty.shape)
    flat = places if len(shape) == 1 else emit(op.reshape(places, (math.prod(shape, start=1),)))
    rows = emit(op.take(table, flat, axis=0))
    if len(shape) == 1:
        return rows
    return emit(op.reshape(rows, relax.ShapeExpr([*shape, table.ty.shape[1]])))


def _slice(node: Any, importer: Any) -> Any:
    """TVM's slice keeps ``min(size, end)`` where export has shown that the end lies inside."""
    arguments = [*node.args, *(None,) * (5 - len(node.args))]
    axis, start, end, step = arguments[1] or 0, arguments[2] or 0, arguments[3], arguments[4] or 1
    inside = "Min" not in str(node.meta["val"].shape[axis])
    if not isinstance(end, torch.fx.Node) or not isinstance(start, int) or start < 0 or step != 1:
        return importer._slice(node)
    if not inside:
        raise ValueError(
            f"{node.name} may reach beyond the end of its tensor; give the size a smaller maximum"
        )
    x = importer.env[node.args[0]]
    bound = importer.env[end]
    return importer.block_builder.emit(
        op.strided_slice(x, [axis], [start], [bound], [1], assume_inbound=True)
    )


def _attention(node: Any, importer: Any) -> Any:
    """Attention as products and a softmax."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = (importer.env[given[name]] for name in names[:3])
    emit = importer.block_builder.emit
    rank = len(query.ty.shape)
    if given.get("enable_gqa"):
        repeats = int(query.ty.shape[-3]) // int(key.ty.shape[-3])
        key, value = (emit(op.repeat(item, repeats, axis=rank - 3)) for item in (key, value))
    scale = given.get("scale") or 1.0 / math.sqrt(int(query.ty.shape[-1]))
    axes = [*range(rank - 2), rank - 1, rank - 2]
    scores = emit(op.matmul(query, emit(op.permute_dims(key, axes)), out_dtype="float32"))
    scores = emit(op.multiply(scores, relax.const(scale, "float32")))
    never = relax.const(_NEVER, "float32")
    if given.get("is_causal"):
        rows, columns = (
            emit(op.arange(*(relax.prim_value(end) for end in (0, size, 1)), "int64"))
            for size in scores.ty.shape[-2:]
        )
        seen = emit(op.less_equal(columns, emit(op.expand_dims(rows, 1))))
        scores = emit(op.where(seen, scores, never))
    mask = given.get("attn_mask")
    if mask is not None:
        bias = importer.env[mask]
        if mask.meta["val"].dtype == torch.bool:
            if str(bias.ty.dtype) != "bool":  # TVM's importer widens some of what is computed
                bias = emit(op.astype(bias, "bool"))
            scores = emit(op.where(bias, scores, never))
        else:
            scores = emit(op.add(scores, bias))
    weights = emit(op.nn.softmax(scores, axis=-1))
    return emit(op.matmul(weights, value, out_dtype="float32"))
