"""Compress a PyTorch module in one shot and write it as a module checkpoint."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.request import PathText
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.hessian import MomentAccumulator
from gqsa_compiler.compress.solver.oneshot import check_not_lost, compress_rows
from gqsa_compiler.compress.store import producer, to_layer
from gqsa_compiler.errors import ModelError, UsageError, first_line
from gqsa_compiler.export.onnx_module import relax_to_onnx
from gqsa_compiler.frontends.torch_export import import_module
from gqsa_compiler.frontends.torch_model import to_numpy
from gqsa_compiler.modules import capture
from gqsa_compiler.modules.result import DenseLayer, ModuleReport
from gqsa_compiler.modules.solve import (
    ON_PURPOSE,
    SHARED,
    bits_per_weight,
    block_diagonal,
    check_ignored,
    layer_report,
    misfit,
    module_recipe,
    nothing_compressed,
)
from gqsa_compiler.modules.write import quantization_of, write_checkpoint
from gqsa_compiler.outdir import check_output
from gqsa_compiler.progress import Progress


def compress_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    recipe: PathText | Recipe,
    output: str | Path,
    *,
    calibration: Sequence[Sequence[Any]] | None = None,
    dynamic_shapes: Any = None,
    ignore: Sequence[str] = (),
    outputs: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ModuleReport:
    """Compress every linear layer of a PyTorch module that the recipe's groups fit.

    Convolutions whose windows do not overlap (1 x 1, and patches), grouped ones too, are linear
    layers here. A layer is compressed on what the compressed layers before it give. Linear layers
    that share a weight stay one: compressed once, on the inputs of all, and stored once.

    Parameters
    ----------
    module : nn.Module
        It is copied, and left as it is.
    example_inputs : sequence
        Positional arguments of its `forward`, which `torch.export` traces it with.
    recipe : str, path or Recipe
        A preset's name, e.g. ``w4s30g16``, or a YAML file; its training stages are left out.
    output : path
        The module checkpoint to make; it appears when it is whole.
    calibration : sequence of sequences, optional
        Positional arguments of other calls, to learn from; the example inputs by default.
    dynamic_shapes : optional
        Which sizes vary, as `torch.export.export` takes it. All are fixed by default.
    ignore : sequence of str
        Layers to leave dense: module paths, or patterns with ``*``.
    outputs : sequence of str
        What the outputs are called.
    overwrite : bool
        Replace an existing checkpoint.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    ModuleReport

    Raises
    ------
    UsageError
        The recipe does not exist or is not for modules, or the output exists.
    ModelError
        The module cannot be traced or imported, or no layer fits.
    """
    began = time.monotonic()
    chosen = module_recipe(recipe)
    check_output(output, overwrite)
    say = progress or (lambda _stage, _done, _total: None)
    example_inputs = _floats(example_inputs, "The example inputs")
    given = [example_inputs] if calibration is None else calibration
    batches = [_floats(batch, "A batch of calibration inputs") for batch in given]
    if not batches:
        raise UsageError("There are no calibration inputs; give at least one batch.")
    work = _Compression(module, batches, chosen, ignore, say)
    layers = work.run()
    say("exporting", 0, 1)
    graph = import_module(work.module, example_inputs, dynamic_shapes)
    weights = work.weight_names(graph.parameters)
    named = graph.names
    model, used = relax_to_onnx(
        graph.mod,
        {name: to_numpy(tensor.cpu()) for name, tensor in graph.parameters.items()},
        weights,
        producer(),
        sizes=named,
        outputs=tuple(outputs),
    )
    in_graph = {layer.name for layer in used}
    for layer in layers:
        if layer.name not in in_graph:
            work.dense[layer.name] = "no output of the module depends on it"
    layers = [layer for layer in layers if layer.name in in_graph]
    dense = sorted(work.dense.items())
    quantization = quantization_of(
        layers, chosen.sparsity, chosen.balance, [n for n, reason in dense if reason == ON_PURPOSE]
    )
    bounds = {named.get(key, key): value for key, value in graph.bounds.items()}
    write_checkpoint(
        output, model, layers, quantization, bounds, name=type(module).__name__, overwrite=overwrite
    )
    say("exporting", 1, 1)
    return ModuleReport(
        module=type(module).__name__,
        recipe=chosen.name,
        output=str(output),
        layers=tuple(layer_report(layer) for layer in layers),
        dense=tuple(DenseLayer(*item) for item in dense),
        shared={name: first for name, first in work.shared.items() if first in in_graph},
        bits_per_weight=bits_per_weight(layers),
        seconds=time.monotonic() - began,
    )


def _floats(inputs: Any, what: str) -> tuple[Any, ...]:
    """Return a call's inputs with its floats as float32, which the module computes in."""
    if not isinstance(inputs, list | tuple):
        raise UsageError(f"{what} should be a tuple of a call's inputs, not {type(inputs)}.")
    return tuple(
        item.float() if isinstance(item, Tensor) and item.is_floating_point() else item
        for item in inputs
    )


class _Compression:
    """The layers of one module, compressed in the order that they run."""

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[tuple[Any, ...]],
        recipe: Recipe,
        ignore: Sequence[str],
        progress: Progress,
    ) -> None:
        self.original = copy.deepcopy(module).cpu().float().eval()
        self.module = copy.deepcopy(self.original)
        self.module.requires_grad_(False)
        self.dense: dict[str, str] = {}
        self._batches = [(batch, dict[str, Any]()) for batch in batches]
        self._recipe, self._progress = recipe, progress
        self._layers = capture.find_layers(self.module)
        check_ignored(ignore, self._layers)
        self._before = capture.find_layers(self.original)
        self._done: dict[str, BSRLayer] = {}
        # Linear layers with one weight are one layer, by the name of the first.
        self._shares: dict[str, tuple[str, ...]] = {}
        for names in capture.by_weight(self._layers):
            reasons = (self._reason(name, names, ignore) for name in names)
            reason = next((text for text in reasons if text is not None), None)
            if reason is None:
                self._shares[names[0]] = names
            else:
                self.dense.update(dict.fromkeys(names, reason))

    def _reason(self, name: str, names: Sequence[str], ignore: Sequence[str]) -> str | None:
        """Say why a layer is not compressed; `names` are those of all with its weight."""
        layer = self._layers[name]
        reason = misfit(name, capture.columns(layer), self._recipe, ignore)
        if reason is None and capture.overlaps(layer):
            reason = "a convolution whose windows overlap"
        if reason is None and capture.read_elsewhere(self.module, layer, names):
            reason = SHARED
        return reason

    @property
    def shared(self) -> dict[str, str]:
        """Layers that are stored as another one, by name."""
        return {
            name: first for first in self._done for name in self._shares[first] if name != first
        }

    @torch.no_grad()
    def run(self) -> list[BSRLayer]:
        """Compress all layers; returns them in the order that they run."""
        wanted = {name: self._layers[name] for name in self._shares}
        alone = {first for first, names in self._shares.items() if len(names) > 1}
        with self._running():
            groups = capture.input_groups(self.module, wanted, self._batches[0], alone)
        ran = {name for members in groups for name in members}
        for name in wanted.keys() - ran:
            for one in self._shares[name]:
                self.dense[one] = "it did not run, or not as a module of its own"
        if not ran:
            raise nothing_compressed(type(self.original).__name__, self.dense, "none at all")
        for done, members in enumerate(groups):
            self._progress("compressing layers", done, len(groups))
            self._group(members)
        self._progress("compressing layers", len(groups), len(groups))
        return list(self._done.values())

    def _group(self, members: tuple[str, ...]) -> None:
        leader = members[0]
        for name in members:
            check_not_lost(name, self._layers[name].weight)
        count = capture.parts(self._layers[leader])
        moments = [MomentAccumulator() for _ in range(count)]
        for batch in self._batches:
            dense = self._inputs(self.original, self._before, leader, batch)
            inputs = self._inputs(self.module, self._layers, leader, batch)
            for have, want in zip(inputs, dense, strict=True):
                pairs = zip(
                    moments,
                    capture.rows(self._layers[leader], have),
                    capture.rows(self._layers[leader], want),
                    strict=True,
                )
                for accumulator, x, d in pairs:
                    accumulator.add(x.contiguous(), dense=d.contiguous())
        results: list[list[GroupedWeight]] = []
        for part, accumulator in enumerate(moments):
            weights = [self._weight(name, part, count) for name in members]
            results.append(
                compress_rows(
                    weights,
                    accumulator.finish(leader),
                    [self._recipe.target] * len(members),
                    self._recipe,
                    list(members),
                )
            )
        for index, name in enumerate(members):
            found = [result[index] for result in results]
            layer = self._layers[name]
            decoded = torch.cat([weight.decode() for weight in found])
            layer.weight.copy_(decoded.reshape(layer.weight.shape))
            one = to_layer(name, found[0]) if count == 1 else block_diagonal(name, found)
            self._done[name] = one

    def _weight(self, name: str, part: int, count: int) -> Tensor:
        weight = self._layers[name].weight.flatten(1)
        return weight.chunk(count)[part]

    def _inputs(
        self,
        module: nn.Module,
        layers: Mapping[str, capture.Layer],
        name: str,
        batch: capture.Batch,
    ) -> list[Tensor]:
        found: list[Tensor] = []
        arguments, keywords = batch
        names = self._shares[name]
        see = capture.watched(layers, names, lambda _name, tensor: found.append(tensor.float()))
        with self._running(), see:
            module(*arguments, **keywords)
        return found

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Say that it is the caller's module that fails."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ModelError(
                f"{type(self.original).__name__} cannot run on the inputs: {first_line(error)}."
            ) from error

    def weight_names(self, parameters: Mapping[str, Tensor]) -> dict[str, BSRLayer]:
        """Return the compressed layers by their weight's name in the exported graph."""
        done = {self._layers[name].weight.data_ptr(): one for name, one in self._done.items()}
        pairs = ((name, done.get(tensor.data_ptr())) for name, tensor in parameters.items())
        return {name: layer for name, layer in pairs if layer is not None}
