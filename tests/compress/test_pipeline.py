"""Whole models: every family, determinism, errors, nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from gqsa_compiler.checkpoint import CheckpointReader, LayerScheme, to_dense, validate
from gqsa_compiler.compress import CompressReport, Recipe, compress_model, parse_recipe
from gqsa_compiler.compress.blocks import HEAD
from gqsa_compiler.compress.calibration import tokens as tokens_module
from gqsa_compiler.compress.phases import block as block_phase
from gqsa_compiler.compress.recipes.recipe import Head
from gqsa_compiler.compress.result import LayerReport
from gqsa_compiler.compress.solver.block_oneshot import BlockState, compress_block
from gqsa_compiler.compress.solver.rtn import round_weight
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import (
    load_checkpoint_dense,
    load_dense,
    load_tokenizer,
)
from tests.tiny_models import FAMILIES, make_tiny

QUICK: dict[str, Any] = {"samples": 8, "sequence_length": 32, "stages": "none"}
"""One shot, on little text."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    dense = make_tiny(family, tmp_path / "dense")
    report = compress_model(str(dense), tmp_path / "out", "w4s30g16", **QUICK)
    with CheckpointReader(tmp_path / "out") as reader:
        validate(reader)
        model, _ = load_dense(resolve(str(dense)))
        linears = {
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != HEAD
        }
        assert set(reader.layer_names) == {*linears, HEAD}
        assert {layer.name for layer in report.layers} == linears
        groups = kept = 0
        for name in linears:
            layer = reader.layer(name)
            total = layer.shape[0] * layer.shape[1] // 16
            asked = reader.quantization.scheme(name).ratio
            assert layer.nnz == total - int(total * asked + 1e-9)
            groups, kept = groups + total, kept + layer.nnz
            assert layer.input_rms is not None
        # Balanced over the model: about 30% of all of them.
        assert kept / groups == pytest.approx(0.7, abs=0.01)
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") in {*linears, HEAD}:
                continue
            stored = reader.tensor(name)
            assert stored.dtype == (np.float32 if parameter.ndim == 1 else np.float16)
            np.testing.assert_array_equal(stored, parameter.numpy().astype(stored.dtype))
        check_head(reader, report, model)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert 4.3 < report.bits_per_weight < 5.2
    assert all(0 < loss < 0.5 for loss in report.block_losses)


def check_head(reader: CheckpointReader, report: CompressReport, model: Any) -> None:
    """Assert that a checkpoint has the head of the default settings, beside the embedding."""
    layer = reader.layer(HEAD)
    weight = model.get_output_embeddings().weight
    assert layer.shape == tuple(weight.shape)
    assert (layer.bits, layer.group_size, layer.sparsity) == (4, 32, 0.0)
    assert reader.quantization.scheme(HEAD) == LayerScheme(4, 32, False, 0.0)
    assert reader.quantization.ignore == ()
    assert reader.config["tie_word_embeddings"] is False
    assert report.head == LayerReport(HEAD, *layer.shape, 4, 32, 0.0, layer.nbytes)
    rough = round_weight(weight, torch.ones(len(weight), 2, dtype=torch.bool), 32, 4).decode()
    wrong = torch.from_numpy(to_dense(layer)) - weight
    # Near what rounding gives: it makes up for its errors by larger ones.
    assert float(wrong.square().mean()) < 3 * float((rough - weight).square().mean())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_left_as_it_is(tied: bool, tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1, tie_word_embeddings=tied)
    recipe = replace(parse_recipe("w4s30g16"), head=None)
    report = compress_model(dense, tmp_path / "out", recipe, **QUICK)
    assert report.head is None
    with CheckpointReader(tmp_path / "out") as reader:
        assert HEAD not in reader.layer_names
        assert (f"{HEAD}.weight" in reader.tensor_names) is not tied
        assert reader.quantization.ignore == (HEAD,)
        assert reader.config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("solver", ["compensated", "rtn"])
def test_other_heads(bits: int, solver: Any, llama: Path, tmp_path: Path) -> None:
    recipe = Recipe("mine", 4, 0, 32, solver=solver, head=Head(bits, 16))
    report = compress_model(llama, tmp_path / "out", recipe, **QUICK)
    assert report.head is not None
    assert report.head.bits_per_weight == pytest.approx(bits + (16 + bits + 16) / 16, abs=1)
    with CheckpointReader(tmp_path / "out") as reader:
        validate(reader)
        assert (reader.layer(HEAD).bits, reader.layer(HEAD).group_size) == (bits, 16)


def test_a_budget_is_for_the_blocks(llama: Path, tmp_path: Path) -> None:
    sizes = []
    for head in (None, Head(8, 16)):
        recipe = replace(parse_recipe("w4s50g16"), head=head)
        report = compress_model(llama, tmp_path / str(head), recipe, budget="3.5", **QUICK)
        sizes.append(report.bits_per_weight)
    assert sizes[0] == sizes[1] <= 3.5


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_keep_the_model(family: str, tmp_path: Path) -> None:
    dense = make_tiny(family, tmp_path / "dense")
    compress_model(str(dense), tmp_path / "out", "w4s0g16", **{**QUICK, "samples": 64})
    model, _ = load_dense(resolve(str(dense)))
    compressed = load_checkpoint_dense(resolve(str(tmp_path / "out")))
    tokens = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(tokens).logits.log_softmax(-1)
        got = compressed(tokens).logits.log_softmax(-1)
    uniform = (wanted.exp() * (wanted + np.log(wanted.shape[-1]))).sum(-1).mean()
    divergence = (wanted.exp() * (wanted - got)).sum(-1).mean()
    # Random weights have no slack: a trained model loses far less.
    assert float(divergence) < 0.3 * float(uniform)


def test_blocks_see_the_inputs_they_get_in_the_whole_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last block was given is what the checkpoint's own hidden states are."""
    states: list[BlockState] = []

    def watched(*arguments: Any) -> BlockState:
        states.append(compress_block(*arguments))
        return states[-1]

    monkeypatch.setattr(block_phase, "compress_block", watched)
    compress_model(llama, tmp_path / "out", "w4s30g16", **QUICK)
    model = load_checkpoint_dense(resolve(str(tmp_path / "out")))
    # Embeddings are stored in float16; all else is exact.
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense, _ = load_dense(resolve(str(llama)))
    table = dense.get_input_embeddings().weight
    tokens = torch.cdist(states[0].inputs[0][:2], table[None]).argmin(-1)
    with torch.inference_mode():
        model(tokens)
    torch.testing.assert_close(seen[0], states[0].inputs[0][:2], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(seen[1], states[2].inputs[0][:2], rtol=2e-2, atol=2e-2)


def test_how_large_inputs_are_is_stored(llama: Path, tmp_path: Path) -> None:
    """What the checkpoint says of a layer's inputs is what its own model gives that layer."""
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 40
    (tmp_path / "text.txt").write_text(text)
    options: dict[str, Any] = {**QUICK, "calibration": tmp_path / "text.txt"}
    compress_model(llama, tmp_path / "out", "w8s10g16", **options)
    source = resolve(str(tmp_path / "out"))
    model = load_checkpoint_dense(source)
    seen: dict[str, torch.Tensor] = {}
    names = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj")
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    with torch.inference_mode():
        ids = load_tokenizer(source)(text, return_tensors="pt").input_ids[0]
        model(ids[: len(ids) // 32 * 32].view(-1, 32))
    assert source.checkpoint is not None
    for name in names:
        stored = source.checkpoint.layer(name).input_rms
        rms = seen[name].double().square().mean((0, 1)).sqrt().numpy()
        assert np.corrcoef(stored, rms)[0, 1] > 0.95
        assert np.median(stored / rms) == pytest.approx(1, rel=0.1)


def test_same_seed_same_bytes_and_another_seed_others(llama: Path, tmp_path: Path) -> None:
    def weights(seed: int, name: str) -> bytes:
        compress_model(str(llama), tmp_path / name, Recipe("mine", 4, 30, 16), seed=seed, **QUICK)
        return b"".join(p.read_bytes() for p in sorted((tmp_path / name).glob("*.safetensors")))

    first = weights(3, "a")
    assert first == weights(3, "b")
    assert first != weights(4, "c")


def test_calibration_file_and_row_balance(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    stages: list[str] = []
    report = compress_model(
        str(llama), tmp_path / "out", "w4s50g16", calibration=text, balance="row",
        progress=lambda stage, done, total: stages.append(stage), **QUICK,
    )  # fmt: skip
    assert report.calibration == str(text)
    assert report.calibration_tokens == 8 * 32
    assert list(dict.fromkeys(stages)) == [
        "checking the model",
        "reading calibration text",
        "measuring sensitivities",
        "compressing blocks",
        "compressing the head",
        "writing",
    ]
    assert json.loads(json.dumps(report.to_dict()))["recipe"] == "w4s50g16"
    with CheckpointReader(tmp_path / "out") as reader:
        for name in reader.layer_names:
            assert len(set(np.diff(reader.layer(name).indptr).tolist())) == 1
        assert reader.quantization.balance == "row"
        assert reader.quantization.ratio == 0.5


def test_the_package_is_the_function(llama: Path, tmp_path: Path) -> None:
    import gqsa_compiler

    report = gqsa_compiler.compress(str(llama), tmp_path / "out", "w4s30g16", **QUICK)
    assert report.output == str(tmp_path / "out")
    assert gqsa_compiler.compress.compress_model is compress_model


def test_bfloat16_stays(tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    compress_model(str(dense), tmp_path / "out", "w4s0g32", **QUICK)
    with CheckpointReader(tmp_path / "out") as reader:
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            assert reader.tensor(name).dtype == ml_dtypes.bfloat16
        layer = to_dense(reader.layer("model.layers.0.mlp.up_proj"))
    original = resolve(str(dense)).tensor("model.layers.0.mlp.up_proj.weight").astype(np.float32)
    assert np.square(layer - original).mean() < 0.02 * np.square(original).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "w4s30g128"}, "do not divide the 64 inputs of layer model.layers.0"),
        ({"recipe": Recipe("mine", 4, 30, 16, head=Head(4, 128))}, "the 64 inputs of the head; gi"),
        ({"balance": "column"}, "balance is column; it must be one of"),
        ({"samples": 0}, "at least 1 sample"),
        ({"sequence_length": 1}, "at least 2 tokens"),
        ({"sequence_length": 1000}, "takes at most 256 tokens"),
    ],
)
def test_bad_arguments_are_found_before_any_work(
    llama: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    steps: list[str] = []
    options: dict[str, Any] = {"recipe": "w4s30g16", **QUICK, **arguments}
    with pytest.raises((UsageError, ModelError), match=message):
        compress_model(
            str(llama), tmp_path / "out", progress=lambda *step: steps.append(step[0]), **options
        )
    assert steps == []
    assert not (tmp_path / "out").exists()


def drop_fields(model: Path, *names: str) -> Path:
    """Leave fields out of config.json, so that the family's defaults hold."""
    path = model / "config.json"
    fields = {k: v for k, v in json.loads(path.read_text()).items() if k not in names}
    path.write_text(json.dumps(fields))
    return model


def test_length_is_checked_where_the_configuration_leaves_it_out(tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    drop_fields(dense, "max_position_embeddings")
    with pytest.raises(UsageError, match="takes at most 2048 tokens"):
        compress_model(dense, tmp_path / "out", "w4s30g16", samples=1, sequence_length=2049)


def test_family_defaults_count_in_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's files may leave out that a text begins with token 2 and that the head is tied."""
    from safetensors.torch import load_file, save_file

    dense = make_tiny("gemma3", tmp_path / "dense", num_hidden_layers=1,
                      layer_types=["full_attention"])  # fmt: skip
    drop_fields(dense, "bos_token_id", "tie_word_embeddings")
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    starts: list[Any] = []

    def sample(model: Any, bos: Any, samples: int, length: int, *_: Any) -> torch.Tensor:
        starts.append(bos)
        return torch.full((samples, length), 5)

    monkeypatch.setattr(tokens_module, "sample_text", sample)
    compress_model(str(dense), tmp_path / "out", Recipe("mine", 4, 30, 16), **QUICK)
    assert starts == [2]
    with CheckpointReader(tmp_path / "out") as reader:
        assert "lm_head.weight" not in reader.tensor_names
        assert reader.config["tie_word_embeddings"] is True  # this recipe leaves the head alone


def test_a_compressed_model_is_refused(llama: Path, tmp_path: Path) -> None:
    compress_model(str(llama), tmp_path / "out", "w4s30g16", **QUICK)
    with pytest.raises(ModelError, match="compressed already"):
        compress_model(str(tmp_path / "out"), tmp_path / "again", "w4s30g16", **QUICK)
    with pytest.raises(UsageError, match="exists"):
        compress_model(str(llama), tmp_path / "out", "w4s30g16", **QUICK)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("stage", ["checking the model", "sampling calibration text"])
def test_a_run_that_is_interrupted_before_anything_is_done_leaves_nothing(
    llama: Path, tmp_path: Path, failure: type[BaseException], stage: str
) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if name == stage:
            raise failure

    with pytest.raises(failure):
        compress_model(str(llama), tmp_path / "out", "w4s30g16", progress=stop, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_an_error_naming_the_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = make_tiny("llama", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = torch.nan
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    with pytest.raises(ModelError, match=r"layer model\.layers\.1\.self_attn\.q_proj"):
        compress_model(str(dense), tmp_path / "out", "w4s30g16", calibration=text, **QUICK)
