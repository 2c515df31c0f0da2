"""lm-eval on a checkpoint, with a task of local files, as docs/interop.md describes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.export import export_model
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow


def blocks(root: Path, kind: str) -> list[str]:
    """Return the fenced blocks of a kind in the section about lm-eval."""
    text = (root / "docs" / "interop.md").read_text(encoding="utf-8")
    section = re.split(r"^##+ ", text[text.index("### lm-eval") + 4 :], flags=re.MULTILINE)[0]
    return re.findall(rf"^```{kind}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def evaluate(program: str, model: Path, directory: Path) -> list[Any]:
    """Run the documented program on the documented task; return what each choice was given."""
    output = directory / f"results-{model.name}"
    arguments = [
        "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks", "animals",
        "--include_path", str(directory), "--output_path", str(output), "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=directory, text=True, check=False,
        capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    (file,) = output.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return [sample["filtered_resps"] for sample in samples]


def test_it_runs_on_a_checkpoint(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (task,), (questions,), (program,) = (blocks(root, kind) for kind in ("yaml", "json", "python"))
    (tmp_path / "animals.yaml").write_text(task)
    (tmp_path / "animals.jsonl").write_text(questions)
    checkpoint = make_checkpoint(make_tiny("llama", tmp_path / "tiny"), tmp_path / "ckpt")
    export_model(str(checkpoint), tmp_path / "dense", "dense")
    found = evaluate(program, checkpoint, tmp_path)
    assert len(found) == len(questions.splitlines())
    assert found == evaluate(program, tmp_path / "dense", tmp_path)
