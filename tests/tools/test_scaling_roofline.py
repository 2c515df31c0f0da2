"""The roofline's operations and bytes, the machine's ceilings, and the plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scaling_peak import measure_peaks
from scaling_plots import apart, clusters, draw
from scaling_roofline import kernel_points, roofline_result

from gqsa_compiler.profile import PhaseProfile, Profile, ProfileLine


def _line(name: str, microseconds: float, size: int | None) -> ProfileLine:
    return ProfileLine(
        name,
        "linear",
        2.0,
        microseconds,
        0.25,
        kernel="x86.bsr",
        weight="bsr-int4",
        n=100,
        k=10,
        sparsity=0.5,
        layers=2,
        bytes=size,
    )


@pytest.fixture
def profile() -> Profile:
    """Return a profile of two kernels, and of something that has no weights."""
    rest = ProfileLine("rest", "rest", 1.0, 5.0, 0.1)
    decode = (_line("qkv", 10.0, 500), _line("lm_head", 20.0, 800), rest)
    prefill = (_line("qkv", 100.0, None), _line("lm_head", 20.0, None), rest)
    return Profile(PhaseProfile(1, 40.0, 50.0, decode), PhaseProfile(300, 400.0, 500.0, prefill))


def test_points_count_kept_weights_and_the_bytes_of_every_chunk(profile: Profile) -> None:
    points = kernel_points(profile, chunk=128)
    found = {(p["phase"], p["name"]): (p["tokens"], p["bytes_read"]) for p in points}
    assert found == {
        ("decode", "qkv"): (1, 500),
        ("decode", "lm_head"): (1, 800),
        ("prefill", "qkv"): (300, 1500),
        ("prefill", "lm_head"): (1, 800),
    }
    assert {point["kept_weights"] for point in points} == {1000}


def test_result_is_operations_a_byte_and_a_second(profile: Profile) -> None:
    kernels = kernel_points(profile, chunk=512)
    rounds = [
        {"read_bandwidth": 1e9, "peaks": {"float32": peak}, "kernels": kernels}
        for peak in (3e9, 5e9)
    ]
    result = roofline_result({}, rounds)
    assert result["peaks"] == {"float32": 5e9}
    by_name = {(p["phase"], p["name"]): p for p in result["points"]}
    decode, prefill = by_name["decode", "qkv"], by_name["prefill", "qkv"]
    assert decode["operations_per_byte"] == 2 * 1000 / 500
    assert decode["operations_per_second"]["median"] == pytest.approx(2 * 1000 / 10e-6)
    assert prefill["operations_per_byte"] == 2 * 1000 * 300 / 500
    assert prefill["operations_per_second"]["median"] == pytest.approx(2 * 1000 * 300 / 100e-6)


def test_peaks_are_measured() -> None:
    peaks = measure_peaks(1, turns=1 << 14)
    assert 1e8 < peaks["float32"] < 1e13
    assert set(peaks) <= {"float32", "int16"}


def test_labels_are_moved_apart() -> None:
    assert apart([1.0, 100.0], 0.5) == [1.0, 100.0]
    assert apart([10.0, 10.0, 10.0], 1.0) == pytest.approx([10.0, 100.0, 1000.0])
    assert apart([11.0, 10.0], 1.0) == pytest.approx([100.0, 10.0])


def test_points_of_like_intensity_share_a_column() -> None:
    points = [{"operations_per_byte": x} for x in (300.0, 2.0, 3.5, 5.0)]
    found = [[point["operations_per_byte"] for point in cluster] for cluster in clusters(points)]
    assert found == [[2.0, 3.5, 5.0], [300.0]]


def _data(part: str, about: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {
        "part": part,
        "machine": {"cpu": "A CPU", "date": "2026-01-01T00:00:00"},
        "settings": {"threads": 1, "shape": "tiny"},
        "about": {"model": "tiny", **about},
        "rounds": [{}],
        "result": {"read_bandwidth": 1e10, **result},
    }


@pytest.mark.parametrize("part", ["context", "sparsity", "batch"])
def test_times_are_drawn(tmp_path: Path, part: str) -> None:
    pytest.importorskip("matplotlib")
    spread = {"median": 2.0, "low": 1.0, "high": 4.0}
    points = [
        {
            part: value,
            "seconds": spread,
            "ideal_seconds": 0.5,
            "bytes_ratio": 1.0,
            "tokens_per_second": spread,
        }
        for value in (1, 2)
    ]
    draw(_data(part, {}, {"points": points}), tmp_path / "a.svg")
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_a_roofline_is_drawn(tmp_path: Path, profile: Profile) -> None:
    pytest.importorskip("matplotlib")
    kernels = kernel_points(profile, chunk=512)
    peaks = {"float32": 3e11, "int16": 6e11}
    rounds = [{"read_bandwidth": 1e10, "peaks": peaks, "kernels": kernels}]
    draw(_data("roofline", {}, roofline_result({}, rounds)), tmp_path / "a.svg")
    assert "</svg>" in (tmp_path / "a.svg").read_text()
