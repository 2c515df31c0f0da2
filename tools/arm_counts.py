"""Counts what Arm kernels execute, in an emulator, and compares them with llama.cpp's.

Instructions a weight of one matrix with 1 token and with 64, by QEMU's plugin interface, and
cycles of the inner loop of one token by llvm-mca's models of cores. There is no Arm machine behind
these numbers. Needs what `tools/arm_kernels.py` needs, ``gcc``, and 5 minutes.

    python tools/arm_counts.py [--llama DIR] [--mca llvm-mca-22]

DIR has llama.cpp's sources and a folder ``build-NAME`` for each of its builds to compare with
(docs/arm.md has the commands).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from arm_kernels import (
    EMULATOR,
    compile_for,
    emulate,
    inner_loop,
    link,
    loop_of,
    missing_tool,
    write_arguments,
)

from gqsa_compiler.arm_cores import ARM_CORES
from gqsa_compiler.checkpoint import BSRLayer, pack_codes
from gqsa_compiler.schedules.arm.narrow_sparse_pack import TOGETHER
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import parse_target

HERE = Path(__file__).parent
TOKENS = (1, 64)
CORES = ("cortex-a76", "cortex-x1", "neoverse-v2")


@dataclass(frozen=True)
class Case:
    """A matrix whose products are counted.

    Parameters
    ----------
    name : str
    n, k : int
    kept : float
        The share of groups that is kept.
    group_size, bits : int
    symmetric : bool
    target : str
    activations : str
        ``int16`` or ``int8``.
    """

    name: str
    n: int = 1024
    k: int = 2048
    kept: float = 0.5
    group_size: int = 16
    bits: int = 4
    symmetric: bool = False
    target: str = "aarch64"
    activations: Literal["int16", "int8"] = "int16"

    @property
    def full(self) -> bool:
        """Whether all groups are kept."""
        return self.kept == 1.0

    @property
    def loop_codes(self) -> int:
        """Codes that a turn of the inner loop of one token multiplies."""
        if self.activations == "int8":
            return 8 * self.group_size if self.full else TOGETHER * max(64, self.group_size)
        # A record of 32 bytes, or of one group, and of several rows where all are kept.
        codes = max(32 * 8 // self.bits, self.group_size)
        return codes * 4 if self.full and self.group_size * self.bits >= 128 else codes


CASES = (
    Case("W4S50 G16"),
    Case("W4S50 G16 symmetric", symmetric=True),
    Case("W4S50 G32", group_size=32),
    Case("W4S50 G64", group_size=64),
    Case("W4S50 G128", group_size=128),
    Case("W4S30 G16", kept=0.7),
    Case("W4 G16, all groups", kept=1.0),
    Case("W8 G64, all groups (the head)", kept=1.0, bits=8, group_size=64, symmetric=True),
    Case("W4S50 G16, plain NEON", target="aarch64:cortex-a72"),
    # Fewer rows: the emulator takes its time over bfmmla.
    Case("W4S50 G16, BF16 for many tokens", n=128, target="aarch64-i8mm"),
    Case("W4 G32, all groups", kept=1.0, group_size=32),
    *(
        Case(f"W4S50 G{size}, int8", group_size=size, activations="int8")
        for size in (16, 32, 64, 128)
    ),
    Case("W4S30 G16, int8", kept=0.7, activations="int8"),
    Case("W4 G32, all groups, int8", kept=1.0, group_size=32, activations="int8"),
    Case(
        "W8 G64, all groups, int8",
        kept=1.0,
        bits=8,
        group_size=64,
        symmetric=True,
        activations="int8",
    ),
)


def random_layer(case: Case, rng: np.random.Generator) -> BSRLayer:
    """Make a layer that keeps the same number of random groups in every row."""
    groups = case.k // case.group_size
    kept = round(groups * case.kept)
    order = rng.random((case.n, groups)).argsort(1)[:, :kept]
    nnz, top = case.n * kept, 1 << case.bits
    codes = rng.integers(0, top, (nnz, case.group_size), dtype=np.uint8)
    zeros = rng.integers(0, top, nnz, dtype=np.uint8)
    return BSRLayer(
        "layer",
        (case.n, case.k),
        case.group_size,
        (np.arange(case.n + 1) * kept).astype(np.int32),
        np.sort(order, 1).reshape(-1).astype(np.uint16),
        pack_codes(codes, case.bits),
        rng.uniform(1e-3, 1e-2, nnz).astype(np.float16),
        None if case.symmetric else pack_codes(zeros, case.bits),
        case.bits,
    )


def build_plugin(folder: Path) -> Path:
    """Compile the plugin that counts, for the QEMU that is here."""
    plugin = folder / "count.so"
    source = str(HERE / "arm_count_plugin.c")
    for api in ("1", "2", "4"):
        words = ["gcc", "-O2", "-shared", "-fPIC", f"-DAPI={api}", source, "-o", str(plugin)]
        subprocess.run(words, check=True)
        tried = subprocess.run(
            [EMULATOR, "-plugin", str(plugin), "/"], capture_output=True, check=False
        )
        if b"plugin" not in tried.stderr:
            return plugin
    raise RuntimeError(f"{EMULATOR} takes no plugin: {tried.stderr.decode()}")


def executed(plugin: Path, words: Sequence[str], number: int) -> float:
    """Count the instructions of one call; word `number` is how many calls there are."""
    counts = []
    for calls in ("1", "3"):
        said = emulate([*words[:number], calls, *words[number + 1 :]], plugin=plugin)
        counts.append(int(re.findall(r"instructions: (\d+)", said)[-1]))
    return (counts[1] - counts[0]) / 2


def cycles(loop: list[str], core: str, mca: str) -> float:
    """Ask llvm-mca for the cycles of an iteration, the branch left out."""
    text = "\n".join(loop[:-1]) + "\n"
    command = [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={ARM_CORES[core].model}"]
    done = subprocess.run(
        [*command, "-iterations=100"], input=text, text=True, capture_output=True, check=True
    )
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert found is not None
    return int(found.group(1)) / 100


def measure(case: Case, plugin: Path, folder: Path, mca: str | None) -> list[str]:
    """Compile a case's kernel, count and model it; return a row of the table."""
    rng = np.random.default_rng(0)
    layer, target = random_layer(case, rng), parse_target(case.target)
    spec = LinearSpec(
        case.n,
        case.k,
        "bsr",
        f"int{case.bits}",
        case.group_size,
        layer.nnz,
        case.symmetric,
        activation_dtype=case.activations,
    )
    rule, config = select(spec, target)
    executable = compile_for(target, rule.build(rule.code_key(spec), config, target))
    program = link(executable, folder)
    packed = rule.pack(spec, config, [layer])
    row = [case.name, case.target]
    for m in TOKENS:
        x = rng.standard_normal((m, case.k)).astype(np.float32)
        arrays = [x, *(packed[p.name] for p in rule.params(spec, config))]
        write_arguments(folder / "in", [*arrays, np.zeros((m, case.n), np.float32)])
        words = [str(program), str(folder / "in"), str(folder / "out"), "CALLS"]
        row.append(f"{executed(plugin, words, 3) / (case.n * case.k * m):.3f}")
    assembly = str(executable.mod.inspect_source("asm"))
    # The kernel of sparse rows of bytes has other loops of dot products too: of zero points, of
    # what is left of a row, of four tokens.
    if case.activations == "int8" and not case.full:
        loop = loop_of(assembly, r"\tmla\tv\d+\.4s", case.loop_codes // 16)
    else:
        loop = inner_loop(assembly)
    codes = case.loop_codes
    row.append(f"{len(loop) * 16 / codes:.1f}")
    if mca is not None:
        row += [f"{cycles(loop, core, mca) * 16 / codes:.1f}" for core in CORES]
    return row


def measure_llama(sources: Path, plugin: Path, folder: Path) -> Iterator[list[str]]:
    """Count llama.cpp's builds; yield rows of the table."""
    ggml = sources / "ggml"
    for build in sorted(sources.glob("build-*")):
        program = folder / "arm_llama"
        libraries = [f"{build}/ggml/src/libggml{part}.a" for part in ("", "-cpu", "-base")]
        command = ["aarch64-linux-gnu-g++", "-O2", "-static", f"-I{ggml / 'include'}"]
        files = [str(HERE / "arm_llama.cpp"), "-o", str(program), *libraries, "-lpthread"]
        subprocess.run([*command, *files], check=True)
        for kind in ("q4_0", "q8_0", "q6_k"):
            row = [f"llama.cpp {kind.upper()}", build.name.removeprefix("build-")]
            for m in TOKENS:
                words = [str(program), kind, str(Case.n), str(Case.k), str(m), "CALLS"]
                row.append(f"{executed(plugin, words, 5) / (Case.n * Case.k * m):.3f}")
            yield row


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Count what Arm kernels execute.")
    parser.add_argument("--llama", type=Path, help="llama.cpp's sources, with builds in build-*")
    parser.add_argument("--mca", help="llvm-mca, of LLVM 16 or later")
    options = parser.parse_args()
    if missing_tool() is not None:
        print(f"There is no {missing_tool()}.", file=sys.stderr)
        return 1
    titles = ["weights", "target", *(f"a weight, {m} tokens" for m in TOKENS), "loop, 16 codes"]
    titles += [f"cycles, {core}" for core in CORES] if options.mca else []
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugin = build_plugin(folder)
        for case in CASES:
            print("| " + " | ".join(measure(case, plugin, folder, options.mca)) + " |", flush=True)
        if options.llama is not None:
            for row in measure_llama(options.llama, plugin, folder):
                blank = [""] * (len(titles) - len(row))
                print("| " + " | ".join([*row, *blank]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
