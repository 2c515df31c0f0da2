"""The tools are scripts that import each other by file name, as when they are run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda.nvcc import find_nvcc

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))


@pytest.fixture
def config() -> dict[str, Any]:
    """Return the configuration of a small Llama."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compile a driver for tests with nvcc, which knows where cuda.h is; returns its path."""
    try:
        nvcc = find_nvcc()
    except CompileError:
        pytest.skip("nvcc, which comes with cuda.h, is not installed")
    source = Path(__file__).with_name("fake_cuda.c")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [str(nvcc), "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-w", str(source)]
    subprocess.run([*command, "-o", str(path)], check=True)
    return str(path)
