"""Compress a model, one decoder block at a time, into a GQSA checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gqsa_compiler.checkpoint import CheckpointWriter, QuantizationConfig, from_codes
from gqsa_compiler.compress.block_oneshot import BlockState, compress_block
from gqsa_compiler.compress.blocks import (
    capture_inputs,
    find_blocks,
    linear_layers,
)
from gqsa_compiler.compress.calibration import (
    Progress,
    read_calibration,
    sample_text,
    sampling_dtype,
)
from gqsa_compiler.compress.recipe import (
    DEFAULT_SAMPLES,
    DEFAULT_SEQUENCE_LENGTH,
    Recipe,
    parse_recipe,
)
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.source import ModelSource, resolve
from gqsa_compiler.frontends.torch_model import (
    build_model,
    load_parameters,
    load_tokenizer,
    stored_dtype,
)
from gqsa_compiler.limits import BALANCES
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.registry import parse_config
from gqsa_compiler.outdir import check_output

BATCH_TOKENS = 2048
"""About so many tokens run through a block at once."""

RecoverBlock = Callable[[BlockState], BlockState]
"""Improves a block after one-shot compression (training goes here); returns the new state.

The new state has the outputs of the new block too.
"""


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer.

    Parameters
    ----------
    name : str
        Module path.
    n, k : int
        Output and input features.
    sparsity : float
        Share of groups dropped.
    bytes : int
        Stored bytes.
    """

    name: str
    n: int
    k: int
    sparsity: float
    bytes: int


@dataclass(frozen=True)
class CompressReport:
    """What `compress_model` made.

    Parameters
    ----------
    model, recipe, balance : str
    output : str
        The checkpoint's directory.
    calibration : str
        The text file, or ``sampled``.
    calibration_tokens : int
    layers : tuple of LayerReport
    block_errors : tuple of float
        Per block, the squared error of its outputs against the dense model's, relative.
    bits_per_weight : float
        Stored bits a weight of the compressed layers, with all indices and scales.
    seconds : float
        Wall time.
    """

    model: str
    recipe: str
    balance: str
    output: str
    calibration: str
    calibration_tokens: int
    layers: tuple[LayerReport, ...]
    block_errors: tuple[float, ...]
    bits_per_weight: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self)


def compress_model(
    model: str | ModelSource,
    output: str | Path,
    recipe: str | Recipe,
    *,
    calibration: str | Path | None = None,
    samples: int = DEFAULT_SAMPLES,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    seed: int = 0,
    balance: str = "matrix",
    overwrite: bool = False,
    progress: Progress | None = None,
    recover: RecoverBlock | None = None,
) -> CompressReport:
    """Prune and quantise every linear layer of a model's decoder blocks.

    Memory is at its peak either while the model samples text, when it is there whole in 16 bits
    (float32 if it is stored so and the CPU has no bfloat16 products), or in a block: two float32
    copies of it, up to sixteen float64 [K, K] for its widest layer's K inputs, and for every
    calibration token the block's activations. The model is never there whole in that second phase.

    Parameters
    ----------
    model : str or ModelSource
        What `resolve` takes: a directory, a GGUF file, a hub name or ``smollm2-135m``.
    output : path
        The checkpoint to make; it appears when it is whole.
    recipe : str or Recipe
        E.g. ``w4s30g16``.
    calibration : path, optional
        A UTF-8 text. By default the model samples text itself.
    samples, sequence_length : int
        Calibration sequences and the tokens of each.
    seed : int
        Of the sampled text. The same seed gives the same checkpoint on the same CPU.
    balance : str
        ``matrix`` (drop the least important groups of each matrix) or ``row`` (as many groups in
        every row).
    overwrite : bool
        Replace an existing checkpoint.
    progress : callable, optional
        Called with (stage, done, total).
    recover : callable, optional
        Called after each block's one-shot compression; what it returns is stored and goes on to
        the next block.

    Returns
    -------
    CompressReport

    Raises
    ------
    UsageError
        An argument is out of range, the output exists or the model lies in it, or the calibration
        text cannot be used.
    ModelError
        The model cannot be read or is compressed already, or a layer does not fit the recipe.
    """
    started = time.monotonic()
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    _check_arguments(samples, sequence_length, balance)
    source = resolve(model) if isinstance(model, str) else model
    if source.kind == "gqsa":
        raise ModelError(
            f"{source.path} is compressed already; compress the model that it was made from."
        )
    check_output(output, overwrite, protect=(source.path, *([calibration] if calibration else [])))
    report = progress or (lambda _stage, _done, _total: None)
    skeleton = build_model(source)
    prefix, blocks = find_blocks(skeleton)
    _check_groups(prefix, blocks, recipe)
    parsed = parse_config(source.config, str(source.path))
    _check_length(source, parsed, sequence_length)
    # Readers of the checkpoint know no family's default.
    tied = parsed.tie_word_embeddings
    config = {**source.config, "tie_word_embeddings": tied, "dtype": _matrix_dtype(source)}
    quantization = QuantizationConfig(
        bits=recipe.bits,
        group_size=recipe.group_size,
        ratio=recipe.sparsity,
        balance=balance,
        ignore=("lm_head",),
        producer=_producer(),
    )
    layers: list[LayerReport] = []
    errors: list[float] = []
    with CheckpointWriter(output, config, quantization, overwrite=overwrite) as writer:
        source.save_tokenizer(writer.directory)
        tokens = _calibration_tokens(
            source, parsed.bos_token_id, calibration, samples, sequence_length, seed, report
        )
        _write_rest(writer, source, prefix, blocks, tied=tied)
        load_parameters(skeleton, "", source, skip=f"{prefix}.")
        captured = capture_inputs(skeleton, blocks, _batches(tokens))
        whole = capture_inputs(skeleton, blocks, [tokens]).arguments
        inputs = dense_inputs = captured.hidden
        for index, (block, arguments) in enumerate(zip(blocks, captured.arguments, strict=True)):
            report("compressing blocks", index, len(blocks))
            name = f"{prefix}.{index}"
            load_parameters(block, name, source)
            state = compress_block(
                name, block, arguments, whole[index], inputs, dense_inputs, recipe, balance=balance
            )
            if recover is not None:
                state = recover(state)
            inputs, dense_inputs = state.outputs, state.targets
            errors.append(_relative_error(inputs, dense_inputs))
            layers += _write_layers(writer, state)
            _release(block)
        report("compressing blocks", len(blocks), len(blocks))
    weights = sum(layer.n * layer.k for layer in layers)
    return CompressReport(
        model=source.name,
        recipe=recipe.name,
        balance=balance,
        output=str(output),
        calibration="sampled" if calibration is None else str(calibration),
        calibration_tokens=tokens.numel(),
        layers=tuple(layers),
        block_errors=tuple(errors),
        bits_per_weight=8 * sum(layer.bytes for layer in layers) / weights,
        seconds=time.monotonic() - started,
    )


def _check_arguments(samples: int, sequence_length: int, balance: str) -> None:
    if balance not in BALANCES:
        raise UsageError(f"Balance {balance!r} is unknown; use {' or '.join(BALANCES)}.")
    if samples < 1:
        raise UsageError(f"Calibration needs at least 1 sample, not {samples}.")
    if sequence_length < 2:
        raise UsageError(f"A calibration sequence has at least 2 tokens, not {sequence_length}.")


def _check_groups(prefix: str, blocks: nn.ModuleList, recipe: Recipe) -> None:
    for index, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            if layer.in_features % recipe.group_size:
                raise ModelError(
                    f"Groups of {recipe.group_size} do not divide the {layer.in_features} inputs "
                    f"of layer {prefix}.{index}.{name}; use a smaller group size."
                )


def _check_length(source: ModelSource, config: DecoderConfig, sequence_length: int) -> None:
    limit = config.max_position_embeddings
    if sequence_length > limit:
        raise UsageError(
            f"The model {source.name} takes at most {limit} tokens, not a calibration sequence of "
            f"{sequence_length}."
        )


def _calibration_tokens(
    source: ModelSource,
    bos_token_id: int | None,
    calibration: str | Path | None,
    samples: int,
    sequence_length: int,
    seed: int,
    report: Progress,
) -> Tensor:
    if calibration is not None:
        report("reading calibration text", 0, 1)
        tokenizer = load_tokenizer(source)
        return read_calibration(Path(calibration), tokenizer, samples, sequence_length)
    report("sampling calibration text", 0, samples * sequence_length)
    model = build_model(source, sampling_dtype(stored_dtype(source)))
    load_parameters(model, "", source)
    return sample_text(model, bos_token_id, samples, sequence_length, seed, report)


def _batches(tokens: Tensor) -> list[Tensor]:
    """Split into equal batches, so that one set of masks serves all."""
    samples, length = tokens.shape
    most = max(1, BATCH_TOKENS // length)
    size = max(n for n in range(1, min(most, samples) + 1) if samples % n == 0)
    return list(tokens.split(size))


def _write_rest(
    writer: CheckpointWriter,
    source: ModelSource,
    prefix: str,
    blocks: nn.ModuleList,
    *,
    tied: bool,
) -> None:
    """Store everything but the blocks' linear weights: matrices in 16 bits, vectors as they are."""
    compressed = {
        f"{prefix}.{index}.{path}.weight"
        for index, block in enumerate(blocks)
        for path in linear_layers(block)
    }
    unused = {"lm_head.weight"} if tied else set()
    for name in source.tensor_names():
        if name in compressed or name in unused:
            continue
        array = source.tensor(name)
        if array.ndim > 1 and array.dtype == np.float32:
            half = array.astype(np.float16)
            if not np.isfinite(half).all():
                raise ModelError(
                    f"{source.path}: {name} has values that float16 cannot hold (or NaN)."
                )
            array = half
        writer.add_tensor(name, array)


def _matrix_dtype(source: ModelSource) -> str:
    return "bfloat16" if stored_dtype(source) == torch.bfloat16 else "float16"


def _producer() -> str:
    try:
        return f"gqsa-compiler {version('gqsa-compiler')}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "gqsa-compiler"


def _release(module: nn.Module) -> None:
    """Free the parameters' memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def _relative_error(outputs: list[Tensor], targets: list[Tensor]) -> float:
    pairs = zip(outputs, targets, strict=True)
    wrong = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return wrong / max(sum(float(b.double().square().sum()) for b in targets), 1e-300)


def _write_layers(writer: CheckpointWriter, state: BlockState) -> list[LayerReport]:
    reports = []
    for path, weight in state.weights.items():
        rows, groups, size = weight.codes.shape
        layer = from_codes(
            f"{state.name}.{path}",
            (rows, groups * size),
            size,
            weight.keep.numpy(),
            weight.codes.to(torch.uint8).numpy(),
            weight.scales.half().numpy(),
            weight.zeros.to(torch.uint8).numpy(),
        )
        writer.add_layer(layer)
        reports.append(LayerReport(layer.name, rows, groups * size, layer.sparsity, layer.nbytes))
    return reports
