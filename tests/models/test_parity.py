"""Every definition computes what transformers computes, prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.frontends.hf import ImportedModel, import_model
from gqsa_compiler.frontends.resolve import resolve
from tests.models.runner import Runner, reference_logits
from tests.tiny_models import VOCAB_SIZE, make_tiny

PROMPT, STEPS = 21, 5
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, PROMPT + STEPS).tolist()

BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "rope_theta": 10000.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}


def load(directory: Path, context_length: int = 64) -> ImportedModel:
    source = resolve(str(directory))
    return import_model(source, context_length=context_length)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def check(runner: Runner, directory: Path) -> None:
    """Compare a prefill in two chunks and decode steps with transformers."""
    want = reference_logits(directory, TOKENS)
    cache = runner.new_cache()
    first = PROMPT - 4
    parts = [runner.forward(cache, TOKENS[:first], range(first))]
    parts.append(runner.all_logits(cache, TOKENS[first:PROMPT]))
    parts += [runner.forward(cache, [token], [0]) for token in TOKENS[PROMPT:]]
    assert relative_error(np.concatenate(parts), want) < 1e-4


@dataclass(frozen=True)
class Llama:
    """A compiled tiny Llama, for the tests that need one of any kind."""

    imported: ImportedModel
    runner: Runner
    directory: Path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    directory = make_tiny("llama", tmp_path_factory.mktemp("llama"), **BIASES)
    imported = load(directory)
    return Llama(imported, Runner(imported), directory)


def test_llama_with_biases(llama: Llama) -> None:
    llama.runner.use(llama.imported)
    check(llama.runner, llama.directory)


# Windows are shorter than the prompt in mistral, qwen2 and gemma3; mistral, qwen3 and the last
# one are untied.
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        pytest.param("mistral", {}, id="mistral"),
        pytest.param(
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            id="qwen2-window",
        ),
        # These also run in tests/e2e/test_parity.py, in float32 against transformers.
        pytest.param("qwen3", {}, id="qwen3", marks=pytest.mark.slow),
        pytest.param("gemma3", {}, id="gemma3", marks=pytest.mark.slow),
        pytest.param("opt", {}, id="opt", marks=pytest.mark.slow),
        pytest.param(
            "gemma3",
            {
                "num_hidden_layers": 1,
                "layer_types": ["full_attention"],
                "final_logit_softcapping": 5.0,
                "tie_word_embeddings": False,
            },
            id="gemma3-softcap-untied",
        ),
        pytest.param("llama", {}, id="llama-plain", marks=pytest.mark.slow),
        pytest.param("qwen2", {}, id="qwen2-plain", marks=pytest.mark.slow),
        pytest.param(
            "opt",
            {"enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False},
            id="opt-gelu-no-bias",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_family(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    directory = make_tiny(family, tmp_path / family, **overrides)
    check(Runner(load(directory)), directory)


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR], ids=lambda rope: str(rope["rope_type"]))
def test_rope_scaling_changes_nothing_but_the_table(
    rope: dict[str, Any], llama: Llama, tmp_path: Path
) -> None:
    directory = make_tiny("llama", tmp_path / "scaled", rope_parameters=rope, **BIASES)
    scaled = load(directory)
    before = llama.imported
    changed = [n for n in before.params if not np.array_equal(before.load(n), scaled.load(n))]
    assert changed == ["rope.cos_sin"]
    llama.runner.use(scaled)
    check(llama.runner, directory)


def test_rows_are_chosen_before_the_output_layer(llama: Llama) -> None:
    want = llama.runner.all_logits(llama.runner.new_cache(), TOKENS[:6])
    got = llama.runner.forward(llama.runner.new_cache(), TOKENS[:6], [5, 2])
    np.testing.assert_allclose(got, want[[5, 2]], rtol=1e-5, atol=1e-5)


def test_a_token_out_of_range_does_not_crash(llama: Llama) -> None:
    got = llama.runner.forward(llama.runner.new_cache(), [10**6], [0])
    want = llama.runner.forward(llama.runner.new_cache(), [VOCAB_SIZE - 1], [0])
    np.testing.assert_array_equal(got, want)
