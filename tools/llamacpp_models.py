"""GGUF files for llama.cpp to run beside ours: Q4_0 weights, random or SmolLM2's own.

    python tools/llamacpp_models.py llama-3.2-1b -o out/1b-q4_0.gguf
    python tools/llamacpp_models.py smollm2-135m -o out/smollm2-q4_0.gguf

A name such as the first (or a config.json) gives random weights of that shape, in the types that
llama.cpp's own quantiser chooses for Q4_0: its output layer is Q6_K. `smollm2-135m` is the real
model, quantised by llama.cpp (`--llama-python` names the Python that has it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from model_shapes import SHAPES, shape_config

from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.frontends.resolve import DEMO_MODEL, resolve
from gqsa_compiler.models.registry import architecture
from gqsa_compiler.units import bytes_text

try:
    import gguf
except ImportError as error:
    sys.exit(f"GGUF files cannot be read ({error}); install the package with: pip install gguf")

THEIRS = Path(__file__).with_name("llamacpp_theirs.py")

F32, Q4_0, Q6_K, Q8_0 = (
    gguf.GGMLQuantizationType[name] for name in ("F32", "Q4_0", "Q6_K", "Q8_0")
)


@dataclass(frozen=True)
class GGUFInfo:
    """A GGUF model's sizes.

    Parameters
    ----------
    vocab_size, hidden_size, num_layers : int
    bytes_per_token : int
        Weight bytes that decoding one token reads.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    bytes_per_token: int


def ask_llama(python: str, words: Sequence[str]) -> dict[str, Any]:
    """Run llama.cpp's side in its own process and return its JSON object.

    Raises
    ------
    GqsaError
        It failed; the message is its last line.
    """
    return ask([python, str(THEIRS), *words])


def ask(command: Sequence[str]) -> dict[str, Any]:
    """Run a program that prints one JSON object.

    Raises
    ------
    GqsaError
        It cannot be started, or failed; the message is its last line.
    """
    try:
        done = subprocess.run(command, check=False, text=True, capture_output=True)
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be run: {error.strerror}.") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise GqsaError(lines[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_model(
    name: str, path: Path, *, llama_python: str = sys.executable, seed: int = 0
) -> None:
    """Write the Q4_0 file of a named model.

    Parameters
    ----------
    name : str
        ``smollm2-135m``, a shape of `model_shapes`, or a config.json.
    path : Path
        The GGUF file to make.
    llama_python : str
        The Python that has llama-cpp-python; needed for ``smollm2-135m`` only.
    seed : int
        Of random weights.

    Raises
    ------
    GqsaError
        The name leads nowhere, its architecture is none of those written here, or llama.cpp
        failed.
    """
    if name == DEMO_MODEL:
        source = resolve(name).path
        path.parent.mkdir(parents=True, exist_ok=True)
        ask_llama(llama_python, ["quantize", str(source), str(path)])
    else:
        write_random(shape_config(name), path, seed=seed)


def write_random(config: Mapping[str, Any], path: Path, *, seed: int = 0) -> None:
    """Write random weights of gain about 1, one tensor in memory at a time.

    Raises
    ------
    UsageError
        The model is not a Llama without biases, or 32 does not divide a layer's inputs.
    """
    record = architecture(config.get("model_type"), "the configuration")
    decoder = record.config.from_dict(config)
    if record.model_type != "llama" or decoder.qkv_bias or decoder.mlp_bias or not decoder.rope:
        raise UsageError("Random GGUF files are written for Llama models without biases only.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file written aside takes the name when it is whole.
    part = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_context_length(decoder.max_position_embeddings)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_block_count(decoder.num_hidden_layers)
    writer.add_head_count(decoder.num_attention_heads)
    writer.add_head_count_kv(decoder.num_key_value_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_rope_dimension_count(decoder.head_dim)
    # A scaled RoPE takes as long as this one, and random weights do not mind.
    writer.add_rope_freq_base(decoder.rope.theta)
    writer.add_layer_norm_rms_eps(decoder.norm_eps)
    writer.add_tokenizer_model("none")

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, decoder.num_hidden_layers)
    tensors: list[tuple[Any, tuple[int, ...]]] = []
    head = "token_embd.weight" if decoder.tie_word_embeddings else "output.weight"
    for stored, shape in record.tensors(decoder):
        name = names.get_name(stored, try_suffixes=(".weight",))
        kind = _kind(shape, is_head=name == head)
        tensors.append((kind, shape))
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0], kind)
            continue
        values, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[1] % values:
            raise UsageError(f"{kind.name} needs inputs in {values}s, and {stored} has {shape[1]}.")
        row = shape[1] // values * size
        writer.add_tensor_info(name, (shape[0], row), np.dtype(np.uint8), shape[0] * row, kind)
    rng = np.random.default_rng(seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kind, shape in tensors:
        writer.write_tensor_data(_random_tensor(kind, shape, rng))
    writer.close()
    part.replace(path)


def read_info(path: Path) -> GGUFInfo:
    """Read what a GGUF file says of its model.

    Raises
    ------
    UsageError
        There is no such file, or it is not a GGUF file of a language model.
    """
    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        kind = reader.fields["general.architecture"].contents()
        layers = reader.fields[f"{kind}.block_count"].contents()
        hidden, vocabulary = tensors["token_embd.weight"].shape.tolist()
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} cannot be read as a GGUF model: {error}.") from error
    read = sum(int(tensor.n_bytes) for tensor in tensors.values())
    if "output.weight" in tensors:  # then only one row of the embedding is read
        read -= int(tensors["token_embd.weight"].n_bytes)
    return GGUFInfo(vocabulary, hidden, layers, read)


def _kind(shape: tuple[int, ...], *, is_head: bool) -> Any:
    """Choose the stored type as llama.cpp's quantiser does for Q4_0."""
    if len(shape) == 1:
        return F32
    if not is_head:
        return Q4_0
    return Q6_K if shape[1] % gguf.GGML_QUANT_SIZES[Q6_K][0] == 0 else Q8_0


def _random_tensor(kind: Any, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[Any]:
    """Return float32 [n], or the bytes of random blocks [N, bytes of a row]."""
    if kind is F32:
        norm: npt.NDArray[Any] = 1 + np.float32(0.1) * rng.standard_normal(shape, np.float32)
        return norm
    values, size = gguf.GGML_QUANT_SIZES[kind]
    count = shape[0] * (shape[1] // values)
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    # Codes fill their bytes, so that random bytes are random codes; what remains are the scales.
    gain = shape[1] ** -0.5
    if kind is Q4_0:  # float16, 16 bytes of codes 0 to 15 that mean -8 to 7
        place, deviation = slice(0, 2), 21.5**0.5
    elif kind is Q8_0:  # float16, 32 codes -128 to 127
        place, deviation = slice(0, 2), 5461.5**0.5
    else:  # Q6_K: codes -32 to 31, 16 scales of 8 bits, float16
        place, deviation = slice(208, 210), 16 * 341.5**0.5
        blocks[:, 192:208] = rng.integers(12, 21, (count, 16), np.uint8)
    scales = gain / deviation * np.exp(0.2 * rng.standard_normal((count, 1), np.float32))
    # Codes reach further down than up: with scales of one sign, all outputs would lean one way.
    scales *= rng.choice(np.array([-1, 1], np.float32), scales.shape)
    blocks[:, place] = scales.astype("<f2").view(np.uint8)
    return blocks.reshape(shape[0], -1)


def main() -> None:
    """Write the file that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{DEMO_MODEL}, {', '.join(SHAPES)}, or a config.json")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        write_model(
            options.model, options.output, llama_python=options.llama_python, seed=options.seed
        )
    except GqsaError as error:
        sys.exit(f"Error: {error}")
    print(f"{options.output}: {bytes_text(options.output.stat().st_size)}")


if __name__ == "__main__":
    main()
