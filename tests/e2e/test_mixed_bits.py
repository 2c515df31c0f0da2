"""A checkpoint whose layers differ in bits, group size and symmetry, compiled and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.checkpoint import LayerScheme
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from gqsa_compiler.inspect import inspect_path
from tests.e2e.test_parity import TOLERANCE, X86, greedy, relative_error
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import VOCAB_SIZE, make_tiny

ATTENTION, MLP = "self_attn", "mlp"
# In layer 0, q, k, v and gate, up fold; in layer 1 they differ. The rest is 4 bits, groups of 16.
SCHEMES = {
    f"model.layers.{layer}": LayerScheme(bits, group_size, symmetric, 0.3)
    for layer, bits, group_size, symmetric in [
        (f"0.{ATTENTION}.q_proj", 3, 32, False),
        (f"0.{ATTENTION}.k_proj", 3, 32, False),
        (f"0.{ATTENTION}.v_proj", 3, 32, False),
        (f"0.{MLP}.gate_proj", 8, 64, False),
        (f"0.{MLP}.up_proj", 8, 64, False),
        (f"0.{MLP}.down_proj", 2, 16, False),
        (f"1.{ATTENTION}.q_proj", 2, 32, False),
        (f"1.{ATTENTION}.k_proj", 4, 64, False),
        (f"1.{ATTENTION}.v_proj", 8, 16, False),
        (f"1.{ATTENTION}.o_proj", 3, 64, True),
        (f"1.{MLP}.gate_proj", 3, 16, False),
        (f"1.{MLP}.down_proj", 8, 32, True),
    ]
}
CHUNK = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compressed tiny Llama of two layers."""
    folder = tmp_path_factory.mktemp("mixed")
    dense = make_tiny("llama", folder / "dense", gain=1.0, num_hidden_layers=2)
    return make_checkpoint(dense, folder / "checkpoint", per_layer=SCHEMES)


def test_inspect_says_what_each_layer_is(checkpoint: Path) -> None:
    layers = {layer["name"]: layer for layer in inspect_path(checkpoint)["layers"]}
    assert len(layers) == 14
    for name, layer in layers.items():
        scheme = SCHEMES.get(name, LayerScheme(4, 16, False, 0.4))
        assert (layer["bits"], layer["group_size"]) == (scheme.bits, scheme.group_size)
        groups = round((1 - layer["sparsity"]) * layer["n"] * layer["k"] / scheme.group_size)
        zeros = 0 if scheme.symmetric else (groups * scheme.bits + 7) // 8
        codes = groups * scheme.group_size * scheme.bits // 8
        assert layer["bytes"] == codes + zeros + 4 * groups + 4 * (layer["n"] + 1)


@pytest.mark.parametrize(
    "activations",
    [
        pytest.param("float32", marks=pytest.mark.slow),
        pytest.param("int16", marks=X86),
        pytest.param("int8", marks=pytest.mark.slow),  # its kernels' bits: tests/schedules
    ],
)
def test_logits_and_greedy_text_agree_with_pytorch(checkpoint: Path, activations: str) -> None:
    output = checkpoint.parent / activations
    report = gqsa_compile(
        str(checkpoint),
        output,
        activations=activations,
        # Greedy text is the same only where nothing is rounded.
        kv_cache="float32" if activations == "float32" else "float16",
        head="stored",
        prefill_chunk=CHUNK,
        context_length=128,
    )
    kernels = {k.layer.removeprefix("model.layers."): k for k in report.kernels}
    stored = {name: (k.weight, k.kernel.rpartition(".")[2]) for name, k in kernels.items()}
    assert stored == {
        "0.self_attn.{q_proj+k_proj+v_proj}": ("bsr-int3", "bsr_int4"),
        "0.self_attn.o_proj": ("bsr-int4", "bsr_int4"),
        "0.mlp.{gate_proj+up_proj}": ("bsr-int8", "bsr_int8"),
        "0.mlp.down_proj": ("bsr-int2", "bsr_int2"),
        "1.self_attn.q_proj": ("bsr-int2", "bsr_int2"),
        "1.self_attn.k_proj": ("bsr-int4", "bsr_int4"),
        "1.self_attn.v_proj": ("bsr-int8", "bsr_int8"),
        "1.self_attn.o_proj": ("bsr-int3", "bsr_int4"),
        "1.mlp.gate_proj": ("bsr-int3", "bsr_int4"),
        "1.mlp.up_proj": ("bsr-int4", "bsr_int4"),
        "1.mlp.down_proj": ("bsr-int8", "bsr_int8"),
        "model.embed_tokens": ("float32", "dense"),
    }
    # 3-bit codes are widened to 4 bits, and the report counts what is packed.
    qkv = kernels["0.self_attn.{q_proj+k_proj+v_proj}"]
    groups = round((1 - qkv.sparsity) * qkv.n * qkv.k / 32)
    assert qkv.bytes >= groups * 32 * 4 // 8

    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, 2 * CHUNK + 5)
    reference = load_checkpoint_dense(resolve(str(checkpoint)))
    with torch.inference_mode():
        expected = reference(torch.tensor(tokens)[None]).logits[0].numpy()
    with runtime.load(output) as model:
        logits = np.concatenate([block.copy() for block in model.score(tokens)])
        assert relative_error(logits, expected) < TOLERANCE[activations]
        if activations == "float32":
            prompt = [int(t) for t in tokens[:7]]
            ours = model.generate(prompt, max_tokens=32, temperature=0.0, ignore_eos=True)
            assert list(ours.token_ids) == greedy(reference, prompt, 32)
