"""The tokenizer's files as the runtime gets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.tokenizer import eos_token_ids, token_id
from tests.tiny_models import CHAT_TEMPLATE, make_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "model", num_hidden_layers=1)


def edit(path: Path, **fields: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **fields}))


def saved(model: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    resolve(str(model)).save_tokenizer(out)
    generation: dict[str, Any] = json.loads((out / "generation_config.json").read_text())
    return generation


def test_files_are_written(model: Path, tmp_path: Path) -> None:
    edit(model / "generation_config.json", temperature=0.7)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.py"})
    generation = saved(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert generation["temperature"] == 0.7
    # 2 from config.json and tokenizer_config.json, 0 from generation_config.json.
    assert generation["eos_token_id"] == [0, 2]
    assert generation["bos_token_id"] == 1
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert "auto_map" not in settings
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_model_without_generation_config(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").unlink()
    edit(model / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    generation = saved(model, tmp_path / "out")
    assert generation == {"eos_token_id": [0, 2], "bos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("where", "value", "want"),
    [
        ("tokenizer_config.json", "{{ a }}", "{{ a }}"),
        (
            "tokenizer_config.json",
            [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
            "D",
        ),
        ("tokenizer_config.json", [{"name": "tool_use", "template": "T"}], None),
        ("chat_template.json", "{{ b }}", "{{ b }}"),
        ("tokenizer_config.json", None, None),
    ],
)
def test_chat_template_in_other_places(
    where: str, value: Any, want: str | None, model: Path, tmp_path: Path
) -> None:
    (model / "chat_template.jinja").unlink()
    edit(model / where, chat_template=value)
    saved(model, tmp_path / "out")
    written = tmp_path / "out" / "chat_template.jinja"
    assert (written.read_text() if written.is_file() else None) == want
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings


def test_slow_tokenizer_is_converted(model: Path, tmp_path: Path) -> None:
    bpe = json.loads((model / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    text = "The quick brown fox"
    want = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (model / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    edit(model / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    saved(model, tmp_path / "out")
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids == want


def test_errors(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read as JSON"):
        saved(broken, tmp_path / "a")
    (broken / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json does not hold a JSON object"):
        saved(broken, tmp_path / "b")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(ModelError, match="transformers cannot load its tokenizer"):
        saved(broken, tmp_path / "c")
    (broken / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        saved(broken, tmp_path / "d")


def test_token_lookup() -> None:
    assert token_id({"added_tokens": [{"id": 7, "content": "x"}]}, "x") == 7
    assert token_id({"model": {"vocab": {"x": 3}}}, "x") == 3
    assert token_id({"model": {"vocab": [["a", 0.0], ["x", -1.0]]}}, "x") == 1
    assert token_id({"model": {"vocab": {}}}, "x") is None
    assert token_id({}, "x") is None
    assert eos_token_ids({"eos_token_id": None}, {}, {"eos_token": "x"}, {}) == []
    assert eos_token_ids({"eos_token_id": [5, 3]}, {"eos_token_id": 4}, {}, {}) == [3, 4, 5]
