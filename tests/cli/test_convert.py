"""`gqsa convert`, and `gqsa compile` of another quantiser's checkpoint as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler.runtime import load
from tests.cli.conftest import Gqsa
from tests.frontends.quantised.packers import quantise_directory
from tests.test_convert import GPTQ, UP, gptq, scattered
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("convert")
    dense = make_tiny("llama", place / "dense", num_hidden_layers=1)
    quantise_directory(dense, place / "gptq", gptq, GPTQ)
    quantise_directory(dense, place / "scattered", scattered, GPTQ)
    return place


def test_convert(gqsa: Gqsa, quantised: Path, tmp_path: Path) -> None:
    done = gqsa("convert", quantised / "gptq", "-o", tmp_path / "a")
    assert done.code == 0
    assert done.out.startswith("7 GPTQ layers taken over at ")
    assert f"Next: gqsa compile {tmp_path / 'a'}" in done.err
    done = gqsa("convert", quantised / "gptq", "-o", tmp_path / "b", "--json")
    assert done.json["layers"] == 7
    found = gqsa("inspect", tmp_path / "b", "--json").json
    assert found["bits_per_weight"] == done.json["bits_per_weight"]


def test_keep_dense(gqsa: Gqsa, quantised: Path, tmp_path: Path) -> None:
    words = ("convert", quantised / "scattered", "-o", tmp_path / "a")
    done = gqsa(*words)
    assert done.code == 1
    assert "activation order" in done.error
    done = gqsa(*words, "--keep-dense")
    assert done.code == 0
    assert f"{UP} is stored uncompressed." in done.err


def test_what_cannot_be_converted(gqsa: Gqsa, quantised: Path, tmp_path: Path) -> None:
    done = gqsa("convert", quantised / "dense", "-o", tmp_path / "a")
    assert (done.code, "is not quantised" in done.error) == (2, True)
    done = gqsa("convert", quantised / "gptq", "-o", quantised)
    assert (done.code, "contains the input" in done.error) == (2, True)


@pytest.mark.slow
def test_compile_takes_it_as_it_is(gqsa: Gqsa, quantised: Path, tmp_path: Path) -> None:
    """An artefact of a GPTQ directory is that of the checkpoint that it converts to."""
    gqsa("convert", quantised / "gptq", "-o", tmp_path / "ckpt")
    logits = []
    for name, source in (("a", quantised / "gptq"), ("b", tmp_path / "ckpt")):
        words = ("compile", source, "-o", tmp_path / name, "--context", "32", "--head", "stored")
        done = gqsa(*words, "--no-fallback", "--json")
        assert done.code == 0, done.err
        with load(tmp_path / name) as model:
            logits.append(np.concatenate(list(model.score(list(range(3, 13))))))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_a_recipe_is_for_dense_models(gqsa: Gqsa, quantised: Path, tmp_path: Path) -> None:
    done = gqsa("compile", quantised / "gptq", "-o", tmp_path / "c", "--recipe", "dense")
    assert (done.code, "is compressed already" in done.error) == (2, True)


@pytest.mark.slow
def test_compress_starts_from_the_decoded_weights(
    gqsa: Gqsa, quantised: Path, tmp_path: Path
) -> None:
    words = ("--stages", "none", "--samples", "2", "--sequence-length", "16", "--json")
    done = gqsa(
        "compress", quantised / "gptq", "-o", tmp_path / "a", "--recipe", "w4s30g16", *words
    )
    assert done.code == 0, done.err
    assert len(done.json["layers"]) == 7
