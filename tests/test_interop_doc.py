"""The Python examples of docs/interop.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny


def _examples(root: Path) -> list[str]:
    text = (root / "docs" / "interop.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_examples(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(
        make_tiny("llama", tmp_path / "dense", num_hidden_layers=1), tmp_path / "CKPT"
    )
    run = 0
    for code in _examples(root):
        if "lm_eval" in code:  # another program's command line
            continue
        for name in ("CKPT", "COPY", "PACKED", "AGAIN"):
            code = code.replace(f'"{name}"', repr(str(tmp_path / name)))
        exec(compile(code, "docs/interop.md", "exec"), {})
        run += 1
    assert run == 2
    assert "True {'4-bit codes, groups of 16': 7}\n7 0.4" in capsys.readouterr().out
    assert (tmp_path / "COPY" / "config.json").is_file()
    assert checkpoint.is_dir()
