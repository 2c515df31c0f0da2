"""Bundles of CUDA kernels: what is in them, and that a bundle's program checks and times them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_measure
import cuda_timing
import numpy as np
import pytest
from cuda_bundle import Job, build, jobs_of, main, one_token, spilling
from cuda_host import Tensor, launches
from cuda_layers import Problem, packing_key, prepare, random_layer
from cuda_measure import Case, run_cases
from cuda_shapes import ACTIVATIONS, GROUP_SIZE, SHAPES, Shape, shapes_named

from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.cuda.nvcc import KernelUse
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from tests.schedules.cuda.test_nvcc import needs_nvcc
from tests.tools.cuda_emulated import (
    SECONDS_A_LAUNCH,
    EmulatedDevice,
    emulated_compiler,
    instant_compiler,
)

SMALL = Shape(48, 256, ("a small model's down",))
CONFIG = CudaConfig(blocks=3, warps=2)


def job(dtype: str, variant: str = "sweep", tokens: tuple[int, ...] = (1,), **fields: Any) -> Job:
    spec = LinearSpec(SMALL.n, SMALL.k, "bsr", "int4", GROUP_SIZE, activation_dtype=dtype)  # type: ignore[arg-type]
    spec = replace(spec, **fields)
    return Job(SMALL, "sm_90", variant, spec, CONFIG, tokens, (0.5,))


def run(
    bundle: Path, manifest: dict[str, Any], tmp_path: Path, tokens: int, timed: bool = True
) -> tuple[list[dict[str, Any]], EmulatedDevice]:
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    prepare(folder, manifest["kernels"], 0.5, tokens, 0)
    kernels = {kernel["id"]: kernel for kernel in manifest["kernels"]}
    cases = [Case(name, 0.5, t) for name, kernel in kernels.items() for t in kernel["tokens"]]
    device = EmulatedDevice()
    lines = list(run_cases(device, bundle, kernels, cases, folder, timed))
    begun = [line["begin"] for line in lines if "begin" in line]
    results = [line for line in lines if "case" in line]
    assert begun == [result["case"] for result in results]
    return results, device


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timing, "LEAST_ROTATED", 30_000)
    monkeypatch.setattr(cuda_timing, "LEAST_CALLS", 4)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Build two kernels for the emulation: a fused one of each kind of activations."""
    code, folder = (tmp_path_factory.mktemp(name) for name in ("code", "emulated"))
    fused = Epilogue(bias=True, residual=True)
    gated = Epilogue(activation="silu", gated=True)
    jobs = [
        job("int16", epilogue=fused),
        replace(
            job("float16", epilogue=gated, norm_eps=1e-5),
            config=replace(CONFIG, warps=3, scale_bits=8),
        ),
    ]
    return folder, build(folder, jobs, [SMALL], (1,), (0.5,), emulated_compiler(code))


def test_kernels_of_a_bundle_are_right_and_timed(
    emulated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Everything but nvcc and the driver: packing, host parts, checks, copies, statistics."""
    results, device = run(*emulated, tmp_path, 1)
    assert [result["status"] for result in results] == ["ok"] * 2, results
    for result in results:
        assert result["bandwidth"] == pytest.approx(result["weight_bytes"] / SECONDS_A_LAUNCH)
        assert result["timing"]["copies"] * result["weight_bytes"] >= 30_000
        assert result["worst"] < 1
    # Only the last layer's copies are still there: 11 packed tensors each.
    assert len(device.arrays) == 11 * results[-1]["timing"]["copies"]


def test_a_wrong_kernel_is_reported_and_not_timed(
    emulated: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Problem.load

    def spoilt(folder: Path, kernel: Any) -> Problem:
        problem = load(folder, kernel)
        packed = {name: array.copy() for name, array in problem.packed.items()}
        packed["codes"][: 4 * 8] ^= 0x11111111  # a few units of a row
        return replace(problem, packed=packed)

    monkeypatch.setattr(Problem, "load", spoilt)
    results, _ = run(*emulated, tmp_path, 1)
    for result in results:
        assert result["status"] == "wrong"
        assert "token 0, output" in result["fault"]
        assert "timing" not in result


def test_a_failing_driver_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    jobs = [job("float16"), replace(job("int16"), config=replace(CONFIG, blocks=2))]
    manifest = build(bundle, jobs, [SMALL], (1,), (0.5,), instant_compiler)

    def load(self: EmulatedDevice, image: bytes) -> int:
        raise cuda_measure.DriverError("cuModuleLoadData: no kernel image (error 209)")

    monkeypatch.setattr(EmulatedDevice, "load", load)
    (result,), _ = run(bundle, manifest, tmp_path, 1)
    assert (result["status"], result["fault"][-11:]) == ("failed", "(error 209)")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_all_tiles_of_a_bundle_are_right(tmp_path: Path, dtype: str) -> None:
    code, bundle = tmp_path / "code", tmp_path / "bundle"
    code.mkdir()
    tokens = (1, 2, 3, 4, 8, 9, 70)
    manifest = build(
        bundle, [job(dtype, "default", tokens)], [SMALL], tokens, (0.5,), emulated_compiler(code)
    )
    results, _ = run(bundle, manifest, tmp_path, max(tokens), timed=False)
    assert [result["status"] for result in results] == ["ok"] * len(tokens), results


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    jobs = [job("int16"), job("float16", "default", (1, 16))]
    build(folder, jobs, [SMALL], (1, 16), (0.5, 0.0), instant_compiler)
    return folder


def test_the_manifest_says_what_is_there(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert [shape["name"] for shape in manifest["shapes"]] == ["48x256"]
    one, many = manifest["kernels"]
    assert one["id"] == "48x256-int16-sweep-w2r1d2s16-sm_90"
    assert list(one["functions"]) == ["main_kernel"]
    assert len(many["functions"]) == 7
    for kernel in (one, many):
        assert kernel["arguments"][0] == "x"
        assert kernel["arguments"][-1] == "out"
        assert gzip.decompress((bundle / kernel["image"]).read_bytes()).startswith(
            b"\x7fELF\0sm_90"
        )
    assert not spilling(manifest)
    manifest["kernels"][0]["functions"]["main_kernel"]["spill_bytes"] = 8
    assert spilling(manifest) == [f"{one['id']}: main_kernel"]


def test_the_host_part_chooses_by_tokens(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    kernel = manifest["kernels"][1]
    shapes = {"x": (0, 256), "out": (0, 48), "row_units": (49,), "slabs": (48,)}
    shapes |= {"row_scales": (48,)}
    chosen = {}
    for tokens in (1, 2, 3, 8, 9, 64, 65, 200):
        allocated: list[int] = []

        def allocate(size: int, allocated: list[int] = allocated) -> int:
            allocated.append(size)
            return 1000 + len(allocated)

        tensors = []
        for number, (_, dtype, extents) in enumerate(kernel["host"]["params"]):
            name = kernel["arguments"][number]
            shape = shapes.get(name, (12,))
            shape = (tokens, *shape[1:]) if shape[0] == 0 else shape
            assert len(shape) == len(extents)
            tensors.append(Tensor(number, dtype, shape))
        plan = launches(kernel["host"], tensors, allocate)
        chosen[tokens] = [(launch.name, launch.grid) for launch in plan]
        assert allocated == [4 * tokens, 4 * tokens * 128]
    names = {tokens: [name for name, _ in plan] for tokens, plan in chosen.items()}
    assert [names[tokens] for tokens in (1, 2, 3, 8)] == [
        ["main_kernel"],
        ["main_kernel_1"],
        ["main_kernel_2"],
        ["main_kernel_3"],
    ]
    assert names[9] == names[64] == ["main_kernel_4", "main_kernel_5"]
    assert chosen[200] == [("main_kernel_4", (200, 1, 1)), ("main_kernel_6", (1, 2, 1))]
    tensors[0] = replace(tensors[0], dtype="int8")
    with pytest.raises(ValueError, match="Argument v1 is int8"):
        launches(kernel["host"], tensors, int)
    with pytest.raises(ValueError, match="arguments are declared"):
        launches(kernel["host"], tensors[1:], int)


def test_packing_needs_numpy_only(bundle: Path, tmp_path: Path) -> None:
    """The bundle's own library packs as this project does, with nothing else installed."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in Path(np.__file__).parent.parent.glob("numpy*"):
        (site / folder.name).symlink_to(folder)
    manifest = json.loads((bundle / "manifest.json").read_text())
    work = tmp_path / "work"
    work.mkdir()
    order = {
        "folder": str(work),
        "kernels": manifest["kernels"],
        "sparsity": 0.5,
        "tokens": 3,
        "seed": 7,
    }
    paths = os.pathsep.join(str(path) for path in (bundle, bundle / "lib", site))
    command = [sys.executable, "-S", str(bundle / "cuda_layers.py")]
    variables = {**os.environ, "PYTHONPATH": paths}
    subprocess.run(command, input=json.dumps(order), text=True, env=variables, check=True)
    own = tmp_path / "own"
    own.mkdir()
    prepare(own, manifest["kernels"], 0.5, 3, 7)
    assert sorted(p.name for p in own.iterdir()) == sorted(p.name for p in work.iterdir())
    for kernel in manifest["kernels"]:
        here, there = Problem.load(own, kernel), Problem.load(work, kernel)
        assert there.expected.shape == (3, 48)
        np.testing.assert_array_equal(here.expected, there.expected)
        for name, array in here.packed.items():
            np.testing.assert_array_equal(array, there.packed[name])


def test_random_layers_depend_on_the_seed_only() -> None:
    one, same, other = (random_layer(32, 128, 0.5, 16, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.qweight, same.qweight)
    assert one.nnz != other.nnz or not np.array_equal(one.qweight, other.qweight)
    assert 0.3 < one.sparsity < 0.7
    assert random_layer(32, 128, 0.0, 16, 1).sparsity == 0


def test_what_is_built() -> None:
    jobs = list(jobs_of(SHAPES, ["sm_90"], ACTIVATIONS, sweep=True))
    names = [one.name for one in jobs]
    assert len(names) == len(set(names))
    variants = {one.variant for one in jobs}
    assert variants == {
        "default", "sweep", "norm-gated", "bias-residual", "g32", "g128", "dense-g128",
        "dense-w2-g64",
    }  # fmt: skip
    # Of the widest layer's, blocks of few warps are no candidates: they spill.
    assert sum(one.variant == "sweep" for one in jobs) == 5 * 2 * 11 - (2 + 4)
    keys = {packing_key({"config": vars(one.config), "spec": json.loads(one.spec.to_json())})
            for one in jobs}  # fmt: skip
    assert len(keys) > 8
    assert one_token(jobs[0].spec, jobs[0].config) is not None
    assert shapes_named(["12x32"])[0].name == "12x32"
    with pytest.raises(ValueError, match="write N x K"):
        shapes_named(["12-32"])


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import cuda_bundle

    def spills(source: str, arch: Any) -> tuple[bytes, tuple[KernelUse, ...]]:
        code, uses = instant_compiler(source, arch)
        return code, (replace(uses[0], spill_bytes=4), *uses[1:])

    build_it = cuda_bundle.build
    monkeypatch.setattr(
        cuda_bundle, "build", lambda *a, **fields: build_it(*a, compiler=spills, **fields)
    )
    words = ["cuda_bundle.py", str(tmp_path / "b"), "--shapes", "32x64", "--activations", "int16"]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 1
    said = capsys.readouterr().out
    assert said.startswith("1 kernels, ")
    assert "spills: 32x64-int16-default-w12r2d2s16-sm_90: main_kernel" in said


@needs_nvcc
@pytest.mark.slow
def test_a_bundle_builds_with_nvcc(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    jobs = list(jobs_of(shapes_named(["4096x4096"]), ["sm_90"], ["int16"], sweep=False))
    manifest = build(bundle, jobs, shapes_named(["4096x4096"]))
    assert len(manifest["kernels"]) == 3
    assert not spilling(manifest)
    for kernel in manifest["kernels"]:
        code = gzip.decompress((bundle / kernel["image"]).read_bytes())
        assert code.startswith(b"\x7fELF")
        assert all(name.encode() in code for name in kernel["functions"])
