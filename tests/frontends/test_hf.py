"""The imported module: its shape, its parameters and the errors of models that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.hf import DEFAULT_CONTEXT, ImportedModel, import_model
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.models.layers import CausalLM
from gqsa_compiler.models.registry import architecture, parse_config
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny

LAYERS = 2


def load(directory: Path, context_length: int | None = 32) -> ImportedModel:
    source = resolve(str(directory))
    return import_model(source, context_length=context_length)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directory of a tiny model of each family."""
    root = tmp_path_factory.mktemp("tiny")
    extra = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"]}}
    return {
        family: make_tiny(family, root / family, num_hidden_layers=LAYERS, **extra.get(family, {}))
        for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_module(family: str, tiny: dict[str, Path]) -> None:
    imported = load(tiny[family])
    source = resolve(str(tiny[family]))
    rope = [name for name in imported.params if name.startswith("rope.")]
    assert set(imported.params) - set(rope) == set(source.tensor_names())
    tables = {"opt": [], "gemma3": ["rope.cos_sin", "rope.local.cos_sin"]}
    assert rope == tables.get(family, ["rope.cos_sin"])
    relax.analysis.well_formed(imported.mod)
    for name, inputs in (("forward", 3), ("hidden_states", 2), ("logits", 1)):
        function = imported.mod[name]
        assert int(function.attrs["num_input"]) == inputs
        parameters = function.params[inputs:]
        assert tuple(p.name for p in parameters) == imported.params
        for parameter in parameters:
            array = imported.load(parameter.name)
            assert tuple(int(size) for size in parameter.ty.shape) == array.shape
            assert parameter.ty.dtype == "float32"
        assert [str(var) for var in function.attrs["tir_non_negative_var"]] == ["n", "m"]
        assert "tir_var_upper_bound" not in function.attrs
    model = imported.model
    assert (model.num_layers, model.vocab_size, model.context_length) == (2, VOCAB_SIZE, 32)
    assert (model.bos_token_id, model.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("biases", [False, True], ids=["as it is", "other biases"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_list_of_tensors_is_that_of_the_definition(
    family: str, biases: bool, tiny: dict[str, Path]
) -> None:
    fields = resolve(str(tiny[family])).config
    if biases:
        more = {"llama": ["attention_bias", "mlp_bias"], "opt": ["enable_bias"]}
        fields |= {"tie_word_embeddings": not fields["tie_word_embeddings"]}
        fields |= dict.fromkeys(more.get(family, []), family != "opt")
    config = parse_config(fields, family)
    record = architecture(config.model_type, family)
    definition = record.load_model_class()(config, 32)
    built = {name: tuple(map(int, p.shape)) for name, p in definition.named_parameters()}
    listed = list(record.tensors(config))
    assert len(listed) == len(dict(listed))
    assert dict(listed) == {k: v for k, v in built.items() if not k.startswith("rope.")}


def test_layers_that_are_not_there_are_missed_at_once(tmp_path: Path) -> None:
    """Not after a definition of all the layers that config.json makes up was built."""
    directory = make_tiny("llama", tmp_path / "m", num_hidden_layers=1)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1000}))
    with (
        mock.patch.object(CausalLM, "export_tvm", side_effect=AssertionError("built")),
        pytest.raises(ModelError, match=r"lacks the tensor 'model\.layers\.1\."),
    ):
        load(directory)


def matmuls(imported: ImportedModel) -> int:
    count = 0

    def visit(expr: object) -> None:
        nonlocal count
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.matmul"):
            count += 1

    relax.analysis.post_order_visit(imported.mod["forward"], visit)
    return count


def test_every_linear_layer_is_its_own_matmul(tiny: dict[str, Path]) -> None:
    assert matmuls(load(tiny["llama"])) == 7 * LAYERS + 1
    assert matmuls(load(tiny["opt"])) == 6 * LAYERS + 1


def test_load(tiny: dict[str, Path], tmp_path: Path) -> None:
    directory = make_tiny("gemma3", tmp_path / "half", dtype="float16", num_hidden_layers=1,
                          layer_types=["full_attention"])  # fmt: skip
    imported = load(directory)
    stored = load_file(directory / "model.safetensors")
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert imported.load(matrix).dtype == np.float16
    np.testing.assert_array_equal(imported.load(matrix), stored[matrix])
    for norm in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert imported.load(norm).dtype == np.float32
        np.testing.assert_array_equal(imported.load(norm), stored[norm].astype(np.float32) + 1)
    table = imported.load("rope.cos_sin")
    assert table.shape == (32, 32)
    np.testing.assert_array_equal(table[0], [1.0] * 16 + [0.0] * 16)
    assert not np.array_equal(table, imported.load("rope.local.cos_sin"))
    # Only Gemma's norms are stored without the one.
    llama = load(tiny["llama"])
    norm = load_file(tiny["llama"] / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(llama.load("model.norm.weight"), norm)
    with pytest.raises(ModelError, match="has no tensor 'nope'"):
        llama.load("nope")


def test_windows_become_attention_kinds(tiny: dict[str, Path]) -> None:
    short = load(tiny["gemma3"]).model
    assert (short.attn_kinds, short.sliding_window) == (("mha_sliding", "mha"), 8)
    # A window as long as the context hides nothing.
    covered = load(tiny["gemma3"], 8).model
    assert (covered.attn_kinds, covered.sliding_window) == (("mha", "mha"), None)


def test_context_length(tiny: dict[str, Path]) -> None:
    assert load(tiny["llama"], None).model.context_length == 256
    with pytest.raises(UsageError, match="context length 257 is more than the model's 256"):
        load(tiny["llama"], 257)
    with pytest.raises(UsageError, match="context length must be at least 1, not 0"):
        load(tiny["llama"], 0)


def test_default_context_is_limited_whatever_the_configuration_leaves_out(tmp_path: Path) -> None:
    """Mistral's default of 131072 positions would be a rotary table of as many rows."""
    directory = make_tiny("mistral", tmp_path / "m", num_hidden_layers=1)
    config = json.loads((directory / "config.json").read_text())
    for positions, want in ((None, DEFAULT_CONTEXT), (4096, DEFAULT_CONTEXT), (1024, 1024)):
        fields = {k: v for k, v in config.items() if k != "max_position_embeddings"}
        if positions is not None:
            fields["max_position_embeddings"] = positions
        (directory / "config.json").write_text(json.dumps(fields))
        imported = load(directory, None)
        assert imported.model.context_length == want
        assert imported.load("rope.cos_sin").shape[0] == want


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "m", num_hidden_layers=1)
    weights = directory / "model.safetensors"
    good = load_file(weights)

    def check(tensors: dict[str, np.ndarray], message: str) -> None:
        save_file(tensors, weights)
        with pytest.raises(ModelError, match=message):
            load(directory)

    norm = "model.norm.weight"
    check({k: v for k, v in good.items() if k != norm}, rf"lacks the tensor '{norm}'\.")
    check({**good, norm: good[norm][:32].copy()}, rf"{norm} has the shape \[32\], but .* \[64\]")
    bias = "model.layers.0.self_attn.q_proj.bias"
    check({**good, bias: np.ones(64, np.float32)}, rf"has the tensor '{bias}', which a llama model")
    # Harmless leftovers of a tied model and of old checkpoints.
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {"lm_head.weight": good["model.embed_tokens.weight"], inv_freq: np.ones(8, np.float32)}
    save_file({**good, **extra}, weights)
    assert "lm_head.weight" not in load(directory).params


def test_untied_model_without_output_matrix(tmp_path: Path) -> None:
    directory = make_tiny("qwen3", tmp_path / "m", num_hidden_layers=1)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"lacks the tensor 'lm_head\.weight' \(tie_word_emb"):
        load(directory)
