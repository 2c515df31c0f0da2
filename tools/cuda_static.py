"""What nvcc makes of the decode kernels, without a GPU: a table for each architecture.

python tools/cuda_static.py --arch sm_90 --shapes 4096x11008 11008x4096

For a token, each row says how many bytes a kept group takes (of the packed tensors that the kernel
reads), what a thread and a block take and how many blocks a processor then holds, how many
instructions a warp issues for a tile of weights, and how long the traffic and the issue slots of
the whole GPU would take at its data sheet's numbers. Needs nvcc, and nvdisasm for the instructions
(CUDA's toolkit has it, or the Python package nvidia-cuda-nvdisasm). Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cuda_bundle import RULE, one_token, target_of
from cuda_layers import NOT_READ_FOR_ONE, random_layer
from cuda_shapes import GOAL_SHAPES, GROUP_SIZE, shapes_named

from gqsa_compiler.schedules.cuda.arch import ARCHES, WARP, Arch
from gqsa_compiler.schedules.cuda.config import CudaConfig, shared_bytes
from gqsa_compiler.schedules.cuda.lowering import device_source, lower
from gqsa_compiler.schedules.cuda.nvcc import KernelUse, compile_cubin, package_programs
from gqsa_compiler.schedules.spec import LinearSpec

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_KINDS = {
    "global loads": ("LDG",),
    "shared loads": ("LDS",),
    "half": ("HFMA2", "HADD2", "HMUL2"),
    "dot": ("IDP",),
    "bits": ("LOP3", "SHF", "PRMT", "SGXT"),
    "float": ("FADD", "FFMA", "FMUL", "I2F", "FSEL"),
    "integer": ("IMAD", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "IMNMX", "VIMNMX", "IABS"),
    "constants": ("LDC", "ULDC", "MOV", "CS2R", "UMOV"),
    "branches": ("BRA", "BSSY", "BSYNC", "BREAK", "WARPSYNC"),
}


@dataclass(frozen=True)
class Gpu:
    """What the data sheet says of an architecture's common GPU.

    Parameters
    ----------
    gigahertz : float
        Of the processors, a clock that they hold.
    terabytes : float
        Read a second; nine tenths of the data sheet's, which is what copies reach.
    threads, blocks, shared : int
        That a processor holds; shared memory in bytes, 1 kB of which each block takes for itself.
    """

    gigahertz: float
    terabytes: float
    threads: int
    blocks: int
    shared: int


GPUS: Mapping[str, Gpu] = {
    "sm_80": Gpu(1.41, 1.84, 2048, 32, 164 * 1024),
    "sm_86": Gpu(1.70, 0.84, 1536, 16, 100 * 1024),
    "sm_89": Gpu(2.52, 0.91, 1536, 24, 100 * 1024),
    "sm_90": Gpu(1.75, 3.00, 2048, 32, 228 * 1024),
}
"""A100 (80 GB), RTX 3090, RTX 4090, H100 SXM."""
REGISTERS = 65536
SCHEDULERS = 4
"""Of a processor: a warp's instruction each, every clock."""


def resident_blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """Return how many blocks a processor holds at once."""
    gpu = GPUS[arch]
    a_warp = -(-registers * WARP // 256) * 256
    return min(
        gpu.blocks,
        gpu.threads // threads,
        REGISTERS // (a_warp * (threads // WARP)),
        gpu.shared // (shared + 1024),
    )


def instructions(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Read what ``nvdisasm -c`` prints of one kernel.

    Returns
    -------
    list of (str, str)
        Each instruction's name and operands.
    dict of str to int
        For each label the instruction that follows.
    """
    found: list[tuple[str, str]] = []
    labels = {}
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(found)
        instruction = _INSTRUCTION.search(line)
        if instruction:
            found.append((instruction[2], instruction[3]))
    return found, labels


def walk(listing: str) -> Counter[str]:
    """Count the instructions of the loop over the weights, but for those at a row's end.

    The loop is the one that loads 16 bytes from global and from shared memory; the loop in it is
    what happens where a row ends. What waits behind a branch in it counts, as it is mostly taken.

    Raises
    ------
    ValueError
        There is no such loop.
    """
    found, labels = instructions(listing)
    loops = []
    for at, (name, operands) in enumerate(found):
        target = _TARGET.search(operands)
        if name == "BRA" and target and labels[target[1]] <= at:
            loops.append((labels[target[1]], at + 1))

    def loads(loop: tuple[int, int]) -> bool:
        names = [name for name, _ in found[slice(*loop)]]
        wide = [name for name in names if name.endswith("128") or ".128." in name]
        return any(n.startswith("LDG") for n in wide) and any(n.startswith("LDS") for n in wide)

    around = [loop for loop in loops if loads(loop)]
    if not around:
        raise ValueError("no loop reads weights and activations")
    begin, end = min(around, key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if begin <= loop[0] and loop[1] <= end and loop != (begin, end)]
    counted = Counter[str]()
    for at in range(begin, end):
        if not any(first <= at < last for first, last in inner):
            counted[kind_of(found[at][0])] += 1
    return counted


def kind_of(name: str) -> str:
    """Return which of the kinds above an instruction is, or ``other``."""
    base = name.split(".")[0]
    if base == "IMAD" and ".MOV" in name:
        return "constants"
    return next((kind for kind, names in _KINDS.items() if base in names), "other")


def find_nvdisasm() -> Path | None:
    """Find nvdisasm on the PATH, or in NVIDIA's Python packages."""
    on_path = shutil.which("nvdisasm")
    return Path(on_path) if on_path else next(reversed(package_programs("nvdisasm")), None)


def disassemble(cubin: bytes) -> str:
    """Return what nvdisasm prints of machine code.

    Raises
    ------
    SystemExit
        There is no nvdisasm.
    """
    tool = find_nvdisasm()
    if tool is None:
        sys.exit("nvdisasm was not found; CUDA's toolkit and nvidia-cuda-nvdisasm have it.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Line:
    """A line of the table: a kernel for one token.

    Parameters
    ----------
    bits_a_group : float
        Read of the packed weights, a kept group.
    instructions : float
        Of a warp, a tile of weights; `kinds` has its parts.
    traffic_us, issue_us : float
        A launch's weights at the GPU's bandwidth; its tiles' instructions on all schedulers.
    """

    shape: str
    arch: str
    activations: str
    config: str
    bits_a_group: float
    registers: int
    spilled_bytes: int
    shared_kb: float
    resident: int
    warps: int
    instructions: float
    kinds: Mapping[str, float]
    traffic_us: float
    issue_us: float


def line(spec: LinearSpec, config: CudaConfig, arch: Arch, sparsity: float) -> Line:
    """Compile a layer's kernel for one token and pack random weights for it."""
    layer = random_layer(spec.n, spec.k, sparsity, spec.group_size, seed=0)
    spec = replace(spec, nnz=layer.nnz)
    packed = RULE.pack(spec, config, [layer])
    read = sum(array.nbytes for name, array in packed.items() if name not in NOT_READ_FOR_ONE)
    source = device_source(lower(one_token(spec, config), arch))
    cubin, (use,) = compile_cubin(source, arch)
    return describe(spec, config, arch, read, len(packed["starts"]), use, disassemble(cubin))


def describe(
    spec: LinearSpec,
    config: CudaConfig,
    arch: Arch,
    read: int,
    tiles: int,
    use: KernelUse,
    listing: str,
) -> Line:
    """Put a line together.

    Parameters
    ----------
    read, tiles : int
        Bytes, and tiles of weights, of the packed layer.
    """
    gpu = GPUS[arch.name]
    shared = shared_bytes(spec, config, 1)
    kinds = {kind: count / config.depth for kind, count in walk(listing).items()}
    total = sum(kinds.values())
    slots = arch.processors * SCHEDULERS * gpu.gigahertz * 1e3  # a microsecond
    return Line(
        f"{spec.n}x{spec.k}",
        arch.name,
        spec.activation_dtype,
        f"w{config.warps}r{config.resident}d{config.depth}s{config.scale_bits}",
        8 * read / spec.nnz,
        use.registers,
        use.spill_bytes + use.stack_bytes,
        shared / 1024,
        resident_blocks(arch.name, config.threads, use.registers, shared),
        config.warps,
        total,
        kinds,
        read / gpu.terabytes / 1e6,
        tiles * total / slots,
    )


def table(lines: Sequence[Line]) -> str:
    """Write lines as Markdown."""
    head = (
        "| layer | for | inputs | configuration | bits a group | registers | shared kB | "
        "blocks (warps) a processor | instructions a tile | traffic us | issue us |"
    )
    rows = [head, "|" + "---|" * 11]
    for one in lines:
        rows.append(
            f"| {one.shape} | {one.arch} | {one.activations} | {one.config} | "
            f"{one.bits_a_group:.1f} | {one.registers} | {one.shared_kb:.1f} | "
            f"{one.resident} ({one.resident * one.warps}) | {one.instructions:.0f} | "
            f"{one.traffic_us:.1f} | {one.issue_us:.1f} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", nargs="+", choices=ARCHES, default=["sm_90"])
    parser.add_argument("--shapes", nargs="+", default=list(GOAL_SHAPES), metavar="NxK")
    parser.add_argument("--activations", nargs="+", default=["float16", "int16"])
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--space", action="store_true", help="all configurations, not the default")
    parser.add_argument("--json", type=Path, help="a file to write, with the kinds of instructions")
    chosen = parser.parse_args(arguments)
    lines = []
    for arch in (ARCHES[name] for name in chosen.arch):
        for shape in shapes_named(chosen.shapes):
            for activations in chosen.activations:
                spec = LinearSpec(
                    shape.n,
                    shape.k,
                    "bsr",
                    "int4",
                    chosen.group_size,
                    activation_dtype=activations,
                    norm_eps=1e-5,
                )
                space = RULE.space(spec, target_of(arch.name))
                for config in space if chosen.space else space[:1]:
                    lines.append(line(spec, config, arch, chosen.sparsity))
    print(table(lines))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(one) for one in lines], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
