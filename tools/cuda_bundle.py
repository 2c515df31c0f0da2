"""Builds the CUDA kernels of `cuda.bsr_int4` for a machine that has a GPU and no compiler.

    python tools/cuda_bundle.py out/cuda-bundle

Needs nvcc and no GPU. The directory then has machine code, what launches it (`cuda_host.py`), a
manifest, the program that checks and times it (`cuda_run.py`) and the package that packs weights,
and no weights: these are made on the machine that measures. See docs/cuda-benchmarks.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cuda_shapes
from cuda_encode import encode_host
from cuda_library import copy_library
from cuda_shapes import Shape, shapes_named

from gqsa_compiler.errors import GqsaError
from gqsa_compiler.schedules.cuda import gemv
from gqsa_compiler.schedules.cuda.arch import ARCHES, Arch, arch_of
from gqsa_compiler.schedules.cuda.bsr import CudaBsr, CudaBsrInt2, CudaBsrInt4
from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.cuda.lowering import device_source, lower
from gqsa_compiler.schedules.cuda.nvcc import KernelUse, compile_cubin
from gqsa_compiler.schedules.generic.emit import int64
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.targets import TargetSpec

FORMAT = 1
HERE = Path(__file__).resolve().parent
SCRIPTS = (
    "cuda_check.py",
    "cuda_driver.py",
    "cuda_host.py",
    "cuda_layers.py",
    "cuda_measure.py",
    "cuda_probe.py",
    "cuda_processes.py",
    "cuda_rivals.py",
    "cuda_run.py",
    "cuda_timing.py",
    "cuda_torch_model.py",
)
"""What runs on the other machine."""
RULE = CudaBsrInt4()
TWO_BITS = CudaBsrInt2()
Compiler = Callable[[str, Arch], tuple[bytes, tuple[KernelUse, ...]]]


@dataclass(frozen=True)
class Job:
    """A kernel to build.

    Parameters
    ----------
    variant : str
        ``default``; ``sweep``: another configuration, for one token; or what else is different.
    spec : LinearSpec
        Its `nnz` is 0: the code takes any number of groups.
    tokens : tuple of int
    sparsities : tuple of float
    """

    shape: Shape
    arch: str
    variant: str
    spec: LinearSpec
    config: CudaConfig
    tokens: tuple[int, ...]
    sparsities: tuple[float, ...]

    @property
    def name(self) -> str:
        """The kernel's id in the manifest."""
        c = self.config
        code = f"w{c.warps}r{c.resident}d{c.depth}s{c.scale_bits}"
        words = (self.shape.name, self.spec.activation_dtype, self.variant, code, self.arch)
        return "-".join(words)


def target_of(arch: str) -> TargetSpec:
    """Describe an architecture as a target."""
    return TargetSpec(f"cuda:{arch}", "cuda", arch, "", (), "")


def rule_of(spec: LinearSpec) -> CudaBsr:
    """Return the rule that runs a layer of 2 or 4 bits."""
    return TWO_BITS if spec.bits == TWO_BITS.code_bits else RULE


def jobs_of(
    shapes: Sequence[Shape],
    arches: Sequence[str],
    activations: Sequence[str],
    sweep: bool,
    tokens: tuple[int, ...] = cuda_shapes.TOKENS,
    sparsities: tuple[float, ...] = cuda_shapes.SPARSITIES,
) -> Iterator[Job]:
    """List the kernels of a bundle."""
    for arch in arches:
        for shape in shapes:
            for dtype in activations:
                spec = LinearSpec(
                    shape.n, shape.k, "bsr", "int4", cuda_shapes.GROUP_SIZE, activation_dtype=dtype
                )  # type: ignore[arg-type]
                space = RULE.space(spec, target_of(arch))
                yield Job(shape, arch, "default", spec, space[0], tokens, sparsities)
                if sweep and shape.name in cuda_shapes.SWEPT:
                    for config in space[1:]:
                        yield Job(shape, arch, "sweep", spec, config, (1,), sparsities[:1])
                for variant, other, dropped in _variants(shape, spec, sparsities[0]):
                    config = rule_of(other).space(other, target_of(arch))[0]
                    yield Job(shape, arch, variant, other, config, tokens, (dropped,))


def _variants(
    shape: Shape, spec: LinearSpec, sparsity: float
) -> Iterator[tuple[str, LinearSpec, float]]:
    """List the fused and the coarser kernels that a shape is measured with, and their sparsity."""
    words = " ".join(shape.layers)
    if "gate+up" in words:
        gated = Epilogue(activation="silu", gated=True)
        yield "norm-gated", replace(spec, norm_eps=1e-5, epilogue=gated), sparsity
    if "down" in words:
        fused = Epilogue(bias=True, residual=True)
        yield "bias-residual", replace(spec, epilogue=fused), sparsity
    if (spec.n, spec.k) == (4096, 4096):
        yield "g32", replace(spec, group_size=32), sparsity
        yield "g128", replace(spec, group_size=128), sparsity
    if shape.name in cuda_shapes.GOAL_SHAPES:
        # Dense INT4 and 2 bits in the same stack: what sparsity has to be faster than.
        yield "dense-g128", replace(spec, group_size=128), 0.0
        yield "dense-w2-g64", replace(spec, group_size=64, weight_dtype="int2"), 0.0


def one_token(spec: LinearSpec, config: CudaConfig) -> Any:
    """Return the PrimFunc with the code for one token only, which builds several times faster."""

    def body(args: Arguments) -> None:
        gemv.launch(spec, config, args, 1, int64(0))

    return kernel(spec, RULE.params(spec, config), body)


class Builder:
    """Writes a bundle's kernels.

    Parameters
    ----------
    folder : Path
        The bundle; kernels that it has already are not compiled again.
    compiler : callable
        From CUDA C and an architecture to machine code and what ptxas says.
    """

    def __init__(self, folder: Path, compiler: Compiler = compile_cubin) -> None:
        self.folder, self.compiler = folder, compiler
        (folder / "kernels").mkdir(parents=True, exist_ok=True)

    def source(self, job: Job) -> tuple[str, dict[str, Any]]:
        """Generate a kernel's CUDA C and its host part."""
        if job.variant == "sweep":
            function = one_token(job.spec, job.config)
        else:
            function = rule_of(job.spec).build(job.spec, job.config, target_of(job.arch))
        lowered = lower(function, arch_of(job.arch))
        return device_source(lowered), encode_host(lowered["main"])

    def compile(self, job: Job, source: str, host: dict[str, Any]) -> dict[str, Any]:
        """Compile a kernel, unless it is there already, and return its entry of the manifest."""
        digest = hashlib.sha256(f"{job.arch}\n{source}".encode()).hexdigest()[:16]
        image = Path("kernels") / f"{digest}.cubin.gz"
        said = self.folder / "kernels" / f"{digest}.json"
        if not said.exists():
            code, uses = self.compiler(source, arch_of(job.arch))
            _write(self.folder / image, gzip.compress(code, mtime=0))
            _write(said, json.dumps([asdict(use) for use in uses]).encode())
        uses_text = json.loads(said.read_text(encoding="utf-8"))
        return {
            "id": job.name,
            "shape": job.shape.name,
            "arch": job.arch,
            "variant": job.variant,
            "spec": json.loads(job.spec.to_json()),
            "config": asdict(job.config),
            "tokens": list(job.tokens),
            "sparsities": list(job.sparsities),
            "arguments": arguments_of(job.spec, job.config),
            "image": str(image),
            "functions": {use["name"]: use for use in uses_text},
            "host": host,
        }


def arguments_of(spec: LinearSpec, config: CudaConfig) -> list[str]:
    """List a kernel's arguments in `ScheduleRule.build`'s order."""
    names = ["x"] + (["norm"] if spec.norm_eps is not None else [])
    names += [param.name for param in rule_of(spec).params(spec, config)]
    names += ["bias"] if spec.epilogue.bias else []
    names += ["residual"] if spec.epilogue.residual else []
    return [*names, "out"]


def build(
    folder: Path,
    jobs: Sequence[Job],
    shapes: Sequence[Shape],
    tokens: Sequence[int] = cuda_shapes.TOKENS,
    sparsities: Sequence[float] = cuda_shapes.SPARSITIES,
    compiler: Compiler = compile_cubin,
    processes: int = 1,
) -> dict[str, Any]:
    """Build a bundle; returns its manifest, which is written last."""
    builder = Builder(folder, compiler)
    pending = []
    with ThreadPoolExecutor(processes) as pool:
        for job in jobs:
            pending.append(pool.submit(builder.compile, job, *builder.source(job)))
            # TVM works in this thread only; sources that wait to be compiled take memory.
            if len(pending) > 2 * processes:
                pending[-2 * processes].result()
        kernels = [one.result() for one in pending]
    for name in SCRIPTS:
        shutil.copyfile(HERE / name, folder / name)
    copy_library(folder / "lib")
    manifest = {
        "format": FORMAT,
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("gqsa-compiler", "apache-tvm", "numpy")},
        "group_size": cuda_shapes.GROUP_SIZE,
        "tokens": list(tokens),
        "sparsities": list(sparsities),
        "shapes": [asdict(shape) | {"name": shape.name} for shape in shapes],
        "goals": list(cuda_shapes.GOAL_SHAPES),
        "rivals": cuda_shapes.RIVALS,
        "models": cuda_shapes.MODELS,
        "kernels": kernels,
    }
    _write(folder / "manifest.json", json.dumps(manifest).encode())
    return manifest


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(data)
    part.replace(path)


def spilling(manifest: dict[str, Any]) -> list[str]:
    """Name the functions that keep registers or arrays in memory."""
    return [
        f"{kernel['id']}: {use['name']}"
        for kernel in manifest["kernels"]
        for use in kernel["functions"].values()
        if use["stack_bytes"] or use["spill_bytes"]
    ]


def main() -> int:
    """Build a bundle; 1 if a kernel spills that is more than a candidate of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the bundle's directory")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=list(ARCHES))
    names = [shape.name for shape in cuda_shapes.SHAPES]
    parser.add_argument("--shapes", nargs="+", default=names, metavar="NxK")
    activations = cuda_shapes.ACTIVATIONS
    parser.add_argument("--activations", nargs="+", default=activations, choices=activations)
    parser.add_argument("--no-sweep", action="store_true", help="default configurations only")
    jobs_help = "kernels compiled at once"
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help=jobs_help)
    options = parser.parse_args()
    try:
        shapes = shapes_named(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    jobs = list(jobs_of(shapes, options.arch, options.activations, not options.no_sweep))
    try:
        manifest = build(options.folder, jobs, shapes, processes=max(1, options.jobs))
    except GqsaError as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{len(jobs)} kernels, {size / 1e6:.1f} MB in {options.folder}")
    spills = spilling(manifest)
    for name in spills:
        print(f"spills: {name}")
    return 1 if any("-sweep-" not in name for name in spills) else 0


if __name__ == "__main__":
    sys.exit(main())
