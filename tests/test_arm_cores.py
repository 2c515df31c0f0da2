"""The table of Arm cores, and what the documentation says of them."""

from __future__ import annotations

from pathlib import Path

from gqsa_compiler.arm_cores import ARM_CORES
from gqsa_compiler.targets import parse_target

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "arm.md"


def test_the_document_has_the_table() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if line.startswith("| `")]
    assert shown == [
        f"| `{name}` | {', '.join(sorted(core.features))} | {core.l1_kib} | {core.l2_kib} "
        f"| {core.found_in} |"
        for name, core in ARM_CORES.items()
    ]


def test_a_core_is_a_target_with_its_features() -> None:
    for name, core in ARM_CORES.items():
        target = parse_target(f"aarch64:{name}")
        assert target.features == tuple(sorted(core.features))
        assert (target.arch, target.cpu) == ("aarch64", "generic")
