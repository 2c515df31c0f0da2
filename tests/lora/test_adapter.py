"""Reading adapters: what PEFT writes, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gqsa_compiler.errors import CheckpointError, ModelError, UsageError
from gqsa_compiler.lora.adapter import Adapter
from gqsa_compiler.lora.adapters import _balanced
from gqsa_compiler.lora.config import read_config
from gqsa_compiler.lora.names import MAX_ADAPTERS, check_names, parse_adapters
from tests.lora.adapters import CONFIG

LINEARS = {"model.layers.0.q_proj": (6, 8), "model.layers.1.q_proj": (6, 8)}
PREFIX = "base_model.model.model.layers.0.q_proj"


def write(directory: Path, tensors: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Write an adapter of rank 2 for the two layers, or with other tensors."""
    if tensors is None:
        rng = np.random.default_rng(0)
        tensors = {}
        for layer, (n, k) in LINEARS.items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = rng.standard_normal((2, k))
            tensors[f"base_model.model.{layer}.lora_B.weight"] = rng.standard_normal((n, 2))
        tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {**CONFIG, "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_a_plain_adapter(tmp_path: Path) -> None:
    directory = write(tmp_path / "a")
    adapter = Adapter(directory, LINEARS)
    assert list(adapter.layers) == list(LINEARS)
    layer = adapter.layers["model.layers.0.q_proj"]
    assert (layer.rank, layer.scale) == (2, 3.0)
    a, b = adapter.matrices("model.layers.0.q_proj")
    stored = load_file(directory / "adapter_model.safetensors")
    np.testing.assert_array_equal(a, stored[f"{PREFIX}.lora_A.weight"])
    np.testing.assert_array_equal(b, stored[f"{PREFIX}.lora_B.weight"] * np.float32(3))


def test_ranks_and_scales_of_single_layers(tmp_path: Path) -> None:
    def scales(**fields: Any) -> list[tuple[int, float]]:
        config = read_config(write(tmp_path / "a", **fields))
        names = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.my_q_proj")
        return [(config.rank_of(name), config.scale_of(name)) for name in names]

    assert scales(use_rslora=True, r=4) == [(4, 3.0)] * 3
    assert scales(rank_pattern={"layers.1.q_proj": 3}) == [(2, 3.0), (3, 2.0), (2, 3.0)]
    assert scales(alpha_pattern={"q_proj": 1.5}) == [(2, 0.75), (2, 0.75), (2, 3.0)]
    whole = {r"^model\.layers\.0\.q_proj": 8, "q_proj": 4}
    assert scales(alpha_pattern=whole) == [(2, 4.0), (2, 2.0), (2, 3.0)]
    assert scales(rank_pattern={"^q_proj": 5}) == [(2, 3.0)] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"of the type 'IA3'; only LORA"),
        ({"peft_type": None}, "of the type None"),
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"use_qalora": True}, "is a QALoRA adapter"),
        ({"bias": "all"}, "changes biases"),
        ({"lora_bias": True}, "has biases"),
        ({"modules_to_save": ["lm_head"]}, "brings whole modules along"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"layer_replication": [[0, 1]]}, "repeats layers"),
        ({"trainable_token_indices": [1]}, "rows of the embedding"),
        ({"target_parameters": ["experts"]}, "no linear layer's"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": 1}, "init_lora_weights 1"),
        ({"task_type": "SEQ_CLS"}, "task is 'SEQ_CLS'"),
        ({"use_magic": True}, "the setting 'use_magic', which is not known"),
        ({"r": 0}, "r is 0 and must be a whole number, 1 to 1024"),
        ({"r": 1025}, "r is 1025"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 1e9}, "lora_alpha is 1000000000.0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"(a+)+$": 2}}, "no other regular expressions"),
        ({"rank_pattern": {r"layers.\d": 2}}, "no other regular expressions"),
        ({"rank_pattern": {"": 2}}, "no other regular expressions"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"alpha_pattern": {"q_proj": []}}, r"alpha_pattern\['q_proj'\] is \[\]"),
        ({"r": 4}, r"has the shape \[2, 8\] and must be \[4, 8\] for rank 4"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Adapter(write(tmp_path / "a", **fields), LINEARS)


@pytest.mark.parametrize(
    "fields",
    [
        # What PEFT writes of an adapter that began so.
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_beginnings_that_leave_the_model_alone(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert Adapter(write(tmp_path / "a", **fields), LINEARS).layers


def test_halves_keep_the_digits_of_small_matrices() -> None:
    """After a few steps of training B is far below what halves have all their digits for."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 64)), rng.standard_normal((32, 4)) * 1e-7
    left, right = _balanced(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(right @ left, b @ a, rtol=1e-4, atol=1e-11)
    halves = right.astype(np.float16).astype(float) @ left.astype(np.float16).astype(float)
    assert abs(halves - b @ a).max() < 1e-3 * abs(b @ a).max()
    nothing = np.zeros((32, 4), np.float32)
    assert _balanced(left, nothing)[1] is nothing


def _tensors(**arrays: Any) -> dict[str, Any]:
    full = {"A": np.zeros((2, 8), np.float32), "B": np.zeros((6, 2), np.float32), **arrays}
    return {f"{PREFIX}.lora_{k}.weight": v for k, v in full.items() if v is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_tensors(A=None), "lacks lora_A of model.layers.0.q_proj"),
        (_tensors(B=None), "lacks lora_B of model.layers.0.q_proj"),
        (_tensors(A=np.zeros((2, 7), np.float32)), r"shape \[2, 7\] and must be \[2, 8\]"),
        (_tensors(B=np.zeros((2, 6), np.float32)), r"shape \[2, 6\] and must be \[6, 2\]"),
        (_tensors(B=np.zeros((6, 2, 1), np.float32)), r"shape \[6, 2, 1\]"),
        (_tensors(A=np.zeros((2, 8), np.float64)), "float64, not a float of 2 or 4 bytes"),
        (_tensors(A=np.zeros((2, 8), np.int32)), "int32, not a float of 2 or 4 bytes"),
        ({}, "has no LoRA matrices"),
        ({"base_model.model.x.lora_A.weight": np.zeros((2, 8), np.float32)}, "no linear layer"),
        (
            {"base_model.model.lm_head.lora_A.weight": np.zeros((2, 8), np.float32)},
            "its head may be its embedding",
        ),
        ({f"{PREFIX}.lora_magnitude_vector": np.zeros(6, np.float32)}, "a DoRA magnitude"),
        ({f"{PREFIX}.lora_embedding_A": np.zeros((2, 8), np.float32)}, "adapter of an embedding"),
        ({f"{PREFIX}.bias": np.zeros(6, np.float32)}, "a bias"),
        ({f"{PREFIX}.weight": np.zeros((6, 8), np.float32)}, "no LoRA matrix"),
        ({"model.layers.0.q_proj.lora_A.weight": np.zeros((2, 8), np.float32)}, "no LoRA matrix"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Adapter(write(tmp_path / "a", tensors), LINEARS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    tensors = _tensors(A=np.full((2, 8), value, np.float32))
    adapter = Adapter(write(tmp_path / "a", tensors), LINEARS)
    with pytest.raises(ModelError, match=r"lora_A.weight .* holds values that are no numbers"):
        adapter.matrices("model.layers.0.q_proj")


def _truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "truncated"),
        (_pickle, "a pickle, which could run anything"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors;"),
        (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "does not hold a JSON object"),
    ],
)
def test_damaged_directories(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    directory = write(tmp_path / "a")
    damage(directory)
    with pytest.raises((ModelError, CheckpointError), match=message):
        Adapter(directory, LINEARS)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        Adapter(tmp_path / "none", LINEARS)


def test_names(tmp_path: Path) -> None:
    found = parse_adapters(["math=a/b", str(tmp_path / "poems"), "x=y=z"])
    assert found == {"math": Path("a/b"), "poems": tmp_path / "poems", "x": Path("y=z")}
    with pytest.raises(UsageError, match="Two adapters are called 'a'"):
        parse_adapters(["a=b", "a=c"])
    for name in ("", "a b", "-a", "a/b", "a" * 65):
        with pytest.raises(UsageError, match="An adapter cannot be called"):
            parse_adapters([f"{name}=dir"])
    for text in ("a=", ""):
        with pytest.raises(UsageError, match="names no directory"):
            parse_adapters([text])
    with pytest.raises(UsageError, match="at most 256"):
        check_names({f"a{i}": "dir" for i in range(MAX_ADAPTERS + 1)})
