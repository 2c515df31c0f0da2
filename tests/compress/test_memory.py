"""Peak memory of whole runs, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny

RUN = r"""
import re, sys
import torch
import gqsa_compiler.compress.pipeline as pipeline
from gqsa_compiler.compress import compress_model
def peak():
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024
torch.set_num_threads(1)
tiny, model, out = sys.argv[1:]
compress_model(tiny, out + "-tiny", "w4s30g16", stages="none", samples=2, sequence_length=16)
before = peak()
sample, at_sampling = pipeline.calibration_tokens, []
def watched(*args):
    tokens = sample(*args)
    at_sampling.append(peak())
    return tokens
pipeline.calibration_tokens = watched
compress_model(model, out, "w4s30g16", stages="none", samples=4, sequence_length=32)
print(at_sampling[0] - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.xfail(
    reason="the promise is not kept yet: sampling peaked at 2.4 times the stored model, a whole "
    "one-shot run at 7 times",
    raises=AssertionError,  # running out of time is no such failure
    strict=True,
)
def test_peak_is_the_stored_model_or_one_block(tmp_path: Path) -> None:
    tiny = make_tiny("llama", tmp_path / "tiny")
    width = 1536
    model = make_tiny(
        "llama",
        tmp_path / "model",
        dtype="float16",
        hidden_size=512,
        intermediate_size=width,
        num_attention_heads=8,
        num_hidden_layers=8,
    )
    disk = (model / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tiny), str(model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sampling, whole = map(int, done.stdout.split())
    # Some pages of the file count too. In float32 the model alone is twice its size on disk.
    assert disk / 2 < sampling < 1.4 * disk
    block = disk // 8
    assert whole < max(sampling, 2 * (2 * block) + 16 * 8 * width**2)
