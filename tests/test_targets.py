"""TARGET names: what each lets the compiler use, and what a machine must then have."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from gqsa_compiler.errors import ArtefactError, UsageError
from gqsa_compiler.targets import (
    TARGET_NAMES,
    TargetSpec,
    host_arch,
    host_flags,
    host_target,
    parse_target,
    parse_targets,
)

# As Linux writes them; the last lines of each are what no kernel of ours asks for.
V2 = "fpu cx8 cmov fxsr mmx sse sse2 pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
OTHERS = "avx512_vnni avx_vnni avx512vbmi avx512ifma amx_tile sha_ni"
ARM = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimddp i8mm bf16"


def detect(arch: str, flags: str, folder: Path) -> TargetSpec:
    """Choose ``cpu`` on a machine whose /proc/cpuinfo names these flags."""
    word = "flags\t\t" if arch == "x86_64" else "Features\t"
    cpuinfo = folder / "cpuinfo"
    cpu = f"processor\t: 0\nmodel name\t: flags of a CPU\n{word}: {flags}\nbugs\t: spectre\n\n"
    cpuinfo.write_text(cpu * 2)
    return host_target("cpu", arch, host_flags(cpuinfo))


def test_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2\npower management:\n")
    assert host_flags(cpuinfo) == {"fpu", "avx2"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert host_flags(cpuinfo) == {"fp", "asimd"}
    cpuinfo.write_text("processor\t: 0\n")
    assert host_flags(cpuinfo) == frozenset()
    assert host_flags(tmp_path / "missing") == frozenset()


@pytest.mark.parametrize(
    ("flags", "level", "features", "bits"),
    [
        (V4, "x86-64-v4", "avx2 avx512bw avx512cd avx512dq avx512f avx512vl f16c fma", 512),
        (
            f"{V4} avx512_bf16",
            "x86-64-v4",
            "avx2 avx512bf16 avx512bw avx512cd avx512dq avx512f avx512vl f16c fma",
            512,
        ),
        (f"{V3} avx512_bf16", "x86-64-v3", "avx2 f16c fma", 256),
        (V3, "x86-64-v3", "avx2 f16c fma", 256),
        (V2, "x86-64-v2", "", 128),
        ("fpu sse sse2", "x86-64", "", 128),
        # Without AVX-512 DQ there is no level 4, and nothing of AVX-512 is used.
        (V4.replace("avx512dq ", ""), "x86-64-v3", "avx2 f16c fma", 256),
        # A hypervisor that hides MOVBE: AVX2 stays, the level does not.
        (V3.replace("movbe ", ""), "x86-64-v2", "avx2 f16c fma", 256),
        (
            V4.replace("movbe ", ""),
            "x86-64-v2",
            "avx2 avx512bw avx512cd avx512dq avx512f avx512vl f16c fma",
            512,
        ),
        (f"{V2} avx xsave f16c", "x86-64-v2", "f16c", 128),
    ],
)
def test_cpu_on_x86(flags: str, level: str, features: str, bits: int, tmp_path: Path) -> None:
    target = detect("x86_64", f"{flags} {OTHERS}", tmp_path)
    assert (target.name, target.kind, target.arch) == ("cpu", "llvm", "x86_64")
    assert target.cpu == level
    assert target.features == tuple(features.split())
    assert target.vector_bits == bits
    # The machine itself can run what is compiled on it, and nothing of `OTHERS` is asked for.
    assert set(target.required_flags) <= set(flags.split())


@pytest.mark.parametrize(
    ("flags", "features", "required"),
    [
        (ARM, ("bf16", "dotprod", "i8mm", "neon"), ("asimd", "asimddp", "bf16", "i8mm")),
        ("fp asimd crc32", ("neon",), ("asimd",)),
        ("fp asimd asimddp", ("dotprod", "neon"), ("asimd", "asimddp")),
    ],
)
def test_cpu_on_arm(
    flags: str, features: tuple[str, ...], required: tuple[str, ...], tmp_path: Path
) -> None:
    target = detect("aarch64", flags, tmp_path)
    assert (target.cpu, target.features, target.vector_bits) == ("generic", features, 128)
    assert target.required_flags == required
    assert target.triple == "aarch64-linux-gnu"


def test_cpu_elsewhere() -> None:
    with pytest.raises(UsageError, match="architecture is riscv64, which gqsa cannot compile"):
        host_target("cpu", "riscv64", frozenset())


def test_a_machine_that_does_not_tell_gets_the_least() -> None:
    assert host_target("cpu", "x86_64", frozenset()).required_flags == ()
    assert host_target("cpu", "aarch64", frozenset()).features == ("neon",)


def test_levels_ask_for_all_that_llvm_may_emit() -> None:
    """Code for a level holds its scalar instructions too, such as BMI2's shifts."""
    base = {"fpu", "cx8", "cmov", "fxsr", "mmx", "sse", "sse2"}
    assert set(parse_target("x86-64-v3").required_flags) == set(V3.split()) - base
    assert set(parse_target("x86-64-v4").required_flags) == set(V4.split()) - base
    bare = TargetSpec("sse", "llvm", "x86_64", "x86-64-v2", (), "x86_64-linux-gnu")
    assert set(bare.required_flags) == set(V2.split()) - base
    # AVX2 beyond the level brings AVX, which only runs where the system saves its registers.
    more = TargetSpec("avx2", "llvm", "x86_64", "x86-64-v2", ("avx2",), "x86_64-linux-gnu")
    assert set(more.required_flags) - set(bare.required_flags) == {"avx", "avx2", "xsave"}


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_every_name_parses(name: str) -> None:
    if name == "cpu" and host_arch() not in ("x86_64", "aarch64"):
        pytest.skip("this machine's architecture is not one that gqsa compiles for")
    target = parse_target(name)
    assert target.name == name
    assert target.required_flags == tuple(sorted(set(target.required_flags)))
    described = target.tvm_dict()
    if target.kind == "cuda":
        return
    assert (described["kind"], described["mcpu"]) == ("llvm", target.cpu)
    assert described["mattr"] == [f"+{feature}" for feature in target.features]
    assert described["mtriple"].startswith(target.arch)


def test_parse_cpu_is_this_machine() -> None:
    if host_arch() not in ("x86_64", "aarch64"):
        pytest.skip("this machine's architecture is not one that gqsa compiles for")
    assert parse_target("cpu") == host_target("cpu", host_arch(), host_flags())
    assert set(parse_target("cpu").required_flags) <= host_flags() or not host_flags()


def test_arm_levels() -> None:
    assert parse_target("aarch64").required_flags == ("asimd", "asimddp")
    matrix = ("asimd", "asimddp", "bf16", "i8mm")
    assert parse_target("aarch64-i8mm").required_flags == matrix
    assert parse_target("aarch64:neoverse-v2").required_flags == matrix
    assert parse_target("aarch64:cortex-a76").required_flags == ("asimd", "asimddp")
    assert parse_target("aarch64:cortex-a72").required_flags == ("asimd",)
    with pytest.raises(UsageError, match="Unknown target 'aarch64:cortex-m0'"):
        parse_target("aarch64:cortex-m0")


@pytest.mark.parametrize(("said", "arch"), [("AMD64", "x86_64"), ("arm64", "aarch64")])
def test_other_systems_names_of_an_architecture(
    said: str, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: said)
    assert host_arch() == arch


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"Unknown target 'x86'; choose one of cpu, x86-64-v3"):
        parse_target("x86")


@pytest.mark.parametrize("names", ["x86-64-v3,x86-64-v4", "x86-64-v4, x86-64-v3"])
def test_several_targets_come_with_the_most_capable_first(names: str) -> None:
    assert parse_targets(names) == (parse_target("x86-64-v4"), parse_target("x86-64-v3"))
    arm = parse_targets("aarch64,aarch64-i8mm")
    assert [target.name for target in arm] == ["aarch64-i8mm", "aarch64"]
    assert parse_targets("aarch64") == (parse_target("aarch64"),)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("x86-64-v3,x86-64-v3", "name x86-64-v3 twice; name it once"),
        ("x86-64-v3,x86-64-v5", "Unknown target 'x86-64-v5'; choose one of"),
        ("x86-64-v3,", "Unknown target ''; choose one of"),
        ("x86-64-v3,aarch64", "x86-64-v3 and aarch64 are different architectures"),
    ],
)
def test_targets_that_make_no_artefact(names: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_targets(names)


def test_two_names_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqsa_compiler.targets.host_arch", lambda: "x86_64")
    monkeypatch.setattr("gqsa_compiler.targets.host_flags", lambda: frozenset(V3.split()))
    with pytest.raises(UsageError, match="x86-64-v3 and cpu mean the same code here"):
        parse_targets("x86-64-v3,cpu")
    assert [target.name for target in parse_targets("cpu,x86-64-v4")] == ["x86-64-v4", "cpu"]


class Gpu:
    """A driver with one GPU of a compute capability."""

    def __init__(self, major: int, minor: int) -> None:
        self.found = major, minor

    def capability(self, device: int) -> tuple[int, int]:
        """Return what the GPU has."""
        return self.found


def test_named_gpus() -> None:
    target = parse_target("cuda:sm_90")
    assert (target.kind, target.arch, target.required_flags) == ("cuda", "sm_90", ("sm_90",))
    assert (target.machine, target.device_type) == (host_arch(), 2)
    described = target.tvm_dict()
    assert (described["arch"], described["max_shared_memory_per_block"]) == ("sm_90", 227 * 1024)
    assert described["host"]["mtriple"] == f"{host_arch()}-linux-gnu"
    with pytest.raises(
        UsageError, match=r"Unknown target .cuda:sm_70.; choose one of .* cuda:sm_80"
    ):
        parse_target("cuda:sm_70")
    with pytest.raises(UsageError, match="cuda:sm_80 and cuda:sm_90 are different architectures"):
        parse_targets("cuda:sm_80,cuda:sm_90")


@pytest.mark.parametrize(
    ("capability", "arch", "features"),
    [
        ((9, 0), "sm_90", ()),
        ((8, 7), "sm_86", ("compute_86",)),
        ((12, 0), "sm_90", ("compute_90",)),
    ],
)
def test_the_gpu_that_is_here(
    capability: tuple[int, int],
    arch: str,
    features: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gqsa_compiler.targets.open_driver", lambda: Gpu(*capability))
    target = parse_target("cuda")
    assert (target.arch, target.features) == (arch, features)
    # A GPU of 12.0 gives a block less shared memory than one of 9.0.
    assert target.shared_bytes == (99 if features else 227) * 1024
    assert target.tvm_dict()["max_shared_memory_per_block"] == target.shared_bytes


def test_without_a_gpu_code_for_all_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Gpu:
        raise ArtefactError("no driver")

    monkeypatch.setattr("gqsa_compiler.targets.open_driver", none)
    assert parse_target("cuda").required_flags == ("compute_80", "sm_80")
    monkeypatch.setattr("gqsa_compiler.targets.open_driver", lambda: Gpu(7, 5))
    with pytest.raises(UsageError, match=r"compute capability 7\.5, and the kernels need 8"):
        parse_target("cuda")
