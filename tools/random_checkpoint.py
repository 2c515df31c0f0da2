"""Write a GQSA checkpoint of random weights: any shape and sparsity in seconds, without a model.

For measuring speed and memory where the words do not matter. Rows keep unequal numbers of groups,
as pruning by size leaves them, and signals keep their size from layer to layer.

    python tools/random_checkpoint.py llama-3.2-1b -o out/1b-s50g16 --sparsity 0.5
    python tools/random_checkpoint.py path/to/config.json -o out/mine --bits 3 --group-size 32
    python tools/random_checkpoint.py llama-3.2-1b -o out/1b-head4 --head-bits 4 --head-group 32
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from model_shapes import SHAPES, shape_config

from gqsa_compiler.checkpoint import (
    BSRLayer,
    CheckpointWriter,
    LayerScheme,
    QuantizationConfig,
    pack_codes,
)
from gqsa_compiler.compress.counts import kept_groups
from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.frontends.tokenizer import save_directory_tokenizer
from gqsa_compiler.limits import BITS, GROUP_SIZES
from gqsa_compiler.models.registry import architecture
from gqsa_compiler.models.tensors import NamedShape
from gqsa_compiler.units import bytes_text

# Spread of the logarithm of a group's size in trained models, read off SmolLM2-135M: its row's
# share, its column's, and its own. Half of the groups dropped, rows then keep 50 % +- 22 %.
_ROW_SPREAD, _COLUMN_SPREAD, _GROUP_SPREAD = 0.15, 0.03, 0.2
_VALUES_AT_ONCE = 1 << 24
_BYTE_TOKENS = 256
_HEAD = "lm_head"


@dataclass(frozen=True)
class Scheme:
    """How every layer is compressed.

    Parameters
    ----------
    sparsity : float
        Share of a matrix's groups that are absent, 0 <= sparsity < 1.
    group_size, bits : int
    """

    sparsity: float = 0.5
    group_size: int = 16
    bits: int = 4


def tensor_shapes(config: Mapping[str, Any]) -> list[NamedShape]:
    """List the names and shapes of a configuration's weights, layer by layer."""
    record = architecture(config.get("model_type"), "the configuration")
    return list(record.tensors(record.config.from_dict(config)))


def layer_scheme(
    name: str, shape: tuple[int, ...], scheme: Scheme, head: Scheme | None = None
) -> Scheme | None:
    """Return what becomes of a weight; None if it is neither a block's linear layer nor a head."""
    if name == f"{_HEAD}.weight":
        return head
    return scheme if ".layers." in name and len(shape) == 2 else None


def random_layer(
    name: str, shape: tuple[int, int], scheme: Scheme, rng: np.random.Generator
) -> BSRLayer:
    """Make a layer of gain about 1 that keeps its largest groups.

    Parameters
    ----------
    name : str
        Its module path.
    shape : tuple of int
        (N, K).
    scheme : Scheme
    rng : Generator
    """
    rows, columns = shape[0], shape[1] // scheme.group_size
    sizes = rng.standard_normal((rows, columns), np.float32)
    sizes *= _GROUP_SPREAD
    sizes += _ROW_SPREAD * rng.standard_normal((rows, 1), np.float32)
    sizes += _COLUMN_SPREAD * rng.standard_normal((1, columns), np.float32)
    nnz = kept_groups(sizes.size, scheme.sparsity)
    # The mask from an order, not from a threshold: equal sizes would keep one too many.
    keep = np.zeros(sizes.shape, bool)
    keep.flat[np.argpartition(sizes, sizes.size - nnz, axis=None)[sizes.size - nnz :]] = True
    indptr = np.zeros(rows + 1, np.int32)
    np.cumsum(keep.sum(axis=1), out=indptr[1:])

    top = (1 << scheme.bits) - 1
    centres = rng.normal(top / 2, (top + 1) / 16, nnz)
    zeros = np.clip(np.rint(centres), 0, top).astype(np.uint8)
    middle = zeros - np.float32(top / 2)
    variance = ((top + 1) ** 2 - 1) / 12 + float(np.mean(middle * middle))
    scales = np.exp(sizes[keep])
    # A row has K * nnz / (N * C) weights that are not 0.
    fan_in = nnz / rows * scheme.group_size
    scales *= (variance * fan_in * float(np.mean(scales * scales))) ** -0.5
    packed = scheme.group_size * scheme.bits // 8
    return BSRLayer(
        name=name,
        shape=shape,
        group_size=scheme.group_size,
        indptr=indptr,
        indices=np.nonzero(keep)[1].astype(np.uint16),
        # Codes fill their bytes, so that random bytes are random codes.
        qweight=rng.integers(0, 256, (nnz, packed), np.uint8),
        scales=scales.astype(np.float16),
        qzeros=pack_codes(zeros, scheme.bits),
        bits=scheme.bits,
    )


def random_tensor(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], rng: np.random.Generator
) -> npt.NDArray[np.float16]:
    """Make a weight that stays uncompressed: an embedding, a head, a norm or a bias."""
    if len(shape) == 1:
        centred = name.endswith(".bias") or config["model_type"] == "gemma3_text"
        centre = np.float32(0.0 if centred else 1.0)
        return (centre + 0.1 * rng.standard_normal(shape, np.float32)).astype(np.float16)
    values = np.empty(shape, np.float16)
    step = max(1, _VALUES_AT_ONCE // shape[1])
    for start in range(0, shape[0], step):
        block = values[start : start + step]
        block[...] = shape[1] ** -0.5 * rng.standard_normal(block.shape, np.float32)
    return values


def write_checkpoint(
    config: Mapping[str, Any],
    directory: Path,
    scheme: Scheme,
    *,
    head: Scheme | None = None,
    seed: int = 0,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of random weights, one tensor in memory at a time.

    Parameters
    ----------
    config : mapping
        The model's Hugging Face fields.
    directory : Path
        The checkpoint to make.
    scheme : Scheme
    head : Scheme, optional
        Of the language-model head, which then has weights of its own; without it, it is left in
        16 bits.
    seed : int
    tokenizer : Path, optional
        A model directory whose tokenizer is copied; without one, a made-up one is written.
    overwrite : bool
        Replace an existing checkpoint.

    Raises
    ------
    GqsaError
        The configuration is not supported, the group size does not divide a layer's inputs, or
        the directory cannot be written.
    """
    if head is not None:
        config = {**config, "tie_word_embeddings": False}
    tensors = tensor_shapes(config)
    schemes = {name: layer_scheme(name, shape, scheme, head) for name, shape in tensors}
    for name, shape in tensors:
        found = schemes[name]
        if found is not None and shape[1] % found.group_size:
            option = "--head-group" if found is head else "--group-size"
            raise UsageError(
                f"Groups of {found.group_size} do not divide the {shape[1]} inputs of {name}; "
                f"choose another {option}."
            )
    quantization = QuantizationConfig(
        bits=scheme.bits,
        group_size=scheme.group_size,
        ratio=scheme.sparsity,
        ignore=(_HEAD,) if head is None else (),
        per_layer={}
        if head is None
        else {_HEAD: LayerScheme(head.bits, head.group_size, False, head.sparsity)},
        producer="tools/random_checkpoint.py",
    )
    rng = np.random.default_rng(seed)
    with CheckpointWriter(directory, dict(config), quantization, overwrite=overwrite) as writer:
        for name, shape in tensors:
            found = schemes[name]
            if found is not None:
                path = name.removesuffix(".weight")
                writer.add_layer(random_layer(path, (shape[0], shape[1]), found, rng))
            else:
                writer.add_tensor(name, random_tensor(name, shape, config, rng))
        if tokenizer is not None:
            save_directory_tokenizer(tokenizer, writer.directory, dict(config))
        else:
            with tempfile.TemporaryDirectory() as scratch:
                _made_up_tokenizer(Path(scratch), int(config["vocab_size"]))
                save_directory_tokenizer(Path(scratch), writer.directory, dict(config))


def _made_up_tokenizer(directory: Path, entries: int) -> None:
    """Write a tokenizer that reads any text byte by byte, and writes the other ids as words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if entries < _BYTE_TOKENS:
        raise UsageError(
            f"A vocabulary of {entries} has no room for {_BYTE_TOKENS} bytes; give a --tokenizer."
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "\u0120" is how byte-level tokenizers spell a space.
    words = [*alphabet, *(f"\u0120w{index}" for index in range(len(alphabet), entries))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def sparsity(text: str) -> float:
    """Read a share from 0 to below 1, for argparse."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def main() -> None:
    """Write the checkpoint that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or a Hugging Face config.json")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sparsity", type=sparsity, default=0.5, help="0 <= S < 1")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=16)
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--head-bits", type=int, choices=BITS, help="compress the head too")
    parser.add_argument("--head-group", type=int, choices=GROUP_SIZES, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a model directory to copy it from")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    scheme = Scheme(options.sparsity, options.group_size, options.bits)
    head = None if options.head_bits is None else Scheme(0.0, options.head_group, options.head_bits)
    try:
        write_checkpoint(
            shape_config(options.shape),
            options.output,
            scheme,
            head=head,
            seed=options.seed,
            tokenizer=options.tokenizer,
            overwrite=options.overwrite,
        )
    except GqsaError as error:
        sys.exit(f"Error: {error}")
    size = sum(file.stat().st_size for file in options.output.glob("*.safetensors"))
    print(f"{options.output}: {bytes_text(size)}")


if __name__ == "__main__":
    main()
