"""Rivals on the CPU, as far as PyTorch has them there: what is checked, timed, skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_timing
import pytest
import torch
from cuda_processes import Clock, run_group
from cuda_rivals import RIVALS, Cublas, run_cases

N, K = 64, 256


class StandStill:
    """A clock that runs the work once and makes its times up."""

    def time(self, work: Callable[[], None], repeats: int) -> list[float]:
        work()
        return [1e-3] * repeats


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timing, "LEAST_ROTATED", 100_000)
    monkeypatch.setattr(cuda_timing, "LEAST_CALLS", 10)


def run(cases: list[tuple[str, str, int]]) -> list[dict[str, Any]]:
    return list(run_cases(torch, N, K, cases, StandStill(), 0, "cpu"))


def test_a_rival_is_checked_and_timed() -> None:
    begin, one, again, eight = run([("64x256", "cublas-fp16", t) for t in (1, 8)])
    assert begin == {"begin": "64x256|cublas-fp16|1"}
    assert again == {"begin": "64x256|cublas-fp16|8"}
    for result in (one, eight):
        assert result["status"] == "ok"
        assert result["together"] < 1e-3
        assert result["weight_bytes"] == 2 * N * K
        assert result["timing"]["copies"] == 4
        assert result["timing"]["calls"] == 12
        assert result["timing"]["median"] == pytest.approx(1e-3 / 12)


def test_a_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Cublas.call
    monkeypatch.setattr(Cublas, "call", lambda self, w, x: 1.03 * call(self, w, x))
    _, result = run([("64x256", "cublas-fp16", 1)])
    assert result["status"] == "wrong"
    assert result["fault"] == "results are off by 0.03 of their norm together"
    assert "timing" not in result


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "cublas-fp16"])
def test_what_this_machine_has_not_is_skipped_with_a_reason(name: str) -> None:
    lines = run([("64x256", name, 1), ("64x256", name, 8)])
    results = [line for line in lines if "case" in line]
    assert [result["case"] for result in results] == [f"64x256|{name}|1", f"64x256|{name}|8"]
    for result in results:
        assert result["status"] == "skipped"
        assert "Error: " in result["fault"]


def test_the_decoded_weights_are_what_the_formats_say() -> None:
    for rival in (kind(torch, N, K, "cpu") for kind in RIVALS.values()):
        weight = rival.dense()
        assert weight.shape == (N, K)
        assert weight.abs().max() < 0.1
        assert rival.codes.max() == (1 << rival.bits) - 1
    sparse = RIVALS["cusparselt-2:4-fp16"](torch, N, K, "cpu").dense()
    assert int((sparse.view(-1, 4) != 0).sum(1).max()) <= 2


def test_as_a_process_without_a_gpu(tmp_path: Path) -> None:
    script = Path(cuda_timing.__file__).with_name("cuda_rivals.py")
    cases = [("64x256", "cublas-fp16", 1)]
    (result,) = run_group({"n": N, "k": K}, script, cases, tmp_path / "log", Clock(120))
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert result == json.loads(
        '{"case": "64x256|cublas-fp16|1", "status": "skipped", "fault": "PyTorch sees no GPU"}'
    )
