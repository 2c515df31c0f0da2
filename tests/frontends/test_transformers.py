"""Private names of transformers: what is used exists, and what is gone is one clear sentence."""

from __future__ import annotations

import importlib

import pytest

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends import _transformers


def test_all_names_exist_in_the_installed_release() -> None:
    assert set(_transformers.gguf_config_fields("llama").values()) >= {"hidden_size"}
    assert "llama-bpe" in _transformers.gguf_tokenizer_splits()
    assert hasattr(_transformers.gguf_tensor_processor("llama", {}), "process")
    assert callable(_transformers.gguf_weight_names)
    with _transformers.no_init_weights():
        pass


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers.modeling_gguf_pytorch_utils", "TENSOR_PROCESSORS"),
        ("transformers.initialization", "no_init_weights"),
    ],
)
def test_a_name_that_is_gone(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    use = {
        "TENSOR_PROCESSORS": lambda: _transformers.gguf_tensor_processor("llama", {}),
        "no_init_weights": _transformers.no_init_weights,
    }[name]
    message = rf"gqsa uses {module}\.{name}, which transformers [\d.]+ does not have; install"
    with pytest.raises(ModelError, match=message):
        use()


def test_a_module_that_is_gone() -> None:
    with pytest.raises(ModelError, match=r"uses transformers\.nowhere\.thing, which"):
        _transformers.private("transformers.nowhere", "thing")
