"""The dense model that a GPU's benchmarks compare with, on the CPU."""

from __future__ import annotations

from pathlib import Path

import cuda_torch_model
import pytest
import torch
from cuda_processes import Clock, run_group

SHAPE = {
    "hidden": 32, "inner": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 50,
}  # fmt: skip


def test_a_token_sees_the_tokens_before_it() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        model, size = cuda_torch_model.build(torch, SHAPE, 8, "cpu")
        weights = sum(p.numel() * 4 for p in model.parameters())
        assert size == weights - 50 * 32 * 4  # of the embedding a token reads a row
        tokens = [torch.tensor([t]) for t in (3, 9, 7)]
        found = [model(t, torch.tensor([i])) for i, t in enumerate(tokens)]
        assert found[0].shape == (1, 50)
        again = model(tokens[2], torch.tensor([2]))
        torch.testing.assert_close(again, found[2])
        model(torch.tensor([4]), torch.tensor([5]))  # what comes later is not seen
        torch.testing.assert_close(model(tokens[2], torch.tensor([2])), found[2])
        model(torch.tensor([4]), torch.tensor([1]))  # another token before it
        assert (model(tokens[2], torch.tensor([2])) - found[2]).abs().max() > 1e-3


def test_contexts_are_timed() -> None:
    found = dict(cuda_torch_model.measure(torch, SHAPE, [8, 16], "cpu", compiled=False))
    assert list(found) == [8, 16]
    for result in found.values():
        assert result["status"] == "ok"
        assert result["timing"]["median"] > 0
        assert result["bandwidth"] == result["weight_bytes"] / result["timing"]["median"]


def test_as_a_process_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    cases = [("llama", "torch-compile-fp16", context) for context in (8, 16)]
    script = Path(cuda_torch_model.__file__)
    found = run_group({"shape": SHAPE}, script, cases, tmp_path / "log", Clock(120))
    assert [result["case"] for result in found] == [
        "llama|torch-compile-fp16|8", "llama|torch-compile-fp16|16"
    ]  # fmt: skip
    assert {result["fault"] for result in found} == {"PyTorch sees no GPU"}
