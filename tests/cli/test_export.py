"""`gqsa export` on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Gqsa
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    return make_checkpoint(make_tiny("llama", place / "dense", num_hidden_layers=1), place / "ckpt")


def test_exports(gqsa: Gqsa, checkpoint: Path, tmp_path: Path) -> None:
    done = gqsa("export", checkpoint, "--to", "dense", "-o", tmp_path / "a")
    assert done.code == 0
    assert done.out.startswith("layers: 7 as float32; every weight exact; ")
    assert f"Wrote {tmp_path / 'a'}." in done.err
    done = gqsa("export", checkpoint, "--to", "gguf", "-o", tmp_path / "b")
    assert done.out.startswith("layers: 7 as F16; the weights of 7 layers rounded; ")
    assert "fit no block type of GGUF" in done.err
    done = gqsa("export", checkpoint, "--to", "gptq", "-o", tmp_path / "c", "--json")
    assert (done.json["format"], done.json["exact"]) == ("gptq", True)


def test_what_is_refused(gqsa: Gqsa, checkpoint: Path, tmp_path: Path) -> None:
    done = gqsa("export", checkpoint, "--to", "onnx2", "-o", tmp_path / "a")
    assert done.code == 2
    done = gqsa("export", checkpoint, "--to", "dense", "-o", checkpoint)
    assert (done.code, "is the input" in done.error) == (2, True)
    done = gqsa("export", tmp_path / "nope", "--to", "dense", "-o", tmp_path / "a")
    assert (done.code, "no such file or directory" in done.error) == (2, True)
